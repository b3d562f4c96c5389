"""Resilient propagation: a step size for each parameter, from only the signs of its gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import (
    AtLeastOne,
    Fraction,
    LearningRate,
    NonNegative,
    checked,
    rate,
    scalar,
)
from gradxform.protocol import transformation
from gradxform.sharding import sharded_like


class RpropState(NamedTuple):
    """State of :func:`rprop`; the trees are in at least float32."""

    count: jax.Array  #: k, updates made so far
    gains: tree.PyTree  #: Δ / ε, the step size of each parameter relative to the learning rate
    signs: tree.PyTree  #: s, the signs of the last gradients, or 0 if the sign had changed


@checked
def rprop(
    learning_rate: LearningRate = 0.1,
    eta_minus: Fraction = 0.5,
    eta_plus: AtLeastOne = 1.2,
    min_step_size: NonNegative = 1e-6,
    max_step_size: NonNegative = 50.0,
) -> optax.GradientTransformationExtraArgs:
    """RPROP: a step size grows while its gradient keeps its sign, and shrinks when it changes.

    Each parameter has its own step size Δ, which starts at ``learning_rate``, and a sign s, which
    starts at 0::

        if s g > 0:   Δ ← min(η₊ Δ, Δ_max)     s ← sign(g)
        if s g < 0:   Δ ← max(η₋ Δ, Δ_min)     s ← 0
        otherwise:    Δ stays                  s ← sign(g)
        θ ← θ − Δ s

    The size of the gradient has no influence. This is the form iRprop−: if the sign of a gradient
    changes, its parameter waits for one update. (The first paper takes the last step back.) Use it
    with full-batch gradients: minibatch noise changes signs by itself and shrinks the steps.

    ``optax.rprop`` (0.2.8) has the same Δ and s, but returns each step one update later.

    Args:
      learning_rate: Δ₀, the initial step size of every parameter. A schedule scales all step sizes:
        the state holds their ratio to the schedule's value.
      eta_minus: η₋ in [0, 1), the factor if the sign changes.
      eta_plus: η₊ ≥ 1, the factor if the sign stays the same.
      min_step_size: Δ_min ≥ 0.
      max_step_size: Δ_max ≥ Δ_min.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Riedmiller & Braun, "A direct adaptive method for faster backpropagation learning: the RPROP
      algorithm", ICNN 1993, for Δ and the constants. Igel & Hüsken, "Empirical evaluation of the
      improved Rprop learning algorithms", Neurocomputing 50:105 (2003), for iRprop−.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.rprop(0.1)
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.asarray([3.0, 3.0]), state)
    >>> updates, _ = tx.update(jnp.asarray([0.01, -5.0]), state)
    >>> updates.round(3)
    Array([-0.12, -0.  ], dtype=float32)
    """

    def init(params: tree.PyTree) -> RpropState:
        zeros = tree.zeros_like(params)
        gains = sharded_like(jax.tree.map(lambda z: z + 1, zeros), params)
        return RpropState(jnp.zeros((), jnp.int32), gains, zeros)

    def update(
        grads: tree.PyTree,
        state: RpropState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, RpropState]:
        del params, extra_args
        eps, shrink, grow = rate(learning_rate, state.count), scalar(eta_minus), scalar(eta_plus)
        low, high = (tree.divide(scalar(size), eps) for size in (min_step_size, max_step_size))

        def adapt(gain: jax.Array, s: jax.Array, g: jax.Array) -> jax.Array:
            agreement = s * jnp.sign(g)
            adapted = jnp.clip(gain * jnp.where(agreement > 0, grow, shrink), low, high)
            # while a schedule is at 0, the ratio does not change
            return jnp.where((jnp.abs(agreement) > 0) & (eps > 0), adapted, gain)

        def remember(s: jax.Array, g: jax.Array) -> jax.Array:
            return jnp.where(s * jnp.sign(g) < 0, 0, jnp.sign(g))

        gains = tree.map(adapt, state.gains, state.signs, grads)
        signs = tree.map(remember, state.signs, grads)
        updates = tree.map(lambda _, gain, s: -eps * gain * s, grads, gains, signs)
        return updates, RpropState(tree.add_count(state.count, 1), gains, signs)

    return transformation(init, update)
