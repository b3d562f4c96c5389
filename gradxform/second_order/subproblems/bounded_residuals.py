"""Levenberg–Marquardt's step within bounds: each face takes the singular values of its columns.

See :mod:`gradxform.second_order.subproblems.faces` for the algorithm, and
:mod:`gradxform.second_order.subproblems.residuals` for K = J D⁻¹. From one decomposition K = Q R
the model is, with q = Qᵀr::

    m(u) = ½ ‖q + R u‖² − ½ ‖q‖² + cᵀu

On a face it is that of the free columns of R, with q + R u_A in place of q. c is 0 for a sum of
squares. Of another loss, R is the root of the Gauss–Newton matrix, q = 0, and c is the gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product
from gradxform.derivatives import eigh
from gradxform.hyperparameters import Scalar, scalar
from gradxform.rows import identity_rows, rows_like
from gradxform.second_order.newton import dense
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius
from gradxform.second_order.subproblems.bounded_exact import frame_of, square
from gradxform.second_order.subproblems.exact import EigenModel, no_model
from gradxform.second_order.subproblems.faces import Face, OnFace, free_at
from gradxform.second_order.subproblems.residuals import (
    axes_of_triangle,
    dot,
    full_step,
    jacobian_of,
    lengths_after,
    normalised,
    rounding_of,
    sizes_with,
    toward_minimum,
    triangle_of,
)
from gradxform.sharding import varying_like
from gradxform.squares import Residuals


class Factor(NamedTuple):
    """The model whatever the face, each part divided by its size."""

    columns: tree.PyTree  #: Rᵀ, n × n
    q: jax.Array  #: Qᵀr
    c: jax.Array  #: the part of the gradient that Rᵀq is not
    rounding: jax.Array  #: a singular value below this part of the largest counts as 0


class FactorModel(NamedTuple):
    """The model at the accepted point."""

    eigen: EigenModel  #: on the face of the free entries
    factor: Factor
    lengths: jax.Array  #: the diagonal of D
    size: jax.Array  #: ‖D x‖


def from_residuals_within(*, initial_radius: Scalar | None, columns: int) -> Subproblem:
    """:func:`gradxform.second_order.subproblems.residuals.from_residuals` within bounds."""

    def init(params: tree.PyTree) -> FactorModel:
        eigen = no_model(params)
        zero = eigen.values
        q, c, lengths = (jnp.zeros_like(zero) for _ in range(3))
        rounding, size = (jnp.zeros((), zero.dtype) for _ in range(2))
        return FactorModel(eigen, Factor(identity_rows(params), q, c, rounding), lengths, size)

    def prepare(point: Point, model: FactorModel) -> Prepared:
        def made() -> FactorModel:
            return varying_like(_model_at(point, model.lengths, columns), point.grad)

        model = jax.lax.cond(point.is_new, made, lambda: model)
        finite = jnp.isfinite(model.eigen.sizes).all()
        products = jnp.where(point.is_new, jnp.int32(tree.count(point.grad)), 0)
        if initial_radius is None:
            radius = usable_radius(scalar(model.size), toward_minimum(model.eigen))
            radius = usable_radius(radius, point.rough_radius)
        else:
            radius = scalar(initial_radius)
        return Prepared(model, radius, products, finite, full_step(model.eigen, model.size))

    return Subproblem(init, prepare, _step)


def _model_at(point: Point, lengths: jax.Array, columns: int) -> FactorModel:
    linear = point.linearise()
    made = _of_residuals if isinstance(linear, Residuals) else _of_curvature
    r, factor, sizes, lengths = made(linear, point, lengths, columns)
    free, _ = tree.ravel(free_at(point))
    values, axes, slopes = _on_face(factor, r, factor.q, factor.c, free)
    x, _ = tree.ravel(point.params)
    scale = tree.reciprocal(lengths)
    axes = rows_like(scale[:, None] * axes, point.grad)
    return FactorModel(
        eigen=EigenModel(axes, values, slopes, sizes),
        factor=factor._replace(columns=rows_like(r.T, point.grad)),
        lengths=lengths,
        size=tree.norm(lengths * x),
    )


_Made = tuple[jax.Array, Factor, jax.Array, jax.Array]


def _of_residuals(linear: Residuals, point: Point, lengths: jax.Array, columns: int) -> _Made:
    """R, its factor, the sizes of slope and curvature, and the new lengths of the columns of J."""
    unit, jacobian = normalised(jacobian_of(linear, point.params, columns))
    lengths = lengths_after(unit * jnp.sqrt(jnp.sum(jnp.square(jacobian), axis=0)), lengths)
    size, residuals = normalised(linear.r)
    r, q = triangle_of(jacobian * (unit * tree.reciprocal(lengths))[None, :], residuals)
    rounding = jnp.asarray(rounding_of(jacobian), r.dtype)
    return r, Factor((), q, jnp.zeros_like(q), rounding), sizes_with(size, unit), lengths


def _of_curvature(product: Product, point: Point, lengths: jax.Array, columns: int) -> _Made:
    """The same from a matrix G in place of JᵀJ."""
    unit, matrix = normalised(dense(product, point.params, columns))
    root = jnp.sqrt(unit)
    lengths = lengths_after(root * jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0)), lengths)
    scale = tree.reciprocal(lengths)
    values, axes = eigh(matrix * (root * scale)[:, None] * (root * scale)[None, :])
    size, c = normalised(scale * tree.ravel(point.grad)[0])
    r = tree.sqrt(jnp.maximum(values, 0))[:, None] * axes.T
    rounding = jnp.zeros_like(size)
    return r, Factor((), jnp.zeros_like(c), c, rounding), sizes_with(size, unit), lengths


def _on_face(
    factor: Factor, r: jax.Array, q: jax.Array, c: jax.Array, free: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of the free block of RᵀR, and the slopes along these."""
    values, axes, slopes = axes_of_triangle(jnp.where(free[None, :], r, 0), q, factor.rounding)
    return values, axes, slopes + dot(axes.T, jnp.where(free, c, 0))


def _step(point: Point, model: FactorModel, radius: jax.Array) -> Step:
    frame = frame_of(point, model.eigen, tree.reciprocal(model.lengths), radius)
    slope, bend = frame.sizes
    r, q, c = square(model.factor.columns).T, slope * model.factor.q, slope * model.factor.c
    axes = square(model.eigen.axes) * model.lengths[:, None]

    def solve(face: Face) -> OnFace:
        values, vectors, slopes = jax.lax.cond(
            jnp.all(face.free == frame.free),
            lambda: (model.eigen.values, axes, slope * model.eigen.slopes),
            lambda: _on_face(model.factor, r, q + bend * dot(r, face.fixed), c, face.free),
        )
        return frame.on_face(face, vectors, values, slopes)

    return frame.step(lambda v: bend * dot(r.T, dot(r, v)), solve)
