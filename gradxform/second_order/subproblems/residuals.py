"""The step of Levenberg–Marquardt, from the singular values of the Jacobian of the residuals.

With the residuals r, their Jacobian J, and K = J D⁻¹ = U S Vᵀ, the step within ‖Dp‖ ≤ Δ is::

    p = −D⁻¹ V (S² + λ)⁻¹ S Uᵀ r,    λ ≥ 0 the least for which ‖Dp‖ ≤ Δ

This is the solution of the least-squares problem [J; √λ D] p = −[r; 0]. JᵀJ is never formed, since
it would square the condition number. D holds the lengths of the columns of J, as in Moré (1978).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product, gauss_newton_of
from gradxform.derivatives import eigh, turn_of
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import unless_batched
from gradxform.objective import Composed, ValueFn
from gradxform.rows import identity_rows, rows_like
from gradxform.second_order.newton import dense
from gradxform.second_order.subproblems import (
    Full,
    Point,
    Prepared,
    Step,
    Subproblem,
    usable_radius,
)
from gradxform.second_order.subproblems.exact import EigenModel, exact_step
from gradxform.second_order.subproblems.faces import free_columns, on_face
from gradxform.sharding import varying_like
from gradxform.small_svd import LARGEST, orthogonalised, triangle_of
from gradxform.squares import Residuals, linearised, squares_of

# D falls by at most this factor from one point to the next: a column that was long stays in mind
_MEMORY = 0.99


class ResidualModel(NamedTuple):
    """The model at the accepted point."""

    eigen: EigenModel  #: of KᵀK, with A = D⁻¹V, Λ = S² and Aᵀg = S Uᵀ r
    lengths: jax.Array  #: the diagonal of D
    size: jax.Array  #: ‖D x‖; with bounds of the entries that can move
    is_lost: jax.Array  #: whether a parameter has lost the influence that it had


def least_squares_at(method: str, value_fn: ValueFn, params: tree.PyTree) -> Residuals | Product:
    """The weighted residuals of a sum of squares, or the Gauss–Newton matrix of another loss."""
    if squares_of(value_fn) is None:
        return gauss_newton_of(method)(value_fn, params)
    assert isinstance(value_fn, Composed)
    return linearised(value_fn, params)


def from_residuals(*, initial_radius: Scalar | None, columns: int) -> Subproblem:
    """The step for up to a few thousand parameters."""

    def init(params: tree.PyTree) -> ResidualModel:
        zero, _ = tree.ravel(tree.zeros_like(params))
        # in buffers of their own, so that a state can be donated
        values, slopes, lengths = (jnp.zeros_like(zero) for _ in range(3))
        eigen = EigenModel(identity_rows(params), values, slopes, jnp.zeros(2, zero.dtype))
        return ResidualModel(eigen, lengths, jnp.zeros((), zero.dtype), jnp.array(False))

    def prepare(point: Point, model: ResidualModel) -> Prepared:
        def made() -> ResidualModel:
            return varying_like(_model_at(point, model, columns), point.grad)

        model = jax.lax.cond(point.is_new, made, lambda: model)
        finite = jnp.isfinite(model.eigen.sizes).all()
        products = jnp.where(point.is_new, jnp.int32(tree.count(point.grad)), 0)
        if initial_radius is None:
            radius = usable_radius(_first_radius(model, point.params), point.rough_radius)
        else:
            radius = scalar(initial_radius)
        return Prepared(model, radius, products, finite)

    def step(point: Point, model: ResidualModel, radius: jax.Array) -> Step:
        return exact_step(model.eigen, radius)._replace(full=full_step(model))

    return Subproblem(init, prepare, step)


def full_step(model: ResidualModel) -> Full:
    """The Gauss–Newton step."""
    slopes, values = model.eigen.slopes, model.eigen.values
    size = scalar(model.eigen.sizes[0])
    u = tree.divide(slopes, values)
    length, of_params = size * scalar(tree.norm(u)), scalar(model.size)
    relative = jnp.where(of_params > 0, tree.divide(length, of_params), tree.largest())
    # where a square has underflowed, as far out on a plateau, the full step is not known
    is_lost = jnp.any((values == 0) & (slopes != 0)) | (values[-1] == 0) | model.is_lost
    numbers = (
        0.5 * size * (size * scalar(jnp.sum(slopes * u))),
        jnp.where(length > 0, relative, 0),
    )
    return Full(*(jnp.where(is_lost, tree.largest(), x) for x in numbers))


def _first_radius(model: ResidualModel, params: tree.PyTree) -> jax.Array:
    """‖Dx‖; a parameter that is 0 tells no size, then at least the way to a zero gradient."""
    size, toward = scalar(model.size), _toward_minimum(model.eigen)
    x, _ = tree.ravel(params)
    return jnp.where(jnp.all(x != 0), size, jnp.maximum(size, toward))


def _toward_minimum(model: EigenModel) -> jax.Array:
    """‖D⁻¹g‖ / ‖K‖², a distance at which the gradient may vanish."""
    steepness = model.sizes[0] * tree.norm(model.slopes)
    return scalar(tree.divide(steepness, model.sizes[1] * model.values[-1]))


class _Scales(NamedTuple):
    """The diagonal of D, and whether a parameter has lost the influence that it had."""

    lengths: jax.Array
    is_lost: jax.Array


def _model_at(point: Point, model: ResidualModel, columns: int) -> ResidualModel:
    linear = point.linearise()

    def scales_of(lengths: jax.Array) -> _Scales:
        lengths = jnp.where(jnp.isfinite(lengths), lengths, 0)
        is_lost = lengths < jnp.finfo(lengths.dtype).eps * model.lengths
        is_lost = jnp.any(free_columns(point, is_lost.astype(lengths.dtype)) > 0)
        return _Scales(jnp.maximum(lengths, _MEMORY * model.lengths), is_lost)

    of_linear: Any = _of_residuals if isinstance(linear, Residuals) else _of_curvature
    eigen, scales = of_linear(linear, point, scales_of, columns)
    axes = rows_like(tree.reciprocal(scales.lengths)[:, None] * eigen.axes, point.grad)
    x, _ = tree.ravel(point.params)
    size = tree.norm(free_columns(point, scales.lengths * x))
    return ResidualModel(eigen._replace(axes=axes), scales.lengths, size, scales.is_lost)


def _of_residuals(
    linear: Residuals, point: Point, scales_of: Callable[[jax.Array], _Scales], columns: int
) -> tuple[EigenModel, _Scales]:
    """The eigenvalues and eigenvectors of KᵀK, and D from the lengths of the columns of J."""
    jacobian = jacobian_of(linear, point.params, columns)
    size, jacobian = _normalised(jacobian)
    unit = _finite(size)
    scales = scales_of(unit * jnp.sqrt(jnp.sum(jnp.square(jacobian), axis=0)))
    r_size, r = _normalised(linear.r)
    scaled = jacobian * (unit * tree.reciprocal(scales.lengths))[None, :]
    values, axes, slopes = normal_axes(free_columns(point, scaled), r)
    return EigenModel(axes, values, slopes, _sizes(r_size, size)), scales


def _of_curvature(
    product: Product, point: Point, scales_of: Callable[[jax.Array], _Scales], columns: int
) -> tuple[EigenModel, _Scales]:
    """The same from a matrix G in place of JᵀJ."""
    size, matrix = _normalised(dense(product, point.params, columns))
    root = jnp.sqrt(_finite(size))
    scales = scales_of(root * jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0)))
    scale = tree.reciprocal(scales.lengths)
    scaled = matrix * (root * scale)[:, None] * (root * scale)[None, :]
    values, axes = eigh(on_face(point, scaled))
    slope, gradient = _normalised(scale * tree.ravel(point.grad)[0])
    slopes = _dot(axes.T, gradient)
    return EigenModel(axes, jnp.maximum(values, 0), slopes, _sizes(slope, size)), scales


def jacobian_of(linear: Residuals, params: tree.PyTree, columns: int) -> jax.Array:
    """J as a matrix, by forward or reverse mode, whichever takes fewer passes."""
    if linear.r.size < tree.count(params):
        return dense(linear.pull, linear.r, columns)
    return dense(linear.push, params, columns).T


def _normalised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest absolute entry, and ``x`` divided by it; 0 if an entry is not finite."""
    size = tree.max_abs(x)
    return size, jnp.where(jnp.isfinite(size), x * tree.reciprocal(size), 0)


def _finite(size: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(size), size, 0)


def _sizes(slope: jax.Array, unit: jax.Array) -> jax.Array:
    """The sizes of an :class:`EigenModel`, whose matrix is scaled by D; not finite if J is not."""
    return jnp.stack([slope, jnp.where(jnp.isfinite(unit), 1, unit)])


_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def normal_axes(matrix: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S² ascending, V, and S Uᵀ r of ``matrix`` = U S Vᵀ; 0 where S is only rounding."""
    # of [K r] the triangle holds that of K, and Qᵀr beside it
    both = jnp.concatenate([matrix, r[:, None]], axis=1)
    m, n = matrix.shape
    if n <= LARGEST:
        s, axes, slopes = unless_batched(_of_one, _of_batch, both)
    else:
        s, axes, slopes = _of_few_rows(both) if m < n else _of_one(both)
    return _known(s, axes, slopes)


def _known(
    s: jax.Array, axes: jax.Array, slopes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    is_known = s > len(s) * jnp.finfo(s.dtype).eps * s[-1]
    return jnp.where(is_known, jnp.square(s), 0), axes, jnp.where(is_known, slopes, 0)


def _of_few_rows(both: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same as ``_of_one``, with zeros in place of the axes along which K is 0."""
    n = both.shape[1] - 1
    u, s, vt = jnp.linalg.svd(both[:, :-1], full_matrices=False)
    slopes, none = s * _dot(u.T, both[:, -1]), n - len(s)
    padded = jnp.pad(vt[::-1].T, ((0, 0), (none, 0)))
    return jnp.pad(s[::-1], (none, 0)), padded, jnp.pad(slopes[::-1], (none, 0))


def _of_one(both: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """S ascending, V, and S Uᵀ r."""
    triangle = _square(jnp.linalg.qr(both, mode="r"))
    u, s, vt = jnp.linalg.svd(triangle[:, :-1])
    return s[::-1], vt.T[:, ::-1], (s * _dot(u.T, triangle[:, -1]))[::-1]


def _of_batch(both: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    triangle = _square(triangle_of(both))
    images, axes = orthogonalised(triangle[:, :-1])  # K V, with columns of lengths S
    s = jnp.sqrt(jnp.sum(jnp.square(images), axis=0))
    return s, axes, _dot(images.T, triangle[:, -1])


def _square(triangle: jax.Array) -> jax.Array:
    """The first n rows of n + 1 columns."""
    n = triangle.shape[1] - 1
    return jnp.pad(triangle, ((0, max(0, n - len(triangle))), (0, 0)))[:n]


@normal_axes.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """As the eigenvectors of KᵀK, with finite derivatives for equal singular values."""
    matrix, r = primals
    d_matrix, d_r = tangents
    # the derivative needs all axes
    found = _of_one(jnp.concatenate([matrix, r[:, None]], axis=1))
    values, axes, slopes = _known(*found)
    image = _dot(matrix, axes)
    half = _dot(_dot(d_matrix, axes).T, image)
    d_values, turn = turn_of(values, half + half.T)
    d_slopes = _dot(turn.T, slopes) + _dot(axes.T, _dot(d_matrix.T, r)) + _dot(image.T, d_r)
    return (values, axes, slopes), (d_values, _dot(axes, turn), d_slopes)
