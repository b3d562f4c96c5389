"""The Kronecker factors as a preconditioner of conjugate gradients.

With the factors L and R of the module ``kronecker_factors``, leaf by leaf::

    M v = L⁻¹ V R⁻¹ ≈ (F + λI)⁻¹ v
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product
from gradxform.hyperparameters import Count, Fraction, NonNegative, Seed, Size, checked, scalar
from gradxform.preconditioners import Preconditioner, Request, RunningPreconditioner
from gradxform.second_order import kronecker_factors as kf
from gradxform.second_order import random_passes as passes
from gradxform.second_order.kronecker_batch import after, batch_at, number, scale_of
from gradxform.second_order.kronecker_factors import Estimate, Options


class KroneckerInverseState(NamedTuple):
    """Memory of :func:`kronecker_inverse`."""

    turn: jax.Array  #: updates made so far; begins again at the largest integer
    unit: jax.Array  #: curvature along the first gradient that has any; 0 before
    is_sum: jax.Array  #: whether the objective is a sum over the examples, not a mean
    estimate: Estimate  #: the factors and their inverses


@checked
def kronecker_inverse(
    damping: NonNegative = 1e-3,
    *,
    samples: Size = 1,
    factor_batch_size: Size | None = None,
    factor_every: Count = 1,
    inverse_every: Count = 5,
    decay: Fraction = 0.98,
    max_dim: Size = 4096,
    lanczos: Size = 4,
    seed: Seed = 0,
) -> Preconditioner:
    """The Kronecker factors of :func:`gradxform.kronecker` as a preconditioner.

    L and R are the running means of :func:`gradxform.kronecker`. For each parameter, seen as a
    matrix V, the approximate inverse of the damped Gauss–Newton matrix is::

        v ↦ (L/τ + π√λ I)⁻¹ V (R/τ + √λ/π I)⁻¹       τ² = tr L,  π² = columns/rows

    λ is the damping of the method, but at least ``damping``. One iteration of conjugate gradients
    (CG) with it is about a step of ``kronecker``; more iterations solve the system better, at one
    product each. Use it for nets with large batches.

    The factors are a memory between updates. The state of the method carries them; they take about
    three to six times the memory of the parameters.

    Args:
      damping: the smallest λ ≥ 0, relative to the curvature along the first gradient.
      samples: number of random passes V at a time. One is enough in a long training. For a few
        updates on a fixed objective take 8: one pass says nothing about most directions.
      factor_batch_size, decay, max_dim, lanczos, seed: see :func:`gradxform.kronecker`.
      factor_every: updates from one such estimate to the next.
      inverse_every: updates from one inverse to the next; early ones make more.

    Returns:
      The preconditioner, an argument of :func:`gradxform.newton_cg` and
      :func:`gradxform.hessian_free`. Their ``value_fn`` must come from :func:`gradxform.compose`.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range; or, in ``update``,
        ``value_fn`` does not come from :func:`gradxform.compose`, or the batch has fewer examples
        than asked for.

    References:
      See :func:`gradxform.kronecker`.

    >>> import jax, jax.numpy as jnp, gradxform as gx
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> x = jax.random.normal(keys[0], (512, 4))
    >>> model = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["out"]
    >>> loss = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    >>> objective = gx.compose(loss, model, x=x, y=jnp.sin(x[:, :1]) * x[:, 1:2])
    >>> start = {"hidden": jax.random.normal(keys[1], (4, 32)) / 2, "out": jnp.zeros((32, 1))}
    >>> def value(inverse):
    ...     tx = gx.hessian_free(maxiter=2, preconditioner=inverse)
    ...     return float(gx.minimize(objective, start, tx, max_steps=40).value)
    >>> value(gx.kronecker_inverse()) < 0.9 * value(None)
    True
    """
    options = Options(factor_every, inverse_every, decay, max_dim, lanczos, seed, samples)

    def init(params: tree.PyTree) -> KroneckerInverseState:
        first = kf.first_estimate(options, params)
        return KroneckerInverseState(jnp.array(0, jnp.int32), number(), jnp.array(False), first)

    def refresh(
        request: Request, memory: KroneckerInverseState
    ) -> tuple[Product, jax.Array, KroneckerInverseState]:
        batch = batch_at("kronecker_inverse", request.g, request.params, request.value_fn)
        part = batch.for_factors(factor_batch_size)
        known = memory.unit, memory.is_sum
        unit, is_sum = scale_of(batch, part, known, lambda: batch.value_fn(batch.params))
        lam = jnp.maximum(request.damping, scalar(damping) * passes.or_one(unit))
        made = kf.refreshed(
            options, memory.estimate, batch.params, batch.linearised(part, is_sum), memory.turn, lam
        )
        usable = jnp.isfinite(tree.max_abs(made.estimate))

        def inverse(v: tree.PyTree) -> tree.PyTree:
            return tree.select(usable, kf.divided(v, made.estimate, lam), v)

        turn = after(memory.turn)
        return inverse, made.probes, KroneckerInverseState(turn, unit, is_sum, made.estimate)

    return RunningPreconditioner(init, refresh)
