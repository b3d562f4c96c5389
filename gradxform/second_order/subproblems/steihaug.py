r"""The step of a trust region by Steihaug's conjugate gradients, from products with H alone.

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
from gradxform.kernels import in_one_kernel, vdots
from gradxform.second_order import conjugate_gradients as cg
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius
from gradxform.sharding import varying_like


class Sizes(NamedTuple):
    """What the state keeps."""

    first: jax.Array  #: largest entry of the gradient where the search began
    grad: jax.Array  #: largest entry of the gradient at the accepted point


def steihaug(*, initial_radius: Scalar | None, tol: Scalar, maxiter: Scalar) -> Subproblem:
    """Of any number of parameters; the arguments are those of ``trust_region``."""

    def init(params: tree.PyTree) -> Sizes:
        return Sizes(*(jnp.array(scalar(0), copy=True) for _ in range(2)))

    def prepare(point: Point, sizes: Sizes) -> Prepared:
        yes, zero = varying_like((jnp.array(True), scalar(0)), point.grad)
        sizes = Sizes(
            first=jnp.where(point.is_first, point.grad_size, sizes.first),
            grad=jnp.where(point.is_new, point.grad_size, sizes.grad),
        )
        if initial_radius is not None:
            return Prepared(sizes, scalar(initial_radius), jnp.array(0, jnp.int32), yes)

        product = point.linearise()  # outside of the branch, so that the step can share it

        def along_gradient() -> jax.Array:
            length = cauchy_length(product, point.grad, sizes.grad)
            radius = usable_radius(length, point.params_size)
            return varying_like(radius, point.grad)  # both branches need the same types

        radius = jax.lax.cond(point.is_first, along_gradient, lambda: zero)
        return Prepared(sizes, radius, point.is_first.astype(jnp.int32), yes)

    def step(point: Point, sizes: Sizes, radius: jax.Array) -> Step:
        forcing = jnp.minimum(scalar(tol), tree.sqrt(tree.divide(sizes.grad, sizes.first)))
        most = jnp.minimum(scalar(maxiter), 2.0 * tree.count(point.grad))
        return steihaug_step(point.linearise(), point.grad, sizes.grad, radius, forcing, most)

    return Subproblem(init, prepare, step)


def cauchy_length(product: Product, g: tree.PyTree, size: jax.Array) -> jax.Array:
    """The length of the step along −g to the model's minimum, ‖g‖³ / |gᵀHg|; 0 if none."""
    size = jax.lax.stop_gradient(size)  # no result depends on which size is taken
    r = tree.scale(tree.reciprocal(size), g)
    rr, curvature = vdots((r, r), (r, product(r)))
    return scalar(size * tree.divide(rr * tree.sqrt(rr), jnp.abs(curvature)))


# how the loop ended
_WITHIN, _BOUNDARY, _NEGATIVE, _NOT_FINITE = range(4)


class _Search(NamedTuple):
    """How far the loop is; gradient, residual and curvature are over the size of g."""

    at: cg.Iterate
    predicted: jax.Array
    iterations: jax.Array
    ending: jax.Array


def steihaug_step(
    product: Product,
    g: tree.PyTree,
    size: jax.Array,
    radius: jax.Array,
    forcing: jax.Array,
    maxiter: jax.Array,
) -> Step:
    """N&W Algorithm 7.2, for a gradient whose largest entry is ``size``."""
    size = jax.lax.stop_gradient(size)  # no result depends on which size is taken
    unit, per_radius, forcing = in_one_kernel(
        (tree.reciprocal(size), tree.reciprocal(radius), forcing)
    )
    r = tree.scale(unit, g)
    start = cg.first_iterate(jax.tree.map(jnp.zeros_like, r), r)
    enough = forcing * tree.sqrt(start.rz)

    def body(search: _Search) -> _Search:
        at = search.at
        hd = tree.scale(unit, product(at.d))
        z, d = (tree.scale(per_radius, x) for x in (at.x, at.d))
        pairs = [(at.d, hd), (z, z), (z, d), (d, d)]
        (curvature, zz, zd, dd), rr = cg.products_at(at, pairs, None)
        finite, positive = jnp.isfinite(curvature), curvature > 0
        alpha = rr / jnp.where(finite & positive, curvature, 1)
        to_boundary = _to_boundary(zz, zd, dd)
        leave = ~(finite & positive) | (alpha >= to_boundary)
        t = jnp.where(leave, to_boundary, alpha)
        bend = jnp.where(finite, curvature, 0)
        return _Search(
            at=cg.step(at, hd, t, rr),
            # each step lowers the model by t‖r‖² − ½ t² dᵀHd, as rᵀd = −‖r‖²
            predicted=search.predicted + t * (rr - 0.5 * t * bend),
            iterations=search.iterations + 1,
            ending=jnp.where(
                finite,
                jnp.where(positive, jnp.where(leave, _BOUNDARY, _WITHIN), _NEGATIVE),
                _NOT_FINITE,
            ).astype(jnp.int32),
        )

    def unfinished(search: _Search) -> jax.Array:
        i, rz = search.iterations, search.at.rz
        above = (tree.sqrt(rz) > enough) | ((i == 0) & (rz > 0))
        return (search.ending == _WITHIN) & above & (scalar(i) < maxiter)

    none = jnp.array(0, jnp.int32)
    begin = varying_like(_Search(start, jnp.zeros_like(start.rz), none, none), r)
    found = forward_only(
        'trust_region(solver="steihaug")', jax.lax.while_loop(unfinished, body, begin)
    )
    part = tree.scale(per_radius, found.at.x)
    return Step(
        p=found.at.x,
        length=radius * tree.sqrt(tree.vdot(part, part)),
        predicted=size * found.predicted,
        negative=found.ending == _NEGATIVE,
        products=found.iterations,
        finite=found.ending != _NOT_FINITE,
    )


def _to_boundary(zz: jax.Array, zd: jax.Array, dd: jax.Array) -> jax.Array:
    """The τ ≥ 0 of ‖z + τd‖ = 1, from ‖z‖², zᵀd and dᵀd."""
    missing = jnp.maximum(1 - zz, 0)
    root = tree.sqrt(zd**2 + dd * missing)
    # of the two forms of the root, the one that does not cancel
    return jnp.where(zd > 0, tree.divide(missing, zd + root), tree.divide(root - zd, dd))
