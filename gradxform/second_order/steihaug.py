"""Steihaug's conjugate gradients: a trust region's step from curvature products alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product
from gradxform.derivatives import constant_size, forward_only
from gradxform.hyperparameters import scalar


class Step(NamedTuple):
    """A step p, the minimum of the model within the radius or near it."""

    p: tree.PyTree
    length: jax.Array  #: ‖Dp‖
    predicted: jax.Array  #: m(0) − m(p)
    negative: jax.Array  #: whether H was seen to have negative curvature


def cauchy_length(product: Product, g: tree.PyTree) -> jax.Array:
    """The length of the step along −g to the model's minimum, ‖g‖³ / |gᵀHg|; 0 if none."""
    size = constant_size(g)
    unit = tree.scale(tree.reciprocal(size), g)
    norm = tree.sqrt(tree.vdot(unit, unit))
    unit = tree.scale(tree.reciprocal(norm), unit)
    return scalar(tree.divide(size * norm, jnp.abs(tree.vdot(unit, product(unit)))))


class _Cg(NamedTuple):
    z: tree.PyTree
    r: tree.PyTree  # of the residual Hz + g, over the size of g, as are all below
    d: tree.PyTree
    predicted: jax.Array
    iterations: jax.Array
    negative: jax.Array
    finite: jax.Array
    done: jax.Array


def steihaug_step(
    product: Product,
    g: tree.PyTree,
    radius: jax.Array,
    forcing: jax.Array,
    maxiter: jax.Array,
) -> tuple[Step, jax.Array, jax.Array]:
    """N&W Algorithm 7.2, whether its curvature was finite, and the products it took."""
    size = scalar(constant_size(g))
    unit = tree.reciprocal(size)
    r = tree.scale(unit, g)
    first = tree.vdot(r, r)

    def body(cg: _Cg) -> _Cg:
        hd = tree.scale(unit, product(cg.d))
        curvature, rr = tree.vdot(cg.d, hd), tree.vdot(cg.r, cg.r)
        finite, positive = jnp.isfinite(curvature), curvature > 0
        alpha = rr / jnp.where(finite & positive, curvature, 1)
        to_boundary = _to_boundary(cg.z, cg.d, radius)
        leave = ~(finite & positive) | (alpha >= to_boundary)
        t = jnp.where(leave, to_boundary, alpha)
        # each step lowers the model by t‖r‖² − ½ t² dᵀHd, as rᵀd = −‖r‖²
        bend = jnp.where(finite, curvature, 0)
        r = tree.map(lambda r, hd: r + t * hd, cg.r, hd)
        next_rr = tree.next_square(cg.r, t, hd, r)
        return _Cg(
            tree.map(lambda z, d: z + t * d, cg.z, cg.d),
            r,
            tree.map(lambda d, r: tree.divide(next_rr, rr) * d - r, cg.d, r),
            cg.predicted + t * (rr - 0.5 * t * bend),
            cg.iterations + 1,
            finite & ~positive,
            finite,
            leave | ~(tree.sqrt(next_rr) > forcing * tree.sqrt(first)),
        )

    def unfinished(cg: _Cg) -> jax.Array:
        return ~cg.done & (scalar(cg.iterations) < maxiter)

    none, no, yes = jnp.array(0, jnp.int32), jnp.array(False), jnp.array(True)
    zeros = jax.tree.map(jnp.zeros_like, r)
    d = jax.tree.map(jnp.negative, r)
    start = _Cg(zeros, r, d, jnp.zeros_like(first), none, no, yes, first == 0)
    start = tree.varying_like(start, r)
    cg = jax.lax.while_loop(unfinished, body, start)
    cg = forward_only('trust_region(solver="steihaug")', cg)
    part = tree.scale(tree.reciprocal(radius), cg.z)
    length = radius * tree.sqrt(tree.vdot(part, part))
    return Step(cg.z, length, size * cg.predicted, cg.negative), cg.finite, cg.iterations


def _to_boundary(z: tree.PyTree, d: tree.PyTree, radius: jax.Array) -> jax.Array:
    """The τ ≥ 0 of ‖z + τd‖ = Δ."""
    z, d = (tree.scale(tree.reciprocal(radius), x) for x in (z, d))
    dd, zd = tree.vdot(d, d), tree.vdot(z, d)
    missing = jnp.maximum(1 - tree.vdot(z, z), 0)
    root = tree.sqrt(zd**2 + dd * missing)
    # of the two forms of the root, the one that does not cancel
    return jnp.where(zd > 0, tree.divide(missing, zd + root), tree.divide(root - zd, dd))
