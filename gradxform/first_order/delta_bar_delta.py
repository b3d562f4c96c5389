"""Delta-bar-delta: a learning rate for each parameter, adapted by the signs of its gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import (
    Fraction,
    LearningRate,
    NonNegative,
    checked,
    rate,
    scalar,
)
from gradxform.protocol import transformation
from gradxform.sharding import sharded_like


class DeltaBarDeltaState(NamedTuple):
    """State of :func:`delta_bar_delta`; the trees are in at least float32."""

    count: jax.Array  #: t, updates made so far
    gains: tree.PyTree  #: ε_t / ε, the rate of each parameter relative to the learning rate
    average: tree.PyTree  #: δ̄, the decaying mean of the gradients


@checked
def delta_bar_delta(
    learning_rate: LearningRate,
    kappa: NonNegative = 1e-3,
    phi: Fraction = 0.1,
    theta: Fraction = 0.7,
) -> optax.GradientTransformationExtraArgs:
    """Delta-bar-delta: a rate grows while its gradient keeps its sign, and falls when it changes.

    Each parameter w has its own rate ε, which starts at ``learning_rate``. δ is the gradient, and δ̄
    is a decaying mean of the past gradients, 0 at the start::

        if δ̄ δ > 0:   ε ← ε + κ
        if δ̄ δ < 0:   ε ← ε (1 − φ)
        w ← w − ε δ
        δ̄ ← (1 − θ) δ + θ δ̄

    Use it with full-batch gradients: minibatch noise changes signs by itself and shrinks the rates.

    Args:
      learning_rate: the initial rate of every parameter. A schedule scales all rates: the state
        holds their ratio to the schedule's value.
      kappa: κ ≥ 0, the increase of a rate per update, in the same units as the learning rate.
      phi: φ in [0, 1), the part of a rate lost at a change of sign.
      theta: θ in [0, 1), the part of δ̄ that is kept in an update.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Lecture 7, "Heuristic Approaches". Jacobs, "Increased rates of convergence through learning
      rate adaptation", Neural Networks 1:295 (1988), eqs. 5-6.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.delta_bar_delta(0.1, kappa=0.02, phi=0.5)
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.asarray([1.0, 1.0]), state)
    >>> updates, _ = tx.update(jnp.asarray([1.0, -1.0]), state)
    >>> updates.round(3)
    Array([-0.12,  0.05], dtype=float32)
    """

    def init(params: tree.PyTree) -> DeltaBarDeltaState:
        zeros = tree.zeros_like(params)
        gains = sharded_like(jax.tree.map(lambda z: z + 1, zeros), params)
        return DeltaBarDeltaState(jnp.zeros((), jnp.int32), gains, zeros)

    def update(
        grads: tree.PyTree,
        state: DeltaBarDeltaState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, DeltaBarDeltaState]:
        del params, extra_args
        eps, decay = rate(learning_rate, state.count), scalar(theta)
        # while a schedule is at 0, the rates do not grow
        increase, factor = tree.divide(scalar(kappa), eps), 1 - scalar(phi)

        def adapt(gain: jax.Array, average: jax.Array, delta: jax.Array) -> jax.Array:
            agreement = jnp.sign(average) * jnp.sign(delta)  # their product could underflow
            return jnp.where(
                agreement > 0, gain + increase, jnp.where(agreement < 0, gain * factor, gain)
            )

        gains = tree.map(adapt, state.gains, state.average, grads)
        updates = tree.map(lambda delta, gain: -eps * gain * delta, grads, gains)
        average = tree.map(lambda a, d: (1 - decay) * d + decay * a, state.average, grads)
        return updates, DeltaBarDeltaState(tree.add_count(state.count, 1), gains, average)

    return transformation(init, update)
