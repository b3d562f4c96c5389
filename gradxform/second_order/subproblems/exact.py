"""The exact step of a trust region, from the eigenvalues of the curvature.

Moré and Sorensen's step within ‖Dp‖ ≤ Δ, with D⁻¹HD⁻¹ = QΛQᵀ, A = D⁻¹Q and b = Aᵀg::

    p = A u,    uᵢ = −bᵢ / (Λᵢ + λ),    λ ≥ max(0, −Λ₁) the least for which ‖u‖ ≤ Δ

λ solves the secular equation 1/‖u(λ)‖ = 1/Δ by Newton's method. In the hard case, where λ = −Λ₁
leaves ‖u‖ < Δ, the step is extended along the first axis to the boundary.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.derivatives import eigh
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import quotients, vdots
from gradxform.rows import identity_rows, rows_like
from gradxform.second_order.newton import dense
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius
from gradxform.second_order.subproblems.faces import on_face
from gradxform.sharding import varying_like

Scaling = Literal["curvature", "none"]

_FIRST = 0.2  # the first radius, in units of ‖g‖/‖H‖
_SECULAR_STEPS = 20  # Newton steps on the secular equation; a handful is usually enough


class EigenModel(NamedTuple):
    """Gradient and curvature at the accepted point, each divided by its largest absolute entry.

    The two divisors are stored in ``sizes``, so objectives in any unit neither overflow nor
    underflow.
    """

    axes: tree.PyTree  #: A = D⁻¹Q, n × n, with AᵀHA = Λ; for each leaf an array (*shape, n)
    values: jax.Array  #: Λ, the eigenvalues, ascending; 0 if negative only by rounding
    slopes: jax.Array  #: Aᵀg, the gradient along the axes
    sizes: jax.Array  #: largest absolute entries of g and of H


def exact(
    *, initial_radius: Scalar | None, scaling: Scaling, columns: int, max_size: int
) -> Subproblem:
    """Moré and Sorensen's step, with the arguments of ``trust_region``."""

    def init(params: tree.PyTree) -> EigenModel:
        _check_size(params, max_size)
        return _no_model(params)

    def prepare(point: Point, model: EigenModel) -> Prepared:
        def made() -> EigenModel:  # both branches need the same types
            return varying_like(_eigen_model(point, columns, scaling), point.grad)

        model = jax.lax.cond(point.is_new, made, lambda: model)
        finite = jnp.isfinite(model.sizes[1])
        products = jnp.where(point.is_new, jnp.int32(tree.count(point.grad)), 0)
        if initial_radius is None:
            radius = usable_radius(_first_radius(model), point.rough_radius)
        else:
            radius = scalar(initial_radius)
        return Prepared(model, radius, products, finite)

    def step(point: Point, model: EigenModel, radius: jax.Array) -> Step:
        return exact_step(model, radius)

    return Subproblem(init, prepare, step)


def _check_size(params: tree.PyTree, max_size: int) -> None:
    size = tree.count(params)
    if size > max_size:
        raise ValueError(
            f"trust_region(max_size={max_size}): there are {size} parameters, and every accepted "
            f'point takes the eigenvalues of a {size} × {size} matrix: use solver="steihaug", '
            "which needs only products with the matrix, or raise max_size"
        )


def _no_model(params: tree.PyTree) -> EigenModel:
    zero, _ = tree.ravel(tree.zeros_like(params))
    return EigenModel(
        axes=identity_rows(params),
        values=jnp.zeros_like(zero),
        slopes=zero,
        sizes=jnp.zeros(2, zero.dtype),
    )


def _matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _eigen_model(point: Point, columns: int, scaling: Scaling) -> EigenModel:
    """The model. If the curvature is not finite, the model has zero curvature."""
    matrix = dense(point.linearise(), point.grad, columns)
    curvature_size = tree.max_abs(matrix)
    unit = tree.reciprocal(curvature_size)
    matrix = jnp.where(jnp.isfinite(curvature_size), (matrix / 2 + matrix.T / 2) * unit, 0)
    gradient, _ = tree.ravel(point.grad)
    grad_size = point.grad_size.astype(gradient.dtype)
    if scaling == "curvature":
        inverse = _inverse_scales(matrix)
        values, axes = eigenvalues(on_face(point, matrix * inverse[:, None] * inverse[None, :]))
        axes = axes * inverse[:, None]
    else:
        values, axes = eigenvalues(on_face(point, matrix))
    slopes = _matvec(axes.T, gradient * tree.reciprocal(grad_size))
    axes = rows_like(axes, point.grad)
    return EigenModel(axes, values, slopes, jnp.stack([grad_size, curvature_size]))


def eigenvalues(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors; an eigenvalue is 0 if it is negative only by rounding."""
    values, axes = eigh(matrix)
    rounding = 10 * jnp.finfo(values.dtype).eps * _largest(values)
    return jnp.where((values < 0) & (values >= -rounding), 0, values), axes


def _inverse_scales(matrix: jax.Array) -> jax.Array:
    """The diagonal of D⁻¹. No entry of D⁻¹HD⁻¹ exceeds the norm of the largest column of H."""
    squares = jnp.sum(jnp.square(matrix), axis=0)
    largest = jnp.max(squares)
    safe = jnp.where(largest > 0, largest, 1)
    ratio = safe / jnp.maximum(squares, float(jnp.finfo(matrix.dtype).eps) ** 4 * safe)
    # the roots come last, so that one kernel computes everything
    return jnp.sqrt(jnp.sqrt(jnp.where(largest > 0, ratio, 1)))


def _first_radius(model: EigenModel) -> jax.Array:
    """A part of ‖D⁻¹g‖/‖D⁻¹HD⁻¹‖, the shortest distance at which the gradient may vanish."""
    units = tree.divide(*sizes_of(model))
    norm = tree.norm(model.slopes)
    return scalar(_FIRST * units * tree.divide(norm, _largest(model.values)))


def sizes_of(model: EigenModel) -> tuple[jax.Array, jax.Array]:
    """The sizes of gradient and curvature; 0 for a curvature that is not finite."""
    grad, curvature = model.sizes
    return grad, jnp.where(jnp.isfinite(curvature), curvature, 0)


def _largest(values: jax.Array) -> jax.Array:
    """The largest absolute value of an ascending vector."""
    return jnp.maximum(-values[0], values[-1])


def exact_step(model: EigenModel, radius: jax.Array) -> Step:
    """Moré & Sorensen's step within the radius."""
    step = step_along(model.slopes, model.values, sizes_of(model), radius)
    return step._replace(p=jax.tree.map(lambda rows: _matvec(rows, step.p), model.axes))


def step_along(
    slopes: jax.Array, values: jax.Array, sizes: tuple[jax.Array, jax.Array], radius: jax.Array
) -> Step:
    """The step in the coordinates of the axes: the minimum of bᵀu + ½ Σ cᵢuᵢ² in a ball.

    The cᵢ ascend. They are stored as the first, ``lowest``, and the differences ``above`` it.
    """
    delta = radius.astype(values.dtype)
    # the linear and the quadratic term at the boundary, divided by the larger one
    linear, curvature = sizes
    quadratic = curvature * delta
    larger = jnp.maximum(linear, quadratic)
    slope, bend = quotients((linear, larger), (quadratic, larger))
    b = slope * slopes
    lowest, above = bend * values[0], bend * (values - values[0])
    negative = lowest < 0
    u, shift = _secular_solution(b, above, jnp.maximum(lowest, 0))

    # With (H + λD²)p = −g the reduction is ½ pᵀ(H + λD²)p + ½ λ‖Dp‖², which cannot cancel.
    weights = above + shift + (shift - lowest)
    square, reduction = _sums(u, weights * u)

    # the hard case: extend the step along the lowest curvature to the boundary
    missing = jnp.where(negative, jnp.maximum(1 - square, 0), 0)
    sign = jnp.where(jnp.where(u[0] != 0, u[0], -b[0]) < 0, -1, 1)
    filled = sign * tree.sqrt(jnp.where(missing > 0, u[0] ** 2 + missing, 0))
    u = jnp.where((jnp.arange(len(u)) == 0) & (missing > 0), filled, u)
    reduction = 0.5 * (reduction + (shift + (shift - lowest)) * missing)
    none, yes = jnp.array(0, jnp.int32), jnp.array(True)
    length = delta * tree.sqrt(square + missing)
    return Step(delta * u, length, radius, delta * larger * reduction, negative, none, yes)


def _sums(u: jax.Array, weighted: jax.Array) -> list[jax.Array]:
    return [total.astype(u.dtype) for total in vdots((u, u), (u, weighted))]


def _secular_solution(
    b: jax.Array, above: jax.Array, least: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """u = −b/(above + μ) with the smallest μ ≥ ``least`` that gives ‖u‖ ≤ 1, and μ.

    μ = λ + λ₁ is measured from the lowest eigenvalue, so it stays accurate near the hard case.
    """

    def at(shift: jax.Array) -> jax.Array:
        return -tree.divide(b, above + shift)

    def newton(_: int, shift: jax.Array) -> jax.Array:
        u = at(shift)
        square, steepness = _sums(u, tree.divide(u, above + shift))
        # N&W eq. 4.44; started from below, Newton's method never overshoots
        step = tree.divide(square, steepness) * (tree.sqrt(square) - 1)
        return jnp.maximum(shift, shift + step)

    start = jnp.maximum(least, jnp.max(jnp.abs(b) - above))  # no entry of u is larger than 1
    shift = jax.lax.fori_loop(0, _SECULAR_STEPS, newton, start)
    return at(shift), shift
