"""Trust region: minimise a quadratic model of the objective within a radius.

Nocedal & Wright's Algorithm 4.1, for a model m of the objective f at x::

    p ← the minimum of m within ‖Dp‖ ≤ Δ
    ρ ← (f(x) − f(x + p)) / (m(0) − m(p))
    if ρ is poor:                        Δ ← a part of ‖Dp‖
    if ρ is good and ‖Dp‖ is near Δ:     Δ ← 2Δ
    if ρ ≥ η:                            x ← x + p

The loop holds the trial point x + p. An update sees f there and decides with ρ. Then it computes
the next p within the new Δ; the modules of ``subproblems`` do that.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.complex_leaves import evaluated_as_real
from gradxform.curvature import Curvature, hessian
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
from gradxform.improvement import PATIENCE, Improvement, improvement_after, no_improvement
from gradxform.info import diagnostics
from gradxform.kernels import in_one_kernel, quotients, vdots
from gradxform.leaves import map_unmasked
from gradxform.objective import bind, check_value
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, rough_radius
from gradxform.second_order.subproblems.exact import Scaling, exact
from gradxform.second_order.subproblems.steihaug import steihaug

Solver = Literal["auto", "exact", "steihaug"]

# In a curved valley the reduction per step is largest at a ratio of 2/3, between these two.
_POOR, _GOOD = 0.5, 0.75
_GROWTH, _BOUNDARY = 2.0, 0.9  # a step of at least 0.9 Δ counts as on the boundary
_SHRINK = (0.1, 0.5)  # range of the factor that shortens a poor step


@diagnostics
class TrustRegionInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    accepted: jax.Array  #: points accepted, including the start
    rejected: jax.Array  #: trial points rejected
    non_finite: jax.Array  #: updates with a NaN or infinite value, gradient or curvature
    negative_curvature: jax.Array  #: accepted points at which negative curvature was found
    curvature_products: jax.Array  #: products with the curvature; a full n × n matrix counts n
    value: jax.Array  #: f(x) at the accepted point x
    grad_norm: jax.Array  #: largest absolute entry of ∇f(x) at the accepted point
    radius: jax.Array  #: Δ for the trial point in the loop
    ratio: jax.Array  #: ρ of the last trial point: actual over predicted reduction
    expected: jax.Array  #: reduction of f predicted for the trial point in the loop
    stalled: jax.Array  #: whether Δ is too small to move θ, or ten points brought no progress


class TrustRegionState(NamedTuple):
    """State of :func:`trust_region`. The loop holds the trial point x + p."""

    params: tree.PyTree  #: x, the accepted point, in at least float32
    grad: tree.PyTree  #: ∇f(x), in at least float32
    value: jax.Array  #: f(x)
    length: jax.Array  #: ‖Dp‖, the length of the step in the loop
    predicted: jax.Array  #: m(0) − m(p), the reduction that the model predicts
    radius: jax.Array  #: Δ
    rough_radius: jax.Array  #: a fallback for the first Δ, from the size of the first parameters
    begin: jax.Array  #: whether the next point is accepted without a test
    improvement: Improvement  #: the best over the accepted points
    model: Any  #: data of the solver: an ``EigenModel`` ("exact") or ``Sizes`` ("steihaug")
    info: TrustRegionInfo


@checked
def trust_region(
    solver: Solver = "auto",
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
    """Newton's method within a radius: it needs no line search and leaves saddles.

    From the accepted point x, the step p minimises the model m within the radius Δ::

        m(p) = f(x) + gᵀp + ½ pᵀHp,   ‖Dp‖ ≤ Δ

    The next update compares the actual reduction with the predicted one::

        ρ = (f(x) − f(x + p)) / (m(0) − m(p))

    The step is accepted if ρ ≥ η. If ρ < 1/2, the radius shrinks to between 0.1 and 0.5 of ‖Dp‖;
    the factor comes from the parabola through both values and the slope. If ρ ≥ 3/4 and the step
    reached the boundary, Δ doubles. A trial point with a NaN or infinite value is rejected. If
    rounding hides the difference of the values, the reduction is computed from the two gradients as
    −½ (g + g₊)ᵀp.

    **The loop holds the trial point.** So an update costs the one value and gradient that a
    training loop computes anyway, plus the curvature. :func:`gradxform.eval_params` gives the
    accepted point x.

    ``solver="exact"`` computes p = −(H + λD²)⁻¹ g from one eigendecomposition of D⁻¹HD⁻¹, with the
    λ ≥ 0 that solves the secular equation 1 / ‖Dp‖ = 1 / Δ. In the *hard case* g has no component
    along the most negative curvature, for instance at an exact saddle; then p follows that
    direction to the boundary. Negative curvature within rounding counts as zero. A rejected trial
    point needs no new decomposition. D lets parameters with little curvature move further::

        D_ii = √(‖H e_i‖ / max_j ‖H e_j‖)

    ``solver="steihaug"`` needs only products with H, and D = I. It runs conjugate gradients (CG)
    until they reach the boundary; at negative curvature it follows that direction to the boundary.
    After a rejected trial point CG runs again with the smaller radius. It cannot see directions in
    which every gradient is zero, such as the way down from a ridge that leads to a saddle.

    Args:
      solver: ``"exact"``, ``"steihaug"``, or ``"auto"``, which takes ``"exact"`` for up to
        ``max_size`` parameters and ``"steihaug"`` for more.
      curvature: ``gx.hessian()``, ``gx.gauss_newton()``, or your own function of
        ``(value_fn, params)`` that returns a symmetric linear map; ``None`` for ``gx.hessian()``.
        A curvature that is not finite counts as zero.
      scaling: for "exact": ``"curvature"`` for D as above, ``"none"`` for D = I.
      initial_radius: the first Δ > 0, in units of θ. By default it is 0.2 ‖D⁻¹g‖ / ‖D⁻¹HD⁻¹‖ with
        "exact", and the distance to the model's minimum along −g with "steihaug". If that is zero
        or not finite, it is a tenth of the largest entry of θ, or 1 if θ = 0.
      max_radius: the largest Δ; ``None`` for no bound.
      decrease: η in [0, 1/4), the smallest ρ of an accepted step.
      noise: relative error of the objective; at least ten units of rounding are assumed.
      tol: for "steihaug", in [0, 1): CG stops at a residual of min(tol, √(‖g‖∞ / ‖g₀‖∞)) ‖g‖,
        where g₀ is the first gradient.
      maxiter: for "steihaug": largest number of products in an update. It is never more than twice
        the number of parameters.
      columns: for "exact": how many columns of H are evaluated at once. More is faster, and each
        takes the memory of a gradient.
      max_size: for "auto" and "exact": largest number of parameters n for the exact solver. Its
        state holds an n × n matrix, with rows sharded like the parameters. An accepted point takes
        n curvature products and O(n³) operations, and every device holds the full matrix meanwhile.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``. The objective
      must be the same in every update: the full batch, not minibatches. Other keyword arguments of
      ``update`` reach the arguments of ``value_fn`` of the same name.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, or there are more parameters than ``max_size`` with ``solver="exact"``.

    References:
      Lecture 7, "Newton's Method". Nocedal & Wright, *Numerical Optimization* (2006). Exact step:
      Moré & Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4:553 (1983), as
      in N&W eqs. 4.38 to 4.45. Differs: λ comes from the eigenvalues, up to rounding, instead of
      one Cholesky factor for each λ. D: N&W §4.5 and Moré, "The Levenberg-Marquardt algorithm"
      (1978). Differs: D uses the columns of H at x, not the largest so far. Steihaug: "The
      conjugate gradient method and trust regions in large scale optimization", SIAM J. Numer. Anal.
      20:626 (1983), as in N&W Algorithm 7.2. Noise: Sun & Nocedal, "A trust region method for noisy
      unconstrained optimization", Math. Program. 202:445 (2023). Differs: the gradients decide,
      while they add a term to both reductions.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    >>> gx.minimize(saddle, jnp.asarray([1.0, 0.0]), gx.trust_region(), tol=1e-3).value.round(4)
    Array(-1., dtype=float32)
    """

    def subproblem(size: int) -> Subproblem:
        if solver == "steihaug" or (solver == "auto" and size > max_size):
            return steihaug(
                initial_radius=initial_radius, max_radius=max_radius, tol=tol, maxiter=maxiter
            )
        return exact(
            initial_radius=initial_radius, scaling=scaling, columns=columns, max_size=max_size
        )

    def init(params: tree.PyTree) -> TrustRegionState:
        return TrustRegionState(
            params=tree.copy(params),
            grad=tree.zeros_like(params),
            value=_number(),
            length=_number(),
            predicted=_number(),
            radius=_number(),
            rough_radius=jnp.array(rough_radius(params), copy=True),
            begin=jnp.array(True),
            improvement=no_improvement(),
            model=subproblem(tree.count(params)).init(params),
            info=_no_info(),
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
        value = check_value("value", protocol.require("trust_region", "value", value))
        value_fn = bind(protocol.require("trust_region", "value_fn", value_fn), extra_args)
        protocol.check_unmasked("trust_region", params)
        if tree.count(grads) == 0:
            return grads, state
        solve = subproblem(tree.count(grads))

        # accept or reject the trial point
        trial = _Trial(params, grads, value, scalar(tree.max_abs(grads)))
        verdict = _verdict(state, trial, scalar(decrease), scalar(noise))
        accept, radius = verdict.accept, verdict.radius
        x = tree.select(accept, jax.tree.map(tree.promote, params), state.params)
        g = tree.select(accept, jax.tree.map(tree.promote, grads), state.grad)
        fx = jnp.where(accept, scalar(value), state.value)
        improvement = improvement_after(state.improvement, accept, fx, trial.largest)

        # the model at the accepted point, and its radius
        linearise = functools.partial(curvature or hessian(), value_fn, tree.cast_like(x, params))
        point = Point(
            params=x,
            grad=g,
            linearise=linearise,
            is_new=accept,
            is_first=accept & state.begin,
            grad_size=trial.largest,
            rough_radius=state.rough_radius,
        )
        prepared = solve.prepare(point, state.model)
        radius = jnp.where(state.begin, prepared.radius, radius)
        if max_radius is not None:
            radius = jnp.minimum(radius, scalar(max_radius))

        # the next trial point
        step = solve.step(point, prepared.model, radius)
        waiting = state.begin & ~accept  # the first value is not finite, so do not move
        p = tree.scale(jnp.where(waiting, 0, 1), step.p)
        stuck = ~waiting & _is_zero_step(x, p, params)
        new_state = TrustRegionState(
            params=x,
            grad=g,
            value=fx,
            length=step.length,
            predicted=step.predicted,
            radius=step.radius,
            rough_radius=state.rough_radius,
            begin=waiting | stuck,
            improvement=improvement,
            model=prepared.model,
            info=_reported(state.info, trial, verdict, prepared, step)._replace(
                radius=step.radius, stalled=stuck | (improvement.idle >= PATIENCE)
            ),
        )
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        return tree.map(lambda _, x, p, q: (x + p) - q, grads, x, p, params), new_state

    return protocol.transformation(init, update)


@eval_params.register
@evaluated_as_real
def _(state: TrustRegionState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda _, x: x, params, state.params)


def _number() -> jax.Array:
    return jnp.array(scalar(0), copy=True)


def _no_info() -> TrustRegionInfo:
    counts = (jnp.array(0, jnp.int32) for _ in range(5))
    return TrustRegionInfo(*counts, *(_number() for _ in range(5)), stalled=jnp.array(False))


# -- the trial point and the radius


class _Trial(NamedTuple):
    """The point in the loop."""

    params: tree.PyTree
    grad: tree.PyTree
    value: jax.Array
    largest: jax.Array  # largest absolute entry of the gradient


class _Verdict(NamedTuple):
    """What a trial point leads to."""

    accept: jax.Array  # whether it becomes the accepted point
    finite: jax.Array  # whether its value and gradient are finite
    ratio: jax.Array  # ρ; 1 if the point is accepted without a test
    radius: jax.Array  # Δ for the next step


def _verdict(
    state: TrustRegionState, trial: _Trial, decrease: jax.Array, noise: jax.Array
) -> _Verdict:
    finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.largest)
    p = tree.map(lambda x, q: q - x, state.params, trial.params)
    slope, slope_there = vdots((state.grad, p), (trial.grad, p))
    actual = state.value - scalar(trial.value)
    # Where rounding hides the reduction, take the trapezoidal rule, which is exact for quadratics.
    relative = jnp.maximum(noise, 10 * jnp.finfo(trial.value.dtype).eps)
    rounding = relative * jnp.abs(state.value)
    hidden = (jnp.abs(actual) <= rounding) & (state.predicted <= rounding)
    actual = jnp.where(hidden, -0.5 * (slope + slope_there), actual)
    # the minimum of the parabola through both values and the slope, as a part of the step
    bend = 2 * (scalar(trial.value) - state.value - slope)
    ratio, part = quotients((actual, state.predicted), (-slope, bend))
    ratio = jnp.where(state.predicted > 0, ratio, jnp.sign(actual))
    ratio = jnp.where(state.begin, 1, ratio)
    accept = finite & (state.begin | (ratio >= decrease))
    part = jnp.clip(jnp.where(bend == 0, _SHRINK[1], part), *_SHRINK)
    part = jnp.where(finite, part, _SHRINK[0])
    poor = ~accept | ~(ratio >= _POOR)
    grow = (ratio >= _GOOD) & (state.length >= _BOUNDARY * state.radius)
    kept = jnp.where(grow, _GROWTH, 1) * state.radius
    radius = jnp.where(poor, part * state.length, kept)
    return in_one_kernel(_Verdict(accept, finite, ratio, radius))


def _is_zero_step(x: tree.PyTree, p: tree.PyTree, params: tree.PyTree) -> jax.Array:
    """Whether x + p equals x in the dtypes of the parameters."""
    moved, x = (tree.cast_like(y, params) for y in (tree.map(jnp.add, x, p), x))
    return jnp.all(
        jnp.stack([jnp.all(a == b) for a, b in zip(*map(jax.tree.leaves, (moved, x)), strict=True)])
    )


def _reported(
    info: TrustRegionInfo, trial: _Trial, verdict: _Verdict, prepared: Prepared, step: Step
) -> TrustRegionInfo:
    accept, finite = verdict.accept, verdict.finite & prepared.finite & step.finite
    return TrustRegionInfo(
        accepted=tree.add_count(info.accepted, accept.astype(jnp.int32)),
        rejected=tree.add_count(info.rejected, (~accept).astype(jnp.int32)),
        non_finite=tree.add_count(info.non_finite, (~finite).astype(jnp.int32)),
        negative_curvature=tree.add_count(
            info.negative_curvature, (accept & step.negative).astype(jnp.int32)
        ),
        curvature_products=tree.add_count(
            info.curvature_products, prepared.products + step.products
        ),
        value=jnp.where(accept, scalar(trial.value), info.value),
        grad_norm=jnp.where(accept, trial.largest, info.grad_norm),
        radius=info.radius,
        ratio=verdict.ratio,
        expected=step.predicted,
        stalled=info.stalled,
    )
