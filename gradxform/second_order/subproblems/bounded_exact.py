"""The exact step of a trust region within bounds: each face takes the eigenvalues of its matrix.

See :mod:`gradxform.second_order.subproblems.faces` for the algorithm. C is the matrix D⁻¹HD⁻¹ in
units of the radius. The face of the entries that are free at x is decomposed once for each accepted
point, so a rejected trial point with no bound in reach needs no new decomposition.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.bounds import Box
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import quotients
from gradxform.rows import identity_rows, rows_like
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius
from gradxform.second_order.subproblems.exact import (
    EigenModel,
    Scaling,
    check_size,
    eigenvalues,
    first_radius,
    matvec,
    no_model,
    scaled_matrix,
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
from gradxform.sharding import varying_like


class FaceModel(NamedTuple):
    """The model at the accepted point."""

    eigen: EigenModel  #: on the face of the free entries
    matrix: tree.PyTree  #: D⁻¹HD⁻¹ divided like ``eigen``, n × n
    scale: jax.Array  #: the diagonal of D⁻¹


def exact_within(
    *, initial_radius: Scalar | None, scaling: Scaling, columns: int, max_size: int
) -> Subproblem:
    """:func:`gradxform.second_order.subproblems.exact.exact` within bounds."""

    def init(params: tree.PyTree) -> FaceModel:
        check_size(params, max_size)
        eigen = no_model(params)
        return FaceModel(eigen, identity_rows(params), jnp.zeros_like(eigen.values))

    def prepare(point: Point, model: FaceModel) -> Prepared:
        def made() -> FaceModel:
            return varying_like(_face_model(point, columns, scaling), point.grad)

        model = jax.lax.cond(point.is_new, made, lambda: model)
        products = jnp.where(point.is_new, jnp.int32(tree.count(point.grad)), 0)
        if initial_radius is None:
            radius = usable_radius(first_radius(model.eigen), point.rough_radius)
        else:
            radius = scalar(initial_radius)
        return Prepared(model, radius, products, jnp.isfinite(model.eigen.sizes[1]))

    return Subproblem(init, prepare, _step)


def _face_model(point: Point, columns: int, scaling: Scaling) -> FaceModel:
    matrix, inverse, curvature_size = scaled_matrix(point, columns, scaling)
    gradient, _ = tree.ravel(point.grad)
    scale = jnp.ones_like(gradient) if inverse is None else inverse
    grad_size = point.grad_size.astype(gradient.dtype)
    free, _ = tree.ravel(free_at(point))
    values, axes = eigenvalues(_masked(matrix, free))
    slopes = matvec(axes.T, scale * gradient * tree.reciprocal(grad_size))
    eigen = EigenModel(
        axes=rows_like(axes * scale[:, None], point.grad),
        values=values,
        slopes=slopes,
        sizes=jnp.stack([grad_size, curvature_size]),
    )
    return FaceModel(eigen, rows_like(matrix, point.grad), scale)


def _masked(matrix: jax.Array, free: jax.Array) -> jax.Array:
    return jnp.where(free[:, None] & free[None, :], matrix, 0)


def _step(point: Point, model: FaceModel, radius: jax.Array) -> Step:
    frame = frame_of(point, model.eigen, model.scale, radius)
    _, bend = frame.sizes
    matrix, axes = square(model.matrix), square(model.eigen.axes) / model.scale[:, None]

    def solve(face: Face) -> OnFace:
        values, vectors = jax.lax.cond(
            jnp.all(face.free == frame.free),
            lambda: (model.eigen.values, axes),
            lambda: eigenvalues(_masked(matrix, face.free)),
        )
        slope = jnp.where(face.free, frame.slope + bend * matvec(matrix, face.fixed), 0)
        return frame.on_face(face, vectors, values, matvec(vectors.T, slope))

    return frame.step(lambda v: bend * matvec(matrix, v), solve)


def square(rows: tree.PyTree) -> jax.Array:
    """A matrix from its rows, see :func:`gradxform.rows.rows_like`."""
    flat, _ = tree.ravel(rows)
    size = round(len(flat) ** 0.5)
    return flat.reshape(size, size)


class Frame(NamedTuple):
    """Units in which the radius is 1 and the larger one of slope and curvature too."""

    point: Point
    slope: jax.Array  #: D⁻¹g
    sizes: tuple[jax.Array, jax.Array]  #: of slope and curvature
    free: jax.Array  #: the entries that can move from x
    room: Box  #: the bounds of u
    scale: jax.Array  #: u times this is p
    radius: jax.Array
    energy: jax.Array  #: m(u) times this is m(p)

    def on_face(self, face: Face, axes: jax.Array, values: jax.Array, slopes: jax.Array) -> OnFace:
        """The minimum on a face with these axes, in which the model has these slopes."""
        _, bend = self.sizes
        step = step_along(slopes, values, (jnp.ones_like(bend), bend), face.room)
        v = jnp.where(face.free, matvec(axes, step.p), 0)
        return OnFace(v, step.negative, step.products, step.finite)

    def step(
        self, product: Callable[[jax.Array], jax.Array], solve: Callable[[Face], OnFace]
    ) -> Step:
        """The step within the box."""
        bend = jnp.vdot(self.slope, product(self.slope), precision=jax.lax.Precision.HIGHEST)
        inside = step_within(Quadratic(self.slope, bend, self.room, product, solve))
        _, unravel = tree.ravel(self.point.params)
        return Step(
            p=unravel(self.scale * inside.u),
            length=self.radius * inside.length,
            radius=self.radius,
            predicted=self.energy * inside.predicted,
            negative=inside.negative,
            products=jnp.array(0, jnp.int32),
            finite=inside.finite,
        )


def frame_of(point: Point, eigen: EigenModel, scale: jax.Array, radius: jax.Array) -> Frame:
    """The units for the model at a point."""
    delta = radius.astype(scale.dtype)
    linear, curvature = sizes_of(eigen)
    quadratic = curvature * delta
    larger = jnp.maximum(linear, quadratic)
    slope, bend = quotients((linear, larger), (quadratic, larger))
    gradient, unravel = tree.ravel(point.grad)
    room = room_at(point, unravel(delta * scale))
    flat: Any = [tree.ravel(side)[0] for side in room]
    free, _ = tree.ravel(free_at(point))
    return Frame(
        point=point,
        slope=slope * scale * gradient * tree.reciprocal(linear),
        sizes=(slope, bend),
        free=free,
        room=Box(*flat),
        scale=delta * scale,
        radius=radius,
        energy=delta * larger,
    )
