"""The step of a trust region by Steihaug's conjugate gradients, which need only products with H.

Nocedal & Wright's Algorithm 7.2, from z = 0, r = g, d = −g::

    t = rᵀr / dᵀHd
    if dᵀHd ≤ 0 or ‖z + t d‖ ≥ Δ:  return z + τ d, with the τ ≥ 0 of ‖z + τ d‖ = Δ
    z ← z + t d,    r' = r + t Hd,    d ← (r'ᵀr' / rᵀr) d − r'
    if ‖r'‖ ≤ η ‖g‖:  return z
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product
from gradxform.derivatives import forward_only
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import vector
from gradxform.second_order import conjugate_gradients as cg
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius
from gradxform.sharding import varying_like


class Sizes(NamedTuple):
    """The sizes of two gradients, stored in the state."""

    first: jax.Array  #: largest absolute entry of the first gradient
    grad: jax.Array  #: largest absolute entry of the gradient at the accepted point


def steihaug(
    *, initial_radius: Scalar | None, max_radius: Scalar | None, tol: Scalar, maxiter: Scalar
) -> Subproblem:
    """Steihaug's step, with the arguments of ``trust_region``."""

    def init(params: tree.PyTree) -> Sizes:
        return Sizes(*(jnp.array(scalar(0), copy=True) for _ in range(2)))

    def prepare(point: Point, sizes: Sizes) -> Prepared:
        sizes = Sizes(
            first=jnp.where(point.is_first, point.grad_size, sizes.first),
            grad=jnp.where(point.is_new, point.grad_size, sizes.grad),
        )
        radius = scalar(0 if initial_radius is None else initial_radius)
        return Prepared(sizes, radius, jnp.array(0, jnp.int32), jnp.array(True))

    def step(point: Point, sizes: Sizes, radius: jax.Array) -> Step:
        limits = limits_of(point, sizes, tol=tol, maxiter=maxiter, max_radius=max_radius)
        return steihaug_step(point.linearise(), point.grad, sizes.grad, radius, limits)

    return Subproblem(init, prepare, step)


def limits_of(
    point: Point, sizes: Sizes, *, tol: Scalar, maxiter: Scalar, max_radius: Scalar | None
) -> "Limits":
    """The limits of the loop, with the arguments of ``trust_region``."""
    return Limits(
        forcing=jnp.minimum(scalar(tol) ** 2, tree.divide(sizes.grad, sizes.first)),
        iterations=jnp.minimum(scalar(maxiter), 2.0 * tree.count(point.grad)),
        rough=point.rough_radius,
        radius=scalar(tree.largest() if max_radius is None else max_radius),
    )


# how the loop of conjugate gradients ended
_WITHIN, _BOUNDARY, _NEGATIVE, _NOT_FINITE = range(4)


class Limits(NamedTuple):
    """The limits of the loop."""

    forcing: jax.Array  # largest ‖residual‖² at the end, in units of ‖g‖²
    iterations: jax.Array  # largest number of iterations
    rough: jax.Array  # fallback for the first radius
    radius: jax.Array  # largest first radius


class _Search(NamedTuple):
    """The state of the loop. Gradient, residual and curvature are divided by the size of g."""

    at: cg.Iterate  # the iterate
    # (radius, or 0 if not known yet; ‖x‖² / radius²; predicted reduction) in one vector, because
    # every scalar that the loop carries takes a kernel
    numbers: jax.Array
    iterations: jax.Array  # iterations made
    ending: jax.Array  # how the loop ended


def steihaug_step(
    product: Product,
    g: tree.PyTree,
    size: jax.Array,
    radius: jax.Array,
    limits: Limits,
) -> Step:
    """N&W Algorithm 7.2, for a gradient whose largest absolute entry is ``size``.

    If ``radius`` is 0, the first step goes to the model's minimum along −g and defines the radius.
    If the curvature is negative, its absolute value is used.
    """
    size = jax.lax.stop_gradient(size)  # the result does not depend on the scale
    unit = tree.reciprocal(size)
    r = tree.scale(unit, g)
    start = cg.first_iterate(jax.tree.map(jnp.zeros_like, r), r)
    enough = limits.forcing * start.rz

    def body(search: _Search) -> _Search:
        at = search.at
        radius, _, predicted = search.numbers
        hd = tree.scale(unit, product(at.d))
        per_radius = tree.reciprocal(radius)
        z, d = (tree.scale(per_radius, x) for x in (at.x, at.d))
        pairs = [(at.d, hd), (z, z), (z, d), (d, d)]
        (curvature, zz, zd, dd), rr = cg.products_at(at, pairs, None)
        finite, positive = jnp.isfinite(curvature), curvature > 0
        alpha = rr / jnp.where(finite & (curvature != 0), jnp.abs(curvature), 1)
        is_found = radius > 0
        found = jnp.where(finite & (curvature != 0), alpha * tree.sqrt(rr), 0)
        found = jnp.minimum(usable_radius(found, limits.rough), limits.radius)
        first = found, tree.sqrt(rr)
        to_boundary = tree.divide(*tree.select(is_found, _to_boundary(zz, zd, dd), first))
        leave = ~is_found | ~(finite & positive) | (alpha >= to_boundary)
        t = jnp.where(leave, to_boundary, alpha)
        bend = jnp.where(finite, curvature, 0)
        # each step lowers the model by t‖r‖² − ½ t² dᵀHd, as rᵀd = −‖r‖²
        predicted = predicted + t * (rr - 0.5 * t * bend)
        square = jnp.where(leave, 1, zz + t * (2 * zd + t * dd))
        return _Search(
            at=cg.step(at, hd, t, rr),
            numbers=vector([jnp.where(is_found, radius, found), square, predicted]),
            iterations=search.iterations + 1,
            ending=jnp.where(
                finite,
                jnp.where(positive, jnp.where(leave, _BOUNDARY, _WITHIN), _NEGATIVE),
                _NOT_FINITE,
            ).astype(jnp.int32),
        )

    def unfinished(search: _Search) -> jax.Array:
        i, rz = search.iterations, search.at.rz
        above = (rz > enough) | ((i == 0) & (rz > 0))
        return (search.ending == _WITHIN) & above & (scalar(i) < limits.iterations)

    none, zero = jnp.array(0, jnp.int32), jnp.zeros_like(start.rz)
    numbers = vector([radius.astype(zero.dtype), zero, zero])
    begin = varying_like(_Search(start, numbers, none, none), r)
    found = forward_only(
        'trust_region(solver="steihaug")', jax.lax.while_loop(unfinished, body, begin)
    )
    radius, square, predicted = found.numbers
    radius = jnp.where(radius > 0, radius, limits.rough)
    return Step(
        p=found.at.x,
        length=radius * tree.sqrt(square),
        radius=radius,
        predicted=size * predicted,
        negative=found.ending == _NEGATIVE,
        products=found.iterations,
        finite=found.ending != _NOT_FINITE,
    )


def _to_boundary(zz: jax.Array, zd: jax.Array, dd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of the τ ≥ 0 with ‖z + τd‖ = 1, from ‖z‖², zᵀd and dᵀd."""
    missing = jnp.maximum(1 - zz, 0)
    root = tree.sqrt(zd**2 + dd * missing)
    # the root has two forms; take the one that does not cancel
    return tree.select(zd > 0, (missing, zd + root), (root - zd, dd))
