"""The loop of a trust region, whatever its model; the modules of ``subproblems`` compute the step.

See :mod:`gradxform.second_order.trust_region` for the algorithm.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.bounds import (
    Bounds,
    Box,
    box,
    check_bounds,
    landed,
    on_bounds,
    project,
    projected_gradient,
    updates_to,
)
from gradxform.complex_leaves import evaluated_as_real
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import Scalar, scalar
from gradxform.improvement import PATIENCE, Improvement, improvement_after, no_improvement
from gradxform.info import diagnostics
from gradxform.kernels import in_one_kernel, quotients, vdots
from gradxform.leaves import map_unmasked
from gradxform.objective import bind, check_value
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, rough_radius

_GOOD = 0.75  # a ratio beyond it lets the radius grow
_GROWTH, _BOUNDARY = 2.0, 0.9  # a step of at least 0.9 Δ counts as on the boundary
_SHRINK = (0.1, 0.5)  # range of the factor that shortens a poor step
_NOISE = 10  # values may differ by so many times the reduction that rounding hides


class Rules(NamedTuple):
    """When a step is accepted, and what becomes of the radius."""

    decrease: Scalar  #: η, the smallest ratio ρ of an accepted step
    noise: Scalar  #: relative error of the objective
    poor: float  #: a ratio below it shrinks the radius
    max_radius: Scalar | None = None  #: the largest radius


@diagnostics
class TrustRegionInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    accepted: jax.Array  #: points accepted, including the start
    rejected: jax.Array  #: trial points rejected
    non_finite: jax.Array  #: updates with a NaN or infinite value, gradient or curvature
    negative_curvature: jax.Array  #: accepted points at which negative curvature was found
    curvature_products: jax.Array  #: products with the curvature; a full n × n matrix counts n
    value: jax.Array  #: f(x) at the accepted point x
    grad_norm: jax.Array  #: largest absolute entry of the (projected) gradient at that point
    radius: jax.Array  #: Δ for the trial point in the loop
    ratio: jax.Array  #: ρ of the last trial point: actual over predicted reduction
    expected: jax.Array  #: reduction of f predicted for the trial point in the loop
    stalled: jax.Array  #: whether Δ is too small to move θ, or ten points brought no progress


class TrustRegionState(NamedTuple):
    """State of :func:`trust_region` and :func:`levenberg_marquardt`.

    The loop holds the trial point x + p.
    """

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
    box: Box | tuple[()]  #: the bounds, like the parameters; () without bounds
    info: TrustRegionInfo


def region(
    method: str,
    linearise: Callable[..., Any],
    subproblem: Callable[[tree.PyTree], Subproblem],
    rules: Rules,
    info: Callable[[], Any] | None = None,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A trust region as a transformation, with errors that name ``method``.

    ``linearise(value_fn, params)`` is what a subproblem needs of the objective at a point, and
    ``subproblem(params)`` is the solver for such parameters. ``info()`` makes the first
    diagnostics, with the fields of :class:`TrustRegionInfo` and others; None for these alone. With
    ``bounds`` the solver keeps x + p within the box of its :class:`Point`.
    """
    if bounds is not None:
        check_bounds(method, bounds)

    def init(params: tree.PyTree) -> TrustRegionState:
        within = () if bounds is None else box(method, bounds, params)
        if within:
            params = project(within, params)
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
            model=subproblem(params).init(params),
            box=within,
            info=(info or no_info)(),
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
        params = protocol.require_params(method, params, grads)
        value = check_value("value", protocol.require(method, "value", value))
        value_fn = bind(protocol.require(method, "value_fn", value_fn), extra_args)
        protocol.check_unmasked(method, params)
        if tree.count(grads) == 0:
            return grads, state
        solve = subproblem(grads)

        # accept or reject the trial point
        trial = _trial(state, params, grads, value)
        verdict = _verdict(state, trial, rules)
        accept = verdict.accept
        x = tree.select(accept, jax.tree.map(tree.promote, trial.params), state.params)
        g = tree.select(accept, jax.tree.map(tree.promote, grads), state.grad)
        fx = jnp.where(accept, scalar(value), state.value)
        improvement = improvement_after(state.improvement, accept, fx, trial.largest)

        # the model at the accepted point, and its radius
        linear = functools.partial(linearise, value_fn, tree.cast_like(x, params))
        point = _point(state, trial, accept, x, g, linear)
        prepared = solve.prepare(point, state.model)
        radius = jnp.where(state.begin, prepared.radius, verdict.radius)

        # the next trial point
        step = solve.step(point, prepared.model, _limited(radius, rules.max_radius))
        waiting = state.begin & ~accept  # the first value is not finite, so do not move
        p = tree.scale(jnp.where(waiting, 0, 1), step.p)
        target = landed(point.box, x, p) if point.box else tree.map(jnp.add, x, p)
        stuck = ~waiting & _are_equal(target, x, params)
        in_vain = _is_in_vain(state, trial, accept, step, rules)
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
            box=state.box,
            info=_reported(state.info, trial, verdict, prepared, step)._replace(
                stalled=stuck | (improvement.idle >= PATIENCE) | in_vain
            ),
        )
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        if state.box:
            return tree.cast_like(updates_to(state.box, target, params), grads), new_state
        return tree.map(lambda _, x, p, q: (x + p) - q, grads, x, p, params), new_state

    return protocol.transformation(init, update)


@eval_params.register
@evaluated_as_real
def _(state: TrustRegionState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda _, x: x, params, state.params)


def _limited(radius: jax.Array, most: Scalar | None) -> jax.Array:
    return radius if most is None else jnp.minimum(radius, scalar(most))


def _number() -> jax.Array:
    return jnp.array(scalar(0), copy=True)


def no_info() -> TrustRegionInfo:
    """The diagnostics before the first update."""
    counts = (jnp.array(0, jnp.int32) for _ in range(5))
    return TrustRegionInfo(*counts, *(_number() for _ in range(5)), stalled=jnp.array(False))


# -- the trial point and the radius


class _Trial(NamedTuple):
    """The point in the loop."""

    params: tree.PyTree
    grad: tree.PyTree
    value: jax.Array
    largest: jax.Array  # largest absolute entry of the gradient


def _trial(
    state: TrustRegionState, params: tree.PyTree, grads: tree.PyTree, value: jax.Array
) -> _Trial:
    """The trial point; with bounds, its value is infinite if it is outside."""
    size = tree.max_abs(grads)
    if not state.box:
        return _Trial(params, grads, value, scalar(size))
    x = on_bounds(state.box, state.params, params)
    outside = tree.max_abs(jax.tree.map(jnp.subtract, project(state.box, x), x)) > 0
    value = jnp.where(outside | ~jnp.isfinite(size), jnp.inf, value)
    free = projected_gradient(_wide(state.box), jax.tree.map(tree.promote, x), grads)
    return _Trial(x, grads, value, scalar(tree.max_abs(free)))


def _wide(box: Box | tuple[()]) -> Any:
    """The bounds in at least float32."""
    return Box(*(jax.tree.map(tree.promote, side) for side in box)) if box else ()


def _point(
    state: TrustRegionState,
    trial: _Trial,
    accept: jax.Array,
    x: tree.PyTree,
    g: tree.PyTree,
    linearise: Callable[[], Any],
) -> Point:
    """The accepted point x with the gradient g, for the subproblem."""
    within = _wide(state.box)
    return Point(
        params=x,
        grad=projected_gradient(within, x, g) if within else g,
        linearise=linearise,
        is_new=accept,
        is_first=accept & state.begin,
        grad_size=trial.largest,
        rough_radius=state.rough_radius,
        box=within,
    )


class _Verdict(NamedTuple):
    """What a trial point leads to."""

    accept: jax.Array  # whether it becomes the accepted point
    finite: jax.Array  # whether its value and gradient are finite
    ratio: jax.Array  # ρ; 1 if the point is accepted without a test
    radius: jax.Array  # Δ for the next step


def _verdict(state: TrustRegionState, trial: _Trial, rules: Rules) -> _Verdict:
    finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.largest)
    p = tree.map(lambda x, q: q - x, state.params, trial.params)
    slope, slope_there = vdots((state.grad, p), (trial.grad, p))
    actual = state.value - scalar(trial.value)
    # Where rounding hides the reduction, take the trapezoidal rule, which is exact for quadratics.
    rounding = _rounding(state, trial, rules)
    hidden = (jnp.abs(actual) <= rounding) & (state.predicted <= rounding)
    actual = jnp.where(hidden, -0.5 * (slope + slope_there), actual)
    # the minimum of the parabola through both values and the slope, as a part of the step
    bend = 2 * (scalar(trial.value) - state.value - slope)
    ratio, part = quotients((actual, state.predicted), (-slope, bend))
    ratio = jnp.where(state.predicted > 0, ratio, jnp.sign(actual))
    ratio = jnp.where(state.begin, 1, ratio)
    accept = finite & (state.begin | (ratio >= scalar(rules.decrease)))
    part = jnp.clip(jnp.where(bend == 0, _SHRINK[1], part), *_SHRINK)
    part = jnp.where(finite, part, _SHRINK[0])
    poor = ~accept | ~(ratio >= rules.poor)
    grow = (ratio >= _GOOD) & (state.length >= _BOUNDARY * state.radius)
    kept = jnp.where(grow, _GROWTH, 1) * state.radius
    radius = jnp.where(poor, part * state.length, kept)
    return in_one_kernel(_Verdict(accept, finite, ratio, radius))


def _rounding(state: TrustRegionState, trial: _Trial, rules: Rules) -> jax.Array:
    """The largest reduction that rounding of the values hides."""
    relative = jnp.maximum(scalar(rules.noise), 10 * jnp.finfo(trial.value.dtype).eps)
    return relative * jnp.abs(state.value)


def _is_in_vain(
    state: TrustRegionState, trial: _Trial, accept: jax.Array, step: Step, rules: Rules
) -> jax.Array:
    """Whether rounding hides the reductions by the rejected step and by the next full one.

    Shorter steps would follow, with reductions that no value can show.
    """
    if step.full is None:
        return jnp.array(False)
    rounding = _rounding(state, trial, rules)
    is_hidden = jnp.maximum(state.predicted, step.full.predicted) <= rounding
    change = jnp.abs(state.value - scalar(trial.value))
    return ~accept & is_hidden & (change <= _NOISE * rounding)


def _are_equal(moved: tree.PyTree, x: tree.PyTree, params: tree.PyTree) -> jax.Array:
    """Whether two trees are equal in the dtypes of the parameters."""
    moved, x = (tree.cast_like(y, params) for y in (moved, x))
    return jnp.all(
        jnp.stack([jnp.all(a == b) for a, b in zip(*map(jax.tree.leaves, (moved, x)), strict=True)])
    )


def _reported(info: Any, trial: _Trial, verdict: _Verdict, prepared: Prepared, step: Step) -> Any:
    full = {}
    if step.full is not None:
        full = {"expected": step.full.predicted, "relative_step": step.full.relative}
    accept, finite = verdict.accept, verdict.finite & prepared.finite & step.finite
    return info._replace(
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
        radius=step.radius,
        ratio=verdict.ratio,
        **{"expected": step.predicted, **full},
    )
