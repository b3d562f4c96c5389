"""Steps within bounds from the eigenvalues of the model, for the solvers that keep these.

See :mod:`gradxform.second_order.subproblems.faces` for the algorithm. An :class:`EigenModel` holds
D⁻¹HD⁻¹ = QΛQᵀ on the face of the entries that are free at x. A step only fixes more entries, so the
model on every face follows from this Q and Λ. A rejected trial point with no bound in reach needs
no new decomposition.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.bounds import Box
from gradxform.kernels import quotients
from gradxform.second_order.subproblems import Point, Step
from gradxform.second_order.subproblems.exact import (
    EigenModel,
    eigenvalues,
    sizes_of,
    step_along,
)
from gradxform.second_order.subproblems.faces import (
    Face,
    OnFace,
    Quadratic,
    free_at,
    room_at,
    step_within,
)
from gradxform.second_order.subproblems.residuals import ResidualModel, full_step, normal_axes

dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Axes(NamedTuple):
    """The model m(u) = bᵀy + ½ yᵀΛy with y = Qᵀu."""

    axes: jax.Array  #: Q
    values: jax.Array  #: Λ, ascending
    slopes: jax.Array  #: b


#: (the model, a face) → the model of v_F; its matrix has zeros for the fixed entries
OfFace: TypeAlias = Callable[[Axes, Face], Axes]


def dense_step(
    caller: str, point: Point, model: EigenModel, radius: jax.Array, of_face: OfFace
) -> Step:
    """The step within the box of the point."""
    delta = radius.astype(model.values.dtype)
    linear, curvature = sizes_of(model)
    quadratic = curvature * delta
    larger = jnp.maximum(linear, quadratic)
    slope, bend = quotients((linear, larger), (quadratic, larger))
    rows = _square(model.axes)
    scale = _row_lengths(rows)
    at_x = Axes(rows / scale[:, None], bend * model.values, slope * model.slopes)
    _, unravel = tree.ravel(point.params)
    low, high = (tree.ravel(side)[0] for side in room_at(point, unravel(delta * scale)))
    free, _ = tree.ravel(free_at(point))

    def product(v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = dot(at_x.axes.T, v)
        bent = at_x.values * y
        return dot(at_x.axes, bent), jnp.sum(y * bent)  # squares of y do not cancel

    def solve(face: Face) -> OnFace:
        is_known = jnp.all(face.free == free)
        axes, values, slopes = jax.lax.cond(is_known, lambda: at_x, lambda: of_face(at_x, face))
        one = jnp.ones_like(face.room)
        step = step_along(slopes, values, (one, one), face.room)
        v = jnp.where(face.free, dot(axes, step.p), 0)
        return OnFace(v, step.negative, step.products, step.finite)

    g = jnp.where(free, dot(at_x.axes, at_x.slopes), 0)
    inside = step_within(caller, Quadratic(g, product(g)[1], Box(low, high), product, solve))
    return Step(
        p=unravel(delta * scale * inside.u),
        length=radius * inside.length,
        radius=radius,
        predicted=delta * larger * inside.predicted,
        negative=inside.negative,
        products=jnp.array(0, jnp.int32),
        finite=inside.finite,
    )


def exact_within(point: Point, model: EigenModel, radius: jax.Array) -> Step:
    """The step of :mod:`gradxform.second_order.subproblems.exact` within bounds."""

    def of_face(at_x: Axes, face: Face) -> Axes:
        q = at_x.axes
        matrix = _free(face, dot(q * at_x.values[None, :], q.T))
        values, axes = eigenvalues(_free(face, matrix.T))
        pull = at_x.values * dot(q.T, face.fixed)
        slope = _free(face, dot(q, at_x.slopes + pull))
        return Axes(axes, values, dot(axes.T, slope))

    return dense_step("trust_region(bounds=…)", point, model, radius, of_face)


def residuals_within(point: Point, model: ResidualModel, radius: jax.Array) -> Step:
    """The step of :mod:`gradxform.second_order.subproblems.residuals` within bounds.

    R = √Λ Qᵀ is a factor of KᵀK, so m(u) = ½ ‖R u + q‖² − ½ ‖q‖² + cᵀu with √Λ q = b. On a face it
    is that of the free columns of R, with R u_A + q in place of q. Only the Gauss–Newton matrix of
    another loss needs c, the slopes where Λ = 0.
    """

    def of_face(at_x: Axes, face: Face) -> Axes:
        q, root = at_x.axes, tree.sqrt(at_x.values)
        residuals = tree.divide(at_x.slopes, root) + root * dot(q.T, face.fixed)
        values, axes, slopes = normal_axes(_free(face, root[:, None] * q.T), residuals)
        rest = dot(q, jnp.where(root > 0, 0, at_x.slopes))
        return Axes(axes, values, slopes + dot(axes.T, _free(face, rest)))

    step = dense_step("levenberg_marquardt(bounds=…)", point, model.eigen, radius, of_face)
    return step._replace(full=full_step(model))


def _free(face: Face, x: jax.Array) -> jax.Array:
    """Zeros in the columns of the fixed entries."""
    return jnp.where(face.free, x, 0)


def _square(rows: tree.PyTree) -> jax.Array:
    """A square matrix from its rows, see :func:`gradxform.rows.rows_like`."""
    flat, _ = tree.ravel(rows)
    size = round(len(flat) ** 0.5)
    return flat.reshape(size, size)


def _row_lengths(matrix: jax.Array) -> jax.Array:
    """The norm of each row, without overflow."""
    largest = jnp.max(jnp.abs(matrix), axis=1, keepdims=True)
    unit = matrix / jnp.where(largest > 0, largest, 1)
    return largest[:, 0] * jnp.sqrt(jnp.sum(jnp.square(unit), axis=1))
