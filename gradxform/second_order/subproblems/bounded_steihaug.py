"""Steihaug's step of a trust region within bounds: conjugate gradients on each face.

See :mod:`gradxform.second_order.subproblems.faces` for the algorithm, and
:mod:`gradxform.second_order.subproblems.steihaug` for the solver on a face.
"""

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product
from gradxform.hyperparameters import Scalar
from gradxform.second_order.subproblems import Point, Step, Subproblem, usable_radius
from gradxform.second_order.subproblems.faces import (
    Face,
    OnFace,
    Quadratic,
    free_at,
    room_at,
    step_within,
)
from gradxform.second_order.subproblems.steihaug import (
    Limits,
    Sizes,
    limits_of,
    steihaug,
    steihaug_step,
)


def steihaug_within(
    caller: str,
    *,
    initial_radius: Scalar | None,
    max_radius: Scalar | None,
    tol: Scalar,
    maxiter: Scalar,
) -> Subproblem:
    """:func:`gradxform.second_order.subproblems.steihaug.steihaug` within the bounds of the point.

    Errors name ``caller``.
    """
    plain = steihaug(initial_radius=initial_radius, max_radius=max_radius, tol=tol, maxiter=maxiter)

    def step(point: Point, sizes: Sizes, radius: jax.Array) -> Step:
        limits = limits_of(point, sizes, tol=tol, maxiter=maxiter, max_radius=max_radius)
        return _step(caller, point, sizes, radius, limits)

    return plain._replace(step=step)


def _step(caller: str, point: Point, sizes: Sizes, radius: jax.Array, limits: Limits) -> Step:
    free = free_at(point)
    product = _on(free, point.linearise())
    size = sizes.grad
    g = tree.scale(tree.reciprocal(size), point.grad)
    bend = tree.vdot(g, product(g)) / jnp.where(size > 0, size, 1)
    finite = jnp.isfinite(bend)
    bend = jnp.where(finite, bend, 0)
    radius = jnp.where(radius > 0, radius, _first_radius(g, bend, limits))
    per_size = tree.divide(radius, size)

    def scaled(v: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(lambda hv: jnp.where(finite, per_size * hv, 0), product(v))

    def bent(v: tree.PyTree) -> tuple[tree.PyTree, jax.Array]:
        cv = scaled(v)
        return cv, tree.vdot(v, cv)

    def solve(face: Face) -> OnFace:
        pull = scaled(face.fixed)
        slope = jax.tree.map(
            lambda g, pull, is_free: jnp.where(is_free, g + pull, 0), g, pull, face.free
        )
        found = steihaug_step(_on(face.free, scaled), slope, tree.max_abs(slope), face.room, limits)
        return OnFace(found.p, found.negative, found.products + 1, found.finite)

    unit = jax.tree.map(lambda x: jnp.full_like(x, radius), point.params)
    inside = step_within(caller, Quadratic(g, bend * radius, room_at(point, unit), bent, solve))
    return Step(
        p=tree.scale(radius, inside.u),
        length=radius * inside.length,
        radius=radius,
        predicted=radius * size * inside.predicted,
        negative=inside.negative,
        products=inside.products + 1,
        finite=inside.finite & finite,
    )


def _on(free: tree.PyTree, product: Product) -> Product:
    """The product with the rows and columns of the free entries."""

    def masked(v: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(lambda is_free, v: jnp.where(is_free, v, 0), free, v)

    return lambda v: masked(product(masked(v)))


def _first_radius(g: tree.PyTree, bend: jax.Array, limits: Limits) -> jax.Array:
    """The distance to the model's minimum along −g, as in ``steihaug_step``."""
    square = tree.vdot(g, g)
    found = tree.divide(square, jnp.abs(bend)) * tree.sqrt(square)
    return jnp.minimum(usable_radius(found, limits.rough), limits.radius)
