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
from gradxform.derivatives import constant_size, forward_only
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order import conjugate_gradients as cg
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius


def steihaug(*, initial_radius: Scalar | None, tol: Scalar, maxiter: Scalar) -> Subproblem:
    """Of any number of parameters; the arguments are those of ``trust_region``.

    The model that the state keeps is the largest entry of the first gradient.
    """

    def init(params: tree.PyTree) -> jax.Array:
        return jnp.array(scalar(0), copy=True)

    def prepare(point: Point, first: jax.Array) -> Prepared:
        def mark(x: tree.PyTree) -> tree.PyTree:  # both branches need the same types
            return tree.varying_like(x, point.grad)

        none, yes = mark((jnp.array(0, jnp.int32), jnp.array(True)))
        first = jnp.where(point.is_first, scalar(tree.max_abs(point.grad)), first)
        if initial_radius is not None:
            return Prepared(first, scalar(initial_radius), none, yes)

        def along_gradient() -> tuple[jax.Array, jax.Array]:
            length = cauchy_length(point.product, point.grad)
            return mark((usable_radius(length, point.params), none + 1))

        zero = mark(scalar(0))
        radius, products = jax.lax.cond(point.is_first, along_gradient, lambda: (zero, none))
        return Prepared(first, radius, products, yes)

    def step(point: Point, first: jax.Array, radius: jax.Array) -> Step:
        largest = scalar(tree.max_abs(point.grad))
        forcing = jnp.minimum(scalar(tol), tree.sqrt(tree.divide(largest, first)))
        most = jnp.minimum(scalar(maxiter), 2.0 * tree.count(point.grad))
        return steihaug_step(point.product, point.grad, radius, forcing, most)

    return Subproblem(init, prepare, step)


def cauchy_length(product: Product, g: tree.PyTree) -> jax.Array:
    """The length of the step along −g to the model's minimum, ‖g‖³ / |gᵀHg|; 0 if none."""
    size = constant_size(g)
    unit = tree.scale(tree.reciprocal(size), g)
    norm = tree.sqrt(tree.vdot(unit, unit))
    unit = tree.scale(tree.reciprocal(norm), unit)
    return scalar(tree.divide(size * norm, jnp.abs(tree.vdot(unit, product(unit)))))


class _Search(NamedTuple):
    """How far the loop is; gradient, residual and curvature are over the size of g."""

    at: cg.Iterate
    predicted: jax.Array
    iterations: jax.Array
    negative: jax.Array
    finite: jax.Array
    done: jax.Array


def steihaug_step(
    product: Product, g: tree.PyTree, radius: jax.Array, forcing: jax.Array, maxiter: jax.Array
) -> Step:
    """N&W Algorithm 7.2."""
    size = scalar(constant_size(g))
    unit = tree.reciprocal(size)
    r = tree.scale(unit, g)
    start = cg.first_iterate(jax.tree.map(jnp.zeros_like, r), r)
    enough = forcing * tree.sqrt(start.rz)

    def body(search: _Search) -> _Search:
        at = search.at
        hd = tree.scale(unit, product(at.d))
        curvature, rr = cg.products_at(at, hd, None)
        finite, positive = jnp.isfinite(curvature), curvature > 0
        alpha = rr / jnp.where(finite & positive, curvature, 1)
        to_boundary = _to_boundary(at.x, at.d, radius)
        leave = ~(finite & positive) | (alpha >= to_boundary)
        t = jnp.where(leave, to_boundary, alpha)
        bend = jnp.where(finite, curvature, 0)
        after = cg.step(at, hd, t, rr)
        return _Search(
            at=after,
            # each step lowers the model by t‖r‖² − ½ t² dᵀHd, as rᵀd = −‖r‖²
            predicted=search.predicted + t * (rr - 0.5 * t * bend),
            iterations=search.iterations + 1,
            negative=finite & ~positive,
            finite=finite,
            done=leave | ~(tree.sqrt(after.rz) > enough),
        )

    def unfinished(search: _Search) -> jax.Array:
        return ~search.done & (scalar(search.iterations) < maxiter)

    none, no, yes = jnp.array(0, jnp.int32), jnp.array(False), jnp.array(True)
    begin = _Search(start, jnp.zeros_like(start.rz), none, no, yes, start.rz == 0)
    found = jax.lax.while_loop(unfinished, body, tree.varying_like(begin, r))
    found = forward_only('trust_region(solver="steihaug")', found)
    part = tree.scale(tree.reciprocal(radius), found.at.x)
    return Step(
        p=found.at.x,
        length=radius * tree.sqrt(tree.vdot(part, part)),
        predicted=size * found.predicted,
        negative=found.negative,
        products=found.iterations,
        finite=found.finite,
    )


def _to_boundary(z: tree.PyTree, d: tree.PyTree, radius: jax.Array) -> jax.Array:
    """The τ ≥ 0 of ‖z + τd‖ = Δ."""
    z, d = (tree.scale(tree.reciprocal(radius), x) for x in (z, d))
    dd, zd = tree.vdot(d, d), tree.vdot(z, d)
    missing = jnp.maximum(1 - tree.vdot(z, z), 0)
    root = tree.sqrt(zd**2 + dd * missing)
    # of the two forms of the root, the one that does not cancel
    return jnp.where(zd > 0, tree.divide(missing, zd + root), tree.divide(root - zd, dd))
