"""The direction of the Kronecker method alone: the gradient over the factored curvature.

With the factors L and R of the module ``kronecker_factors``, leaf by leaf::

    Δ = L⁻¹ G R⁻¹
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.hyperparameters import Count, Fraction, NonNegative, Seed, Size, checked, scalar
from gradxform.info import diagnostics
from gradxform.second_order import kronecker_factors as kf
from gradxform.second_order import random_passes as passes
from gradxform.second_order.joined_leaves import joined
from gradxform.second_order.kronecker_batch import (
    after,
    batch_of,
    counted,
    no_counts,
    number,
    scale_of,
)
from gradxform.second_order.kronecker_factors import Estimate, Options


@diagnostics
class ScaleByKroneckerInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    curvature_products: jax.Array  #: products with the curvature, of sub-batches
    gradient_equivalents: jax.Array  #: their cost, in gradients of ``value_fn``
    inversions: jax.Array  #: updates that inverted the factors
    fallbacks: jax.Array  #: updates without a step, because it was not finite
    non_finite: jax.Array  #: updates without a step, because value or gradient was not finite
    indefinite: jax.Array  #: updates in which the loss was not convex in the outputs
    damping: jax.Array  #: λ, in units of the curvature


class ScaleByKroneckerState(NamedTuple):
    """State of :func:`scale_by_kronecker`."""

    count: jax.Array  #: updates made so far
    turn: jax.Array  #: the same, but begins again where ``count`` has reached its largest value
    unit: jax.Array  #: curvature along the first gradient that has any; 0 before
    is_sum: jax.Array  #: whether the objective is a sum over the examples, not a mean
    estimate: Estimate  #: the factors and their inverses
    info: ScaleByKroneckerInfo


@checked
def scale_by_kronecker(
    damping: NonNegative = 1e-3,
    *,
    factor_batch_size: Size | None = None,
    factor_every: Count = 2,
    inverse_every: Count = 20,
    decay: Fraction = 0.98,
    max_dim: Size = 4096,
    lanczos: Size = 4,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`kronecker` alone, for chains: Δ = L⁻¹ G R⁻¹ of each matrix G.

    The damping is constant and there is no rate: follow it by ``optax.scale_by_learning_rate``, a
    schedule, clipping or momentum.

    Args:
      damping: λ ≥ 0, relative to the curvature along the first gradient.
      factor_batch_size, factor_every, inverse_every, decay, max_dim, lanczos, seed: see
        :func:`kronecker`.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``, as for
      :func:`kronecker`.

    Raises:
      TypeError, ValueError: see :func:`kronecker`.

    References:
      See :func:`kronecker`.

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> x = jax.random.normal(jax.random.key(0), (512, 8)) * jnp.logspace(0, -1, 8)
    >>> squares = lambda outputs, y: 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=1))
    >>> loss = gx.compose(squares, lambda w, x: x @ w, x=x, y=x @ jnp.ones((8, 3)))
    >>> tx = optax.chain(gx.scale_by_kronecker(), optax.scale_by_learning_rate(0.3))
    >>> solution = gx.minimize(loss, jnp.zeros((8, 3)), tx, tol=1e-4)
    >>> bool(solution.converged)
    True
    """
    options = Options(factor_every, inverse_every, decay, max_dim, lanczos, seed)

    def init(params: tree.PyTree) -> ScaleByKroneckerState:
        return ScaleByKroneckerState(
            jnp.array(0, jnp.int32),
            jnp.array(0, jnp.int32),
            number(),
            jnp.array(False),
            kf.first_estimate(options, params),
            ScaleByKroneckerInfo(**no_counts()),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByKroneckerState,
        params: tree.PyTree | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByKroneckerState]:
        batch = batch_of("scale_by_kronecker", grads, params, value, value_fn, extra_args)
        if tree.count(grads) == 0:
            return grads, state
        part = batch.for_factors(factor_batch_size)
        known = state.unit, state.is_sum
        unit, is_sum = scale_of(batch, part, known, lambda: batch.value)
        lam = scalar(damping) * passes.or_one(unit)
        made = kf.refreshed(
            options, state.estimate, batch.params, batch.linearised(part, is_sum), state.turn, lam
        )
        delta = kf.divided(batch.g, made.estimate, lam)
        finite = batch.finite & made.finite & jnp.isfinite(tree.max_abs(joined(delta)))
        delta = tree.select(finite, delta, jax.tree.map(jnp.zeros_like, delta))
        info = counted(state.info, batch, made, finite, made.probes / part.times)
        info = info._replace(damping=lam)
        count, turn = tree.add_count(state.count, 1), after(state.turn)
        new_state = ScaleByKroneckerState(count, turn, unit, is_sum, made.estimate, info)
        return tree.cast_like(delta, grads), tree.cast_floating_like(new_state, state)

    return protocol.transformation(init, update)
