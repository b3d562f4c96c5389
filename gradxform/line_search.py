"""A line search as a transformation: each update takes one value and one gradient.

With φ(t) = f(x + t d), after Hager & Zhang (2005), §4, and Nocedal & Wright (2006), §3.5::

    repeat
        d ← the direction of the method at x, or −∇f(x) if d does not descend
        t ← the first trial; the bracket is [0, ∞)
        until φ(t) is low enough and φ'(t) is flat enough     (Wolfe conditions)
            if φ rises at t, the bracket ends at t; if φ falls, it begins at t
            t ← a point inside the bracket, or farther out if the bracket has no end
        x ← x + t d

An update sees one trial point x + t d, with its value and gradient. So it runs one turn of the
inner loop, or it accepts the point and begins the next search. :mod:`gradxform.section` does the
arithmetic of the bracket.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.bounds import Bounds, Box, box, landed, project, updates_to
from gradxform.complex_leaves import evaluated_as_real
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import BelowHalf, Count, Fraction, checked, scalar
from gradxform.improvement import PATIENCE, Improvement, improvement_after, no_improvement
from gradxform.info import carry_totals, diagnostics
from gradxform.kernels import in_one_kernel
from gradxform.leaves import has_holes, map_unmasked
from gradxform.objective import check_value
from gradxform.protocol import require, require_params, transformation
from gradxform.search_start import begin, begin_within, descends, free_gradient, inside_only
from gradxform.section import (
    Point,
    Rules,
    Section,
    Trial,
    Verdict,
    is_finite,
    judge,
    no_section,
)
from gradxform.sharding import check_whole, sharded_like


@diagnostics
class LineSearchInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    accepted: jax.Array  #: points accepted, including the start
    resets: jax.Array  #: searches that restarted along the negative gradient
    non_finite: jax.Array  #: trial points whose value or slope was NaN or infinite
    step_length: jax.Array  #: t of the last accepted step
    value: jax.Array  #: f at the accepted point
    grad_norm: jax.Array  #: largest absolute gradient entry at the accepted point
    expected: jax.Array  #: decrease of f expected of the first trial of the search
    stalled: jax.Array  #: whether no further progress is possible, even along −∇f


class LineSearchState(NamedTuple):
    """State of :func:`with_line_search`. The loop holds the trial point x + t d."""

    accepted: Point  #: x, f(x) and ∇f(x)
    direction: tree.PyTree  #: d, in at least float32
    size: jax.Array  #: largest absolute entry of d
    moved: jax.Array  #: largest absolute entry of the last accepted step; 0 before the first one
    section: Section  #: the known points of φ(t) = f(x + t d), and the t in the loop
    improvement: Improvement  #: the best over the accepted points
    take_next: jax.Array  #: whether the next point is accepted without a test
    steepest: jax.Array  #: whether d is −∇f instead of the method's direction
    restart: jax.Array  #: whether the method gets a new state at its next call
    inner_state: optax.OptState  #: state of the method that gives the direction
    box: Box | tuple[()]  #: the bounds, like the parameters; () without bounds
    longest: jax.Array | tuple[()]  #: the largest t within the bounds; () without bounds
    info: LineSearchInfo


@checked
def with_line_search(
    direction: optax.GradientTransformation,
    *,
    unit_step: bool = True,
    ravel: bool = False,
    repeatable: bool = False,
    decrease: BelowHalf = 0.1,
    curvature: Fraction = 0.9,
    noise: Fraction = 1e-6,
    max_trials: Count = 30,
) -> optax.GradientTransformationExtraArgs:
    """Adds a line search to a method: each step decreases the objective enough.

    The search runs along d, the negative of what ``direction`` returns, on φ(t) = f(x + t d). A
    step t is accepted if it satisfies the strong Wolfe conditions::

        φ(t) ≤ φ(0) + δ t φ'(0)   and   |φ'(t)| ≤ σ |φ'(0)|

    If rounding hides the decrease, the approximate Wolfe conditions are enough::

        φ(t) ≤ φ(0) + ε |φ(0)|   and   σ φ'(0) ≤ φ'(t) ≤ min(σ, 1 − 2δ) |φ'(0)|

    Otherwise the next trial is the minimum of the cubic through both ends of the bracket, kept
    away from the ends. Without a bracket it is farther out. The very first trial moves the
    parameters by 0.3 of the largest one. The first trial of a later search is at most 10 times as
    long as the last step, or 10,000 times if the direction has a scale of its own.

    **The loop holds the trial point.** So an update costs the one value and gradient that a
    training loop computes anyway. :func:`gradxform.eval_params` gives the accepted point x.

    After a trial with a NaN or infinite value the search steps back. A search that fails returns
    to its best point. If it has none, it restarts along the negative gradient, and ``direction``
    gets a new state. If that fails too, ``info.stalled`` is set. All this also happens after ten
    accepted points in a row without progress: no lower value, and no gradient smaller by a tenth.

    Args:
      direction: a method that returns ascent directions without a learning rate, like every
        ``scale_by_*``. It sees only accepted points.
      unit_step: True if the direction has a scale of its own, like Newton's and quasi-Newton's;
        the search then tries t = 1 first. With False the first trial expects the decrease of the
        last step.
      ravel: True flattens all parameters into one vector, also for ``direction``; this compiles and
        runs many times faster with many leaves. False keeps the leaves apart, sharded like the
        parameters. Directions that need ``value_fn`` need False.
      repeatable: True if ``direction``, called again at the same point, returns the same direction
        and state, as quasi-Newton methods do. It is then called in every update. On small problems
        and under ``jax.vmap`` that is faster than a call at accepted points only.
      decrease: δ in (0, 1/2), the part of the predicted decrease that is enough.
      curvature: σ in (δ, 1), the part of the slope that may be left.
      noise: ε ≥ 0, relative error of the objective; at least ten units of rounding are assumed.
      max_trials: number of trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params``, ``value``, and what ``direction`` needs. The
      objective must be the same in every update: the full batch, not minibatches.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, or the parameters are sharded and ``ravel`` is True.

    References:
      Hager & Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line
      search", SIAM J. Optim. 16:170 (2005), §4. Differs: the trial inside a bracket is a cubic's
      minimum instead of their double secant, and the curvature condition is the strong one.
      Nocedal & Wright, *Numerical Optimization* (2006), §3.5.

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> f = lambda x: jnp.sum(jnp.asarray([1.0, 20.0]) * x**2)
    >>> tx = gx.with_line_search(optax.identity(), unit_step=False)  # steepest descent
    >>> solution = gx.minimize(f, jnp.ones(2), tx, tol=1e-3)
    >>> gx.Status(int(solution.status)).name
    'converged'
    """
    return search(
        "with_line_search",
        direction,
        Rules(decrease, curvature, noise, max_trials),
        unit_step=unit_step,
        ravel=ravel,
        asked="always" if repeatable else "if accepted",
    )


def search(
    method: str,
    direction: optax.GradientTransformation,
    rules: Rules,
    *,
    unit_step: bool,
    ravel: bool,
    asked: Literal["always", "if accepted", "always, kept if accepted"],
    passed: tuple[Literal["last", "direction", "restart", "box"], ...] = (),
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`with_line_search`, with errors that name ``method``.

    ``asked`` says in which updates ``direction`` is called. A cheap one is called in all of them,
    because a branch costs more. Unless it is repeatable, its new state is kept only at accepted
    points.

    ``passed`` lists extra arguments for ``direction``. ``last`` is the last accepted point, which
    ``direction`` then need not store, and ``direction`` is the one that was searched from there.
    With ``restart`` it resets its own state. ``box`` are the bounds, within which the direction
    then has to end.
    """
    inner = optax.with_extra_args_support(direction)

    def flatten(values: tree.PyTree) -> tree.PyTree:
        values = jax.tree.map(tree.promote, values)
        return tree.ravel(values)[0] if ravel and not has_holes(values) else values

    def flatten_box(bounds: Box | tuple[()]) -> Box | None:
        return Box(flatten(bounds.low), flatten(bounds.high)) if bounds else None

    def init(params: tree.PyTree) -> LineSearchState:
        def number() -> jax.Array:
            return jnp.array(scalar(0), copy=True)

        if ravel:
            check_whole(method, params)
        within = () if bounds is None else box(method, bounds, params)
        if within:
            params = project(within, params)
        return LineSearchState(
            accepted=Point(flatten(tree.copy(params)), number(), flatten(tree.zeros_like(params))),
            direction=flatten(tree.zeros_like(params)),
            size=number(),
            moved=number(),
            section=no_section(),
            improvement=no_improvement(),
            take_next=jnp.array(True),
            steepest=jnp.array(False),
            restart=jnp.array(False),
            inner_state=inner.init(flatten(params)),
            box=within,
            longest=number() if within else (),
            info=_no_info(),
        )

    def ask(
        state: LineSearchState, point: Point, accept: jax.Array, extra_args: dict[str, Any]
    ) -> tuple[tree.PyTree, optax.OptState]:
        """The method's direction of descent at ``point``, and its new state."""

        def answer() -> tuple[tree.PyTree, optax.OptState]:
            memory = state.inner_state
            if "restart" not in passed:
                new = carry_totals(inner.init(point.params), memory)
                memory = tree.select(state.restart, new, memory)
            known = {
                "last": state.accepted,
                "direction": state.direction,
                "restart": state.restart,
                "box": flatten_box(state.box),
            }
            extra = {**extra_args, **{name: known[name] for name in passed}, "grad": point.grad}
            ascent, memory = inner.update(point.grad, memory, point.params, **extra)
            return tree.map(lambda _, a: -a, state.direction, ascent), memory

        before = state.direction, state.inner_state
        if asked == "if accepted":
            return jax.lax.cond(accept, answer, lambda: before)
        d, memory = answer()
        kept = memory if asked == "always" else tree.select(accept, memory, state.inner_state)
        return tree.select(accept, d, state.direction), kept

    def update(
        grads: tree.PyTree,
        state: LineSearchState,
        params: tree.PyTree = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, LineSearchState]:
        params = require_params(method, params, grads)
        value = check_value("value", require(method, "value", value))

        # judge the trial point in the loop
        point = Point(flatten(params), scalar(value), flatten(sharded_like(grads, params)))
        within = flatten_box(state.box)
        if within is not None:
            point = inside_only(within, point)
        seen = _look(state, point, rules, float(jnp.finfo(value.dtype).eps))
        verdict, accepted = seen.verdict, seen.accepted
        grad_norm = scalar(tree.max_abs(free_gradient(within, point)))
        improvement = improvement_after(state.improvement, verdict.accept, point.value, grad_norm)

        # ask the method for the next direction, and take −g if that does not descend
        d, inner_state = ask(state, accepted, verdict.accept, {**extra_args, "value": value})
        is_usable = descends(d, accepted.grad) & (improvement.idle != PATIENCE)
        steepest = verdict.reset | (verdict.accept & ~is_usable)

        # begin a search, at an accepted point or after a failure
        spacing = min(tree.spacings(params), default=0.0)
        known = d, accepted, seen.moved, state.section, verdict.begins, steepest
        if within is None:
            start = begin(*known, unit_step=unit_step, spacing=spacing)
        else:
            start = begin_within(within, *known, spacing=spacing)
        section = tree.select(verdict.begins, start.section, seen.section)
        is_reset = verdict.begins & steepest
        new_state = LineSearchState(
            accepted=accepted,
            direction=start.direction,
            size=start.size,
            moved=seen.moved,
            section=section,
            improvement=improvement,
            take_next=verdict.wait | verdict.retreat | verdict.stalled,
            steepest=jnp.where(verdict.begins, steepest, state.steepest),
            restart=steepest | (state.restart & ~(verdict.accept | (asked == "always"))),
            inner_state=inner_state,
            box=state.box,
            longest=start.longest,
            info=_reported(state.info, seen, grad_norm, is_reset, improvement, section),
        )
        if state.box and within is not None:
            step = tree.scale(section.t, start.direction)
            target = tree.unflatten(landed(within, accepted.params, step), params)
            return tree.cast_like(updates_to(state.box, target, params), grads), new_state
        updates = tree.map(
            lambda x, d, p: (x + section.t * d) - p, accepted.params, start.direction, point.params
        )
        return tree.cast_like(tree.unflatten(updates, grads), grads), new_state

    return transformation(init, update)


def _no_info() -> LineSearchInfo:
    counts = (jnp.array(0, jnp.int32) for _ in range(3))
    numbers = (jnp.array(scalar(0), copy=True) for _ in range(4))
    return LineSearchInfo(*counts, *numbers, stalled=jnp.array(False))


@eval_params.register
@evaluated_as_real
def _(state: LineSearchState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda _, x: x, params, tree.unflatten(state.accepted.params, params))


class _Seen(NamedTuple):
    """The trial point, judged."""

    trial: Trial
    verdict: Verdict
    section: Section  # the section, narrowed by the trial
    accepted: Point  # the trial point if it was accepted, otherwise the last accepted point
    moved: jax.Array  # largest absolute entry of the last accepted step


def _look(state: LineSearchState, point: Point, rules: Rules, spacing: float) -> _Seen:
    """The verdict on the trial point ``point``."""
    trial = Trial(state.section.t, point.value, tree.vdot(point.grad, state.direction))
    verdict, section = judge(
        state.section,
        trial,
        rules,
        take_next=state.take_next,
        steepest=state.steepest,
        spacing=spacing,
        longest=None if isinstance(state.longest, tuple) else state.longest,
    )
    value = jnp.where(verdict.accept, trial.value, state.accepted.value)
    has_moved = verdict.accept & (trial.t > 0)
    moved = jnp.where(has_moved, trial.t * state.size, state.moved)
    numbers = verdict, section.low, section.high, section.t, value, moved
    verdict, low, high, t, value, moved = in_one_kernel(numbers)
    section = section._replace(low=low, high=high, t=t)
    accepted = tree.select(verdict.accept, point, state.accepted)._replace(value=value)
    return _Seen(trial, verdict, section, accepted, moved)


def _reported(
    info: LineSearchInfo,
    seen: _Seen,
    grad_norm: jax.Array,
    is_reset: jax.Array,
    improvement: Improvement,
    section: Section,
) -> LineSearchInfo:
    accept = seen.verdict.accept
    expected = -0.5 * section.t * section.origin.slope
    return LineSearchInfo(
        accepted=tree.add_count(info.accepted, accept.astype(jnp.int32)),
        resets=tree.add_count(info.resets, is_reset.astype(jnp.int32)),
        non_finite=tree.add_count(info.non_finite, (~is_finite(seen.trial)).astype(jnp.int32)),
        step_length=jnp.where(accept, seen.trial.t, info.step_length),
        value=jnp.where(accept, seen.trial.value, info.value),
        grad_norm=jnp.where(accept, grad_norm, info.grad_norm),
        expected=jnp.where(seen.verdict.begins, expected, info.expected),
        stalled=seen.verdict.stalled | (improvement.idle >= 2 * PATIENCE),
    )
