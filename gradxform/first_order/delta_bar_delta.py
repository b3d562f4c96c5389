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

    count: jax.Array  #: updates made so far, t
    gains: tree.PyTree  #: the rate of each parameter over the learning rate, ε_t / ε
    average: tree.PyTree  #: δ̄, the decaying mean of the gradients


@checked
def delta_bar_delta(
    learning_rate: LearningRate,
    kappa: NonNegative = 1e-3,
    phi: Fraction = 0.1,
    theta: Fraction = 0.7,
) -> optax.GradientTransformationExtraArgs:
    r"""Delta-bar-delta: a rate grows while its gradient keeps its sign, and falls when it turns.

    With δ_t the gradient and one rate ε_t for each parameter, which starts at ``learning_rate``:

    .. math::
        \varepsilon_t &= \begin{cases}
            \varepsilon_{t-1} + \kappa & \bar\delta_{t-1} \delta_t > 0 \\
            \varepsilon_{t-1} (1 - \phi) & \bar\delta_{t-1} \delta_t < 0 \\
            \varepsilon_{t-1} & \text{otherwise}
        \end{cases} \\
        w &\leftarrow w - \varepsilon_t \odot \delta_t \\
        \bar\delta_t &= (1 - \theta)\, \delta_t + \theta\, \bar\delta_{t-1}

    It is meant for full-batch gradients: the noise of a minibatch changes signs by itself and
    shrinks the rates.

    Args:
      learning_rate: the rate every parameter starts with. A schedule scales all rates: the state
        holds their ratio to the schedule's value.
      kappa: κ ≥ 0, the increase per update, in units of the learning rate's own.
      phi: φ in [0, 1), the fraction lost at a change of sign.
      theta: θ in [0, 1), how much of δ̄ survives an update.

    Returns:
      The transformation; ``update`` needs the gradient alone.

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
        # a rate that a schedule holds at 0 cannot grow
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
