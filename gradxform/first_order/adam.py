"""Adam: momentum and RMSProp, each corrected for its start at zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.first_order.sgd import sgd
from gradxform.hyperparameters import (
    Fraction,
    LearningRate,
    NonNegative,
    below_one,
    checked,
    scalar,
)
from gradxform.protocol import transformation


class ScaleByAdamState(NamedTuple):
    """State of :func:`scale_by_adam`; the moments are in at least float32."""

    count: jax.Array  #: t, updates made so far
    first_moment: tree.PyTree  #: s, the decaying mean of the gradients
    second_moment: tree.PyTree  #: r, the decaying mean of the squares |g|²


@checked
def scale_by_adam(
    b1: Fraction = 0.9,
    b2: Fraction = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`adam`, without rate or sign: ŝ / (√r̂ + δ).

    Args:
      b1: ρ₁ in [0, 1), decay of the first moment.
      b2: ρ₂ in [0, 1), decay of the second moment.
      eps: δ ≥ 0 outside the root.
      eps_root: δ ≥ 0 inside the root.

    Returns:
      The transformation. ``update`` needs only the gradient.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.scale_by_adam()
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([ 1., -1.], dtype=float32)
    """

    def init(params: tree.PyTree) -> ScaleByAdamState:
        count = jnp.zeros((), jnp.int32)
        return ScaleByAdamState(count, tree.zeros_like(params), tree.squares_like(params))

    def update(
        grads: tree.PyTree,
        state: ScaleByAdamState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByAdamState]:
        del params, extra_args
        grads = tree.square_bounded(grads)
        rho1, rho2 = below_one(b1), below_one(b2)
        delta, delta_root = scalar(eps), scalar(eps_root)
        count = tree.add_count(state.count, 1)
        t = scalar(count)
        s = tree.map(lambda s, g: rho1 * s + (1 - rho1) * g, state.first_moment, grads)
        r = tree.map(
            lambda r, g: rho2 * r + tree.product((1 - rho2) * g, g), state.second_moment, grads
        )

        def direction(_: jax.Array, s: jax.Array, r: jax.Array) -> jax.Array:
            s_hat = s / (1 - rho1**t)
            r_hat = r / (1 - rho2**t)
            return tree.divide(s_hat, tree.sqrt(r_hat + delta_root) + delta)

        return tree.map(direction, grads, s, r), ScaleByAdamState(count, s, r)

    return transformation(init, update, takes_complex=True)


@checked
def adam(
    learning_rate: LearningRate = 1e-3,
    b1: Fraction = 0.9,
    b2: Fraction = 0.999,
    eps: NonNegative = 1e-8,
    eps_root: NonNegative = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam: momentum divided by the root mean square of the gradients.

    With s = r = 0 at the start, update t computes, entry by entry::

        s ← ρ₁ s + (1 − ρ₁) g          ŝ = s / (1 − ρ₁^t)
        r ← ρ₂ r + (1 − ρ₂) g²         r̂ = r / (1 − ρ₂^t)
        θ ← θ − ε ŝ / (√(r̂ + δ_root) + δ)

    For complex parameters g² is ``|g|²``. By default δ is outside the root, as in the paper. The
    lecture's slide has it inside the root: ``adam(eps=0, eps_root=1e-8)``. Both equal
    ``optax.adam`` with the same arguments, with three exceptions: the moments of bfloat16 and
    float16 gradients are float32; a gradient whose square overflows does not stop its parameter for
    ever; a zero gradient gives a zero update instead of NaN, also when differentiated through.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      b1: ρ₁ in [0, 1), decay of the first moment.
      b2: ρ₂ in [0, 1), decay of the second moment.
      eps: δ ≥ 0 outside the root.
      eps_root: δ ≥ 0 inside the root.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Lecture 7, "Adam Algorithm". Kingma & Ba, "Adam: a method for stochastic optimization", ICLR
      2015, Algorithm 1.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.adam(0.1)
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([-0.1,  0.1], dtype=float32)
    """
    return optax.chain(scale_by_adam(b1, b2, eps, eps_root), sgd(learning_rate))
