r"""The step of a trust region from the eigenvalues of the curvature, to rounding.

Moré and Sorensen's step within ‖Dp‖ ≤ Δ, with D⁻¹HD⁻¹ = QΛQᵀ, A = D⁻¹Q and b = Aᵀg::

    p = A u,    uᵢ = −bᵢ / (Λᵢ + λ),    λ ≥ max(0, −Λ₁) the least for which ‖u‖ ≤ Δ

λ solves the secular equation 1/‖u(λ)‖ = 1/Δ by Newton's method. In the hard case, where λ = −Λ₁
leaves ‖u‖ < Δ, the step goes on along the first axis to the boundary.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.derivatives import eigh
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order.newton import dense
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, usable_radius

Scaling = Literal["curvature", "none"]

_FIRST = 0.2  # first radius, in units of ‖g‖/‖H‖
_SECULAR_STEPS = 20  # Newton steps on the secular equation; a handful reach rounding


class EigenModel(NamedTuple):
    """Gradient and curvature at the accepted point, each over its largest absolute entry.

    The two sizes are kept apart, so that objectives of any unit neither overflow nor underflow.
    """

    axes: tree.PyTree  #: A = D⁻¹Q, n × n, with AᵀHA = Λ, the rows of each leaf in one: (*shape, n)
    values: jax.Array  #: Λ, ascending
    slopes: jax.Array  #: Aᵀg
    grad_size: jax.Array
    curvature_size: jax.Array


def exact(
    *, initial_radius: Scalar | None, scaling: Scaling, columns: int, max_size: int
) -> Subproblem:
    """Of at most ``max_size`` parameters; the arguments are those of ``trust_region``."""

    def init(params: tree.PyTree) -> EigenModel:
        _check_size(params, max_size)
        return _no_model(params)

    def prepare(point: Point, model: EigenModel) -> Prepared:
        def mark(x: tree.PyTree) -> tree.PyTree:  # both branches need the same types
            return tree.varying_like(x, point.grad)

        none, yes = mark((jnp.array(0, jnp.int32), jnp.array(True)))
        model, finite, products = jax.lax.cond(
            point.is_new,
            lambda: mark((*_eigen_model(point, columns, scaling), none + tree.count(point.grad))),
            lambda: (model, yes, none),
        )
        if initial_radius is not None:
            return Prepared(model, scalar(initial_radius), products, finite)
        return Prepared(model, usable_radius(_first_radius(model), point.params), products, finite)

    def step(point: Point, model: EigenModel, radius: jax.Array) -> Step:
        return exact_step(model, radius)

    return Subproblem(init, prepare, step)


def _check_size(params: tree.PyTree, max_size: int) -> None:
    size = tree.count(params)
    if size > max_size:
        raise ValueError(
            f"trust_region(max_size={max_size}): there are {size} parameters, and every accepted "
            f'point takes the eigenvalues of a {size} × {size} matrix: use solver="steihaug", '
            "which takes products with it alone, or raise max_size"
        )


def _no_model(params: tree.PyTree) -> EigenModel:
    zero, _ = tree.ravel(tree.zeros_like(params))
    return EigenModel(
        axes=tree.identity_rows(params),
        values=jnp.zeros_like(zero),
        slopes=zero,
        grad_size=jnp.zeros((), zero.dtype),
        curvature_size=jnp.zeros((), zero.dtype),
    )


def _matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _eigen_model(point: Point, columns: int, scaling: Scaling) -> tuple[EigenModel, jax.Array]:
    """The model, and whether its curvature was finite."""
    g = point.grad
    matrix = dense(point.product, g, columns)
    finite = jnp.isfinite(matrix).all()
    matrix = jnp.where(finite, matrix / 2 + matrix.T / 2, 0)
    gradient, _ = tree.ravel(g)
    curvature_size, grad_size = tree.max_abs(matrix), tree.max_abs(gradient)
    matrix = matrix / jnp.where(curvature_size > 0, curvature_size, 1)
    scales = _scales(matrix) if scaling == "curvature" else jnp.ones_like(gradient)
    values, axes = eigh(matrix / scales[:, None] / scales[None, :])
    axes = axes / scales[:, None]
    slopes = _matvec(axes.T, gradient / jnp.where(grad_size > 0, grad_size, 1))
    model = EigenModel(tree.rows_like(axes, g), values, slopes, grad_size, curvature_size)
    return model, finite


def _scales(matrix: jax.Array) -> jax.Array:
    """The diagonal of D. By it no entry of D⁻¹HD⁻¹ is larger than the largest column of H."""
    columns = tree.sqrt(jnp.sum(jnp.square(matrix), axis=0))
    largest = jnp.max(columns)
    scales = tree.sqrt(columns / jnp.where(largest > 0, largest, 1))
    return jnp.where(largest > 0, jnp.maximum(scales, jnp.finfo(matrix.dtype).eps), 1)


def _first_radius(model: EigenModel) -> jax.Array:
    """A part of ‖D⁻¹g‖/‖D⁻¹HD⁻¹‖, the shortest step to where the gradient may vanish."""
    units = tree.divide(model.grad_size, model.curvature_size)
    norm = tree.norm(model.slopes)
    return scalar(_FIRST * units * tree.divide(norm, jnp.max(jnp.abs(model.values))))


def exact_step(model: EigenModel, radius: jax.Array) -> Step:
    """Moré & Sorensen's step along the axes, as bᵀu + ½ Σ cᵢuᵢ² within the unit ball."""
    delta = radius.astype(model.values.dtype)
    # the linear and the quadratic term at the boundary, over the larger of them
    linear, quadratic = model.grad_size, model.curvature_size * delta
    larger = jnp.maximum(linear, quadratic)
    b = model.slopes * tree.divide(linear, larger)
    c = model.values * tree.divide(quadratic, larger)
    rounding = 10 * jnp.finfo(c.dtype).eps * jnp.max(jnp.abs(c))
    c = jnp.where((c < 0) & (c >= -rounding), 0, c)
    lowest, above = c[0], c - c[0]
    u, shift = _secular_solution(b, above, jnp.maximum(lowest, 0))

    # the hard case: what is missing to the boundary is filled along the lowest curvature
    negative = lowest < 0
    missing = jnp.where(negative, jnp.maximum(1 - u @ u, 0), 0)
    sign = jnp.where(jnp.where(u[0] != 0, u[0], -b[0]) < 0, -1, 1)
    filled = sign * tree.sqrt(jnp.where(missing > 0, u[0] ** 2 + missing, 0))
    u = u.at[0].set(jnp.where(missing > 0, filled, u[0]))

    # by (H + λD²)p = −g the reduction is ½ pᵀ(H + λD²)p + ½ λ‖Dp‖², a sum without cancellation
    reduction = 0.5 * jnp.sum((above + shift + (shift - lowest)) * u**2)
    length = delta * tree.norm(u)
    p = jax.tree.map(lambda rows: delta * _matvec(rows, u), model.axes)
    none, yes = jnp.array(0, jnp.int32), jnp.array(True)
    return Step(p, length, delta * larger * reduction, negative, none, yes)


def _secular_solution(
    b: jax.Array, above: jax.Array, least: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """u = −b/(above + μ) with the least μ ≥ ``least`` for which ‖u‖ ≤ 1, and μ.

    μ = λ + λ₁ counts from the lowest eigenvalue, so that it keeps its digits near the hard case.
    """

    def at(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = -tree.divide(b, above + shift)
        return u, jnp.sum(tree.divide(u**2, above + shift))

    def newton(_: int, shift: jax.Array) -> jax.Array:
        u, steepness = at(shift)
        norm = tree.norm(u)
        # N&W eq. 4.44; from below, where it starts, Newton's method never overshoots
        return jnp.maximum(shift, shift + tree.divide(norm**2, steepness) * (norm - 1))

    start = jnp.maximum(least, jnp.max(jnp.abs(b) - above))  # no entry of u is larger than 1
    shift = jax.lax.fori_loop(0, _SECULAR_STEPS, newton, start)
    return at(shift)[0], shift
