"""Trust region: a quadratic model of the objective, minimised where it is trusted."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.curvature import Curvature, Product, hessian
from gradxform.derivatives import eigh
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import (
    BelowQuarter,
    Count,
    Fraction,
    Positive,
    Size,
    checked,
    scalar,
)
from gradxform.info import diagnostics
from gradxform.second_order.newton import dense
from gradxform.second_order.steihaug import Step, cauchy_length, steihaug_step

Solver = Literal["exact", "steihaug"]
Scaling = Literal["curvature", "none"]

# along a curved valley the reduction per step is largest at a ratio of 2/3, between these two
_POOR, _GOOD = 0.5, 0.75
_GROWTH, _BOUNDARY = 2.0, 0.9  # a step within a tenth of the boundary counts as on it
_SHRINK = (0.1, 0.5)  # bounds of the factor by which a poor step is shortened
_FIRST = 0.2  # first radius of the exact solver, in units of ‖g‖/‖H‖
_SECULAR_STEPS = 20  # Newton steps on the secular equation; a handful reach rounding
_IDLE = 10  # accepted points in a row without progress until it has stalled


@diagnostics
class TrustRegionInfo(NamedTuple):
    """What the method did; the counters run over all updates."""

    accepted: jax.Array  #: points accepted, the start included
    rejected: jax.Array  #: trial points rejected
    non_finite: jax.Array  #: updates whose value, gradient or curvature was NaN or infinite
    negative_curvature: jax.Array  #: points accepted where the model curves downwards somewhere
    curvature_products: jax.Array  #: products; a dense matrix of n columns counts n
    radius: jax.Array  #: Δ within which the trial point in the loop was chosen
    ratio: jax.Array  #: ρ of the last trial, actual over predicted reduction
    stalled: jax.Array  #: the radius is too small to move the parameters, or nothing improves


class EigenModel(NamedTuple):
    """Gradient and curvature at the accepted point, each over its largest absolute entry.

    The two sizes are kept apart, so that objectives of any unit neither overflow nor underflow.
    """

    axes: tree.PyTree  #: A = D⁻¹Q, n × n, with AᵀHA = Λ, the rows of each leaf in one: (*shape, n)
    values: jax.Array  #: Λ, ascending
    slopes: jax.Array  #: Aᵀg
    grad_size: jax.Array
    curvature_size: jax.Array


class TrustRegionState(NamedTuple):
    """State of :func:`trust_region`. The loop holds the trial point x + p."""

    params: tree.PyTree  #: x, the accepted point, in at least float32
    grad: tree.PyTree  #: ∇f(x), in at least float32
    value: jax.Array  #: f(x)
    length: jax.Array  #: ‖Dp‖
    predicted: jax.Array  #: the reduction m(0) − m(p) of the model
    radius: jax.Array  #: Δ
    begin: jax.Array  #: whether the point in the loop is accepted as it is
    lowest: jax.Array  #: value accepted
    smallest: jax.Array  #: largest gradient entry accepted
    idle: jax.Array  #: points accepted in a row without progress in either
    model: Any  #: an EigenModel; with "steihaug" the largest entry of the first gradient
    info: TrustRegionInfo


@checked
def trust_region(
    solver: Solver = "exact",
    *,
    curvature: Curvature | None = None,
    scaling: Scaling = "curvature",
    initial_radius: Positive | None = None,
    max_radius: Positive | None = None,
    decrease: BelowQuarter = 1e-4,
    noise: Fraction = 0.0,
    tol: Fraction = 0.5,
    maxiter: Count = 1000,
    columns: Size = 64,
    max_size: Size = 2000,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method within a radius: it needs no line search and leaves saddles.

    The step p from the accepted point x minimises the model

    .. math::
        m(p) = f(x) + g^T p + \tfrac12 p^T H p \quad\text{within}\quad \|D p\| \le \Delta

    and the next update compares the reduction that came true with the one predicted,

    .. math::
        \rho = \frac{f(x) - f(x + p)}{m(0) - m(p)}

    The step is taken when :math:`\rho \ge \eta`. Below 1/2, Δ becomes the part of ‖Dp‖, from a
    tenth to a half, where the parabola through the two values and the slope has its minimum; above
    3/4 and at the boundary, Δ doubles. A trial that is NaN or infinite is rejected. Where rounding
    hides the difference of the values, :math:`-\tfrac12 (g + g_+)^T p` from the two gradients takes
    its place.

    **The parameters in the loop are the trial point**, so each update costs the one value and
    gradient that a training loop takes anyway, beside the curvature;
    :func:`gradxform.eval_params` gives x.

    ``"exact"`` solves for p by one eigendecomposition, of :math:`D^{-1} H D^{-1}`:
    :math:`p = -(H + \lambda D^2)^{-1} g` with λ ≥ 0 from the secular equation :math:`1 / \|D p\| =
    1 / \Delta`. Where g has no part along the most negative curvature (the *hard case*, an exact
    saddle for one) p goes along it to the boundary; negative curvature within rounding counts as
    none. The decomposition serves all trials from the same x, so a rejected one costs no curvature.
    The diagonal D lets parameters of little curvature go further:

    .. math::
        D_{ii} = \sqrt{\|H e_i\| / \max_j \|H e_j\|}

    ``"steihaug"`` takes products with H alone, and D = I: conjugate gradients that stop at the
    boundary, or go to it along a direction of negative curvature; a rejected trial repeats them up
    to the smaller radius. Directions that no gradient has a part in, it does not see: the ridge to
    a saddle is one.

    Args:
      solver: "exact" for up to ``max_size`` parameters, "steihaug" for any number.
      curvature: of ``(value_fn, params)`` to a symmetric map, such as ``gx.gauss_newton()``;
        ``None`` for ``gx.hessian()``. One that is not finite somewhere counts as zero there.
      scaling: of "exact": "curvature" for D as above, "none" for D = I, a ball.
      initial_radius: the first Δ > 0, in units of θ. ``None`` for ``0.2 ‖D⁻¹g‖ / ‖D⁻¹HD⁻¹‖`` with
        "exact" and the model's minimum along the gradient with "steihaug"; a tenth of ‖θ‖, or 1 at
        θ = 0, where these are not finite or zero.
      max_radius: largest Δ; ``None`` for no bound.
      decrease: η in [0, 1/4), the part of the predicted reduction that is enough.
      noise: relative error of the objective; at least ten units of rounding are taken.
      tol: of "steihaug": conjugate gradients end when the residual is less than
        :math:`\min(tol, \sqrt{\|g\|_\infty / \|g_0\|_\infty})\, \|g\|`, with g₀ the first gradient.
      maxiter: of "steihaug": most products of an update; never more than twice the parameters.
      columns: of "exact": how many columns of H are evaluated at once: more is faster and takes the
        memory of as many gradients.
      max_size: of "exact": most parameters n. The state keeps an n × n matrix, its rows sharded
        like the parameters; an accepted point takes n curvature products and O(n³) operations,
        these and the matrix on every device.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``, of one fixed
      objective: the full batch, not minibatches; keyword arguments named like arguments of
      ``value_fn`` are handed on to it.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, there are more
        parameters than ``max_size``, or ``update`` misses an argument.

    References:
      Lecture 7, "Newton's Method". Moré & Sorensen, "Computing a trust region step", SIAM J. Sci.
      Stat. Comput. 4:553 (1983), as Nocedal & Wright, *Numerical Optimization* (2006), eqs. 4.38
      to 4.45; differs: λ comes from the eigenvalues, to rounding, in place of a Cholesky factor
      for every λ. D: N&W §4.5 and Moré, "The Levenberg-Marquardt algorithm" (1978); differs: from
      the columns of H at x alone, in place of the largest so far. Steihaug, "The conjugate gradient
      method and trust regions in large scale optimization", SIAM J. Numer. Anal. 20:626 (1983), as
      N&W Algorithm 7.2. Sun & Nocedal, "A trust region method for noisy unconstrained
      optimization", Math. Program. 202:445 (2023), on ρ under noise; differs: gradients decide,
      where they add a term to both reductions.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    >>> gx.minimize(saddle, jnp.asarray([1.0, 0.0]), gx.trust_region(), tol=1e-3).value.round(4)
    Array(-1., dtype=float32)
    """

    def init(params: tree.PyTree) -> TrustRegionState:
        def number(x: float = 0) -> jax.Array:
            return jnp.array(scalar(x), copy=True)

        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        if solver == "exact":
            _check_size(params, max_size)
        return TrustRegionState(
            params=tree.copy(params),
            grad=tree.zeros_like(params),
            value=number(),
            length=number(),
            predicted=number(),
            radius=number(),
            begin=jnp.array(True),
            lowest=number(tree.largest()),
            smallest=number(tree.largest()),
            idle=count(),
            model=_no_model(params) if solver == "exact" else number(),
            info=TrustRegionInfo(
                accepted=count(),
                rejected=count(),
                non_finite=count(),
                negative_curvature=count(),
                curvature_products=count(),
                radius=number(),
                ratio=number(),
                stalled=jnp.array(False),
            ),
        )

    def update(
        grads: tree.PyTree,
        state: TrustRegionState,
        params: tree.PyTree = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[..., jax.typing.ArrayLike] | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, TrustRegionState]:
        params = protocol.require_params("trust_region", params, grads)
        value = protocol.check_value("value", protocol.require("trust_region", "value", value))
        value_fn = protocol.bind(protocol.require("trust_region", "value_fn", value_fn), extra_args)
        protocol.check_unmasked("trust_region", params)
        size = tree.count(grads)
        if size == 0:
            return grads, state

        # -- the trial point
        begin, info = state.begin, state.info
        finite = jnp.isfinite(value) & jnp.isfinite(tree.max_abs(grads))
        relative = jnp.maximum(scalar(noise), 10 * jnp.finfo(value.dtype).eps)
        moved = tree.map(lambda x, q: q - x, state.params, params)
        slopes = tree.vdot(state.grad, moved), tree.vdot(grads, moved)
        ratio = jnp.where(begin, 1, _ratio(state, scalar(value), slopes, relative))
        accept = finite & (begin | (ratio >= scalar(decrease)))
        radius = _next_radius(state, scalar(value), slopes[0], finite, accept, ratio)

        x = tree.select(accept, jax.tree.map(tree.promote, params), state.params)
        here = jax.tree.map(tree.promote, grads)
        g = tree.select(accept, here, state.grad)
        fx = jnp.where(accept, scalar(value), state.value)
        largest = scalar(tree.max_abs(g))
        progress = (fx < state.lowest) | (largest < 0.9 * state.smallest)
        idle = jnp.where(accept, jnp.where(progress, 0, state.idle + 1), state.idle)

        # -- the next step
        product = (curvature or hessian())(value_fn, tree.cast_like(x, params))
        model: Any = state.model
        same = functools.partial(tree.varying_like, like=g)  # the types of both branches
        products, curved = same((jnp.array(0, jnp.int32), jnp.array(True)))
        if solver == "exact":
            model, curved, products = jax.lax.cond(
                accept,
                lambda: same((*_eigen_model(product, g, columns, scaling), products + size)),
                lambda: (state.model, curved, products),
            )
        else:
            model = jnp.where(begin, largest, state.model)
        if initial_radius is not None:
            guess = scalar(initial_radius)
        elif solver == "exact":
            guess = _usable_radius(_first_radius(model), x)
        else:
            guess, products = jax.lax.cond(
                begin,
                lambda: same((_usable_radius(cauchy_length(product, g), x), products + 1)),
                lambda: (radius, products),
            )
        radius = jnp.where(begin, guess, radius)
        if max_radius is not None:
            radius = jnp.minimum(radius, scalar(max_radius))

        if solver == "exact":
            step = _exact_step(model, radius)
        else:
            most = jnp.minimum(scalar(maxiter), 2.0 * size)
            forcing = jnp.minimum(scalar(tol), tree.sqrt(tree.divide(largest, model)))
            step, curved, more = steihaug_step(product, g, radius, forcing, most)
            products = products + more

        waiting = begin & ~accept  # the first value is not finite: stay
        p = tree.scale(jnp.where(waiting, 0, 1), step.p)
        trial = tree.cast_like(tree.map(jnp.add, x, p), params)
        resting = jax.tree.map(lambda t, x: jnp.all(t == x), trial, tree.cast_like(x, params))
        stuck = ~waiting & jnp.all(jnp.stack(jax.tree.leaves(resting)))

        new_state = TrustRegionState(
            params=x,
            grad=g,
            value=fx,
            length=step.length,
            predicted=step.predicted,
            radius=radius,
            begin=waiting | stuck,
            lowest=jnp.where(accept, jnp.minimum(fx, state.lowest), state.lowest),
            smallest=jnp.where(accept & progress, largest, state.smallest),
            idle=idle,
            model=model,
            info=TrustRegionInfo(
                tree.add_count(info.accepted, accept.astype(jnp.int32)),
                tree.add_count(info.rejected, (~accept).astype(jnp.int32)),
                tree.add_count(info.non_finite, (~(finite & curved)).astype(jnp.int32)),
                tree.add_count(info.negative_curvature, (accept & step.negative).astype(jnp.int32)),
                tree.add_count(info.curvature_products, products),
                radius,
                ratio,
                stuck | (idle >= _IDLE),
            ),
        )
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        updates = tree.map(lambda _, x, p, q: (x + p) - q, grads, x, p, params)
        return updates, new_state

    return protocol.transformation(init, update)


@eval_params.register
def _(state: TrustRegionState, params: tree.PyTree) -> tree.PyTree:
    return tree.map_unmasked(lambda _, x: x, params, state.params)


# -- the trial point and the radius


def _ratio(
    state: TrustRegionState,
    value: jax.Array,
    slopes: tuple[jax.Array, jax.Array],
    relative: jax.Array,
) -> jax.Array:
    """ρ; ``slopes`` are those of the objective along the step, at its two ends."""
    noise = relative * jnp.abs(state.value)
    actual = state.value - value
    # the trapezoidal rule is exact for quadratics, and resolves what values of this size cannot
    hidden = (jnp.abs(actual) <= noise) & (state.predicted <= noise)
    actual = jnp.where(hidden, -0.5 * (slopes[0] + slopes[1]), actual)
    predicts = state.predicted > 0
    return jnp.where(predicts, actual / jnp.where(predicts, state.predicted, 1), jnp.sign(actual))


def _next_radius(
    state: TrustRegionState,
    value: jax.Array,
    slope: jax.Array,
    finite: jax.Array,
    accept: jax.Array,
    ratio: jax.Array,
) -> jax.Array:
    bend = 2 * (value - state.value - slope)
    factor = jnp.clip(jnp.where(bend == 0, _SHRINK[1], tree.divide(-slope, bend)), *_SHRINK)
    factor = jnp.where(finite, factor, _SHRINK[0])
    poor = ~accept | ~(ratio >= _POOR)
    grow = (ratio >= _GOOD) & (state.length >= _BOUNDARY * state.radius)
    kept = jnp.where(grow, _GROWTH, 1) * state.radius
    return jnp.where(poor, factor * state.length, kept)


def _usable_radius(guess: jax.Array, x: tree.PyTree) -> jax.Array:
    size = scalar(tree.max_abs(x))
    rough = jnp.where(size > 0, 0.1 * size, 1)
    return jnp.where((guess > 0) & jnp.isfinite(guess), guess, rough)


# -- the exact solver


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


def _eigen_model(
    product: Product, g: tree.PyTree, columns: int, scaling: Scaling
) -> tuple[EigenModel, jax.Array]:
    """The model, and whether its curvature was finite."""
    matrix = dense(product, g, columns)
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


def _exact_step(model: EigenModel, radius: jax.Array) -> Step:
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
    return Step(p, length, delta * larger * reduction, negative)


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
