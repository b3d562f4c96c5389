"""A line search as a transformation: one value and one gradient an update.

With φ(t) = f(x + t d), as Hager & Zhang (2005), §4, and Nocedal & Wright (2006), §3.5, have it::

    repeat
        d ← the direction of the method at x, or −∇f(x) where d does not descend
        t ← the first trial, and the bracket is [0, ∞)
        until φ(t) is low enough and φ'(t) flat enough      (Wolfe, or approximately so)
            the bracket ends at t if φ rises there, or begins at t if φ still falls
            t ← a point inside the bracket, or farther out while it has no end
        x ← x + t d

An update sees one trial point x + t d, with its value and gradient. So it makes one turn of the
inner loop, or ends it and begins the next search. :mod:`gradxform.section` has the arithmetic of
the bracket.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import BelowHalf, Count, Fraction, checked, scalar
from gradxform.info import carry_totals, diagnostics
from gradxform.kernels import in_one_kernel, maxima
from gradxform.leaves import has_holes, map_unmasked
from gradxform.objective import check_value
from gradxform.progress import PATIENCE, Progress, no_progress, progress_after
from gradxform.protocol import require, require_params, transformation
from gradxform.section import (
    Rules,
    Section,
    Trial,
    Verdict,
    first_step,
    is_finite,
    judge,
    new_section,
    no_section,
    slowness,
)
from gradxform.sharding import check_whole, sharded_like

# how many times as far out as the last step a search begins at most; directions with a scale of
# their own know better how far to go
_REACH, _SCALED_REACH = 10.0, 1000.0


@diagnostics
class LineSearchInfo(NamedTuple):
    """What the search did; the counters run over all updates."""

    accepted: jax.Array  #: points accepted, the start included
    resets: jax.Array  #: searches that failed and were begun again along the negative gradient
    non_finite: jax.Array  #: trial points whose value or slope was NaN or infinite
    step_length: jax.Array  #: the multiple of the direction that was accepted last
    value: jax.Array  #: f at the accepted point
    grad_norm: jax.Array  #: largest absolute gradient entry at the accepted point
    stalled: jax.Array  #: the search along the negative gradient failed too: no descent is left


class Point(NamedTuple):
    """A point that was evaluated; the trees are in at least float32."""

    params: tree.PyTree
    value: jax.Array
    grad: tree.PyTree


class LineSearchState(NamedTuple):
    """State of :func:`with_line_search`. The loop holds the trial point x + t d."""

    accepted: Point  #: x, f(x) and ∇f(x)
    direction: tree.PyTree  #: d, in at least float32
    size: jax.Array  #: largest entry of d
    moved: jax.Array  #: largest entry of the last step accepted; 0 before there is one
    section: Section  #: what is known of φ(t) = f(x + t d), and the t in the loop
    progress: Progress  #: over the accepted points
    take_next: jax.Array  #: whether the point in the loop is accepted as it is
    steepest: jax.Array  #: whether d is the negative gradient in place of the method's direction
    restart: jax.Array  #: whether the method begins with a new state when it is asked next
    inner_state: optax.OptState  #: of the method that gives the direction
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
    r"""Searches along the direction of another method for a step that descends enough.

    With d the negative of what ``direction`` returns and :math:`\varphi(t) = f(x + t d)`, a step t
    is accepted when

    .. math::
        \varphi(t) \le \varphi(0) + \delta t \varphi'(0) \quad\text{and}\quad
        |\varphi'(t)| \le \sigma |\varphi'(0)|

    (strong Wolfe), or, where rounding hides the decrease, when

    .. math::
        \varphi(t) \le \varphi(0) + \epsilon |\varphi(0)| \quad\text{and}\quad
        \sigma \varphi'(0) \le \varphi'(t) \le \min(\sigma, 1 - 2 \delta)\, |\varphi'(0)|

    (approximate Wolfe). Otherwise the next trial is the minimum of the cubic through the two ends
    of the bracket, safeguarded, or farther out while there is no bracket. The very first trial
    moves the parameters by 0.3 of the largest of them. Later searches begin at most ten times as
    far out as the last step went, or a thousand times along directions with a scale of their own.

    **The parameters in the loop are the trial point**, so each update costs the one value and
    gradient that a training loop takes anyway; :func:`gradxform.eval_params` gives the accepted
    point x. A trial with a value that is NaN or infinite is stepped back from. A search that fails
    goes to the best point it saw; without one it begins again along the negative gradient, and
    ``direction`` with a new state; when that fails too, ``info.stalled`` says so. The same happens
    when ten accepted points in a row bring neither a lower value nor a gradient smaller by a tenth.

    Args:
      direction: a method whose updates are ascent directions without a rate, like every
        ``scale_by_*``. It sees accepted points only.
      unit_step: whether the direction has a scale of its own, as Newton's and quasi-Newton's have,
        so that t = 1 is tried first. If not, the first trial expects the decrease of the last step.
      ravel: ``direction`` sees parameters and gradient as one vector, and the search works on it:
        with many leaves that compiles and runs many times faster. False leaves them as they are,
        sharded as they are, and for directions that take ``value_fn``.
      repeatable: ``direction``, asked again at the same point, gives the same and keeps its state,
        as quasi-Newton methods do. It is then asked in every update, which on small problems and
        under ``jax.vmap`` costs less than asking at accepted points only.
      decrease: δ in (0, 1/2), the part of the promised decrease that is enough.
      curvature: σ in (δ, 1), the part of the slope that may be left.
      noise: ε ≥ 0, relative error of the objective; at least ten units of rounding are taken.
      max_trials: trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params``, ``value``, and whatever ``direction`` needs.

    Raises:
      ValueError: an argument is out of range or missing in ``update``; or with ``ravel``, ``init``
        sees that the parameters are sharded.

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
    told: tuple[Literal["last", "restart"], ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """:func:`with_line_search` as a part of ``method``, which its errors name.

    ``asked`` says in which updates ``direction`` is asked. A cheap one is asked in all of them,
    because a branch costs more; unless it is repeatable, its state is kept at accepted points
    alone. ``told`` says what it is given: the accepted point before as ``last``, which it then
    need not keep itself, and ``restart``, upon which it begins with a new state by itself.
    """
    inner = optax.with_extra_args_support(direction)

    def flatten(values: tree.PyTree) -> tree.PyTree:
        values = jax.tree.map(tree.promote, values)
        return tree.ravel(values)[0] if ravel and not has_holes(values) else values

    def init(params: tree.PyTree) -> LineSearchState:
        def number() -> jax.Array:
            return jnp.array(scalar(0), copy=True)

        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        def flag(value: bool = False) -> jax.Array:
            return jnp.array(value)

        if ravel:
            check_whole(method, params)
        return LineSearchState(
            accepted=Point(flatten(tree.copy(params)), number(), flatten(tree.zeros_like(params))),
            direction=flatten(tree.zeros_like(params)),
            size=number(),
            moved=number(),
            section=no_section(),
            progress=no_progress(),
            take_next=flag(True),
            steepest=flag(),
            restart=flag(),
            inner_state=inner.init(flatten(params)),
            info=LineSearchInfo(count(), count(), count(), number(), number(), number(), flag()),
        )

    def ask(
        state: LineSearchState, point: Point, accept: jax.Array, extra_args: dict[str, Any]
    ) -> tuple[tree.PyTree, optax.OptState]:
        """The direction of descent that the method gives at ``point``, and its state after."""

        def answer() -> tuple[tree.PyTree, optax.OptState]:
            memory = state.inner_state
            if "restart" not in told:
                new = carry_totals(inner.init(point.params), memory)
                memory = tree.select(state.restart, new, memory)
            known = {"last": state.accepted, "restart": state.restart}
            extra = {**extra_args, **{name: known[name] for name in told}, "grad": point.grad}
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

        # the loop is at a trial point of the section along d
        here = Point(flatten(params), scalar(value), flatten(sharded_like(grads, params)))
        seen = _look(state, here, rules, float(jnp.finfo(value.dtype).eps))
        verdict, accepted = seen.verdict, seen.accepted
        grad_norm = scalar(tree.max_abs(here.grad))
        progress = progress_after(state.progress, verdict.accept, here.value, grad_norm)

        # the method is asked for the next direction, which gives way to −g if it does not descend
        d, inner_state = ask(state, accepted, verdict.accept, {**extra_args, "value": value})
        useful = _descends(d, accepted.grad) & (progress.idle != PATIENCE)
        steepest = verdict.reset | (verdict.accept & ~useful)

        # a search begins at an accepted point, or once more after a failure
        d, size, new = _begin(d, seen, state.section, steepest, unit_step, _spacing(params))
        section = tree.select(verdict.begins, new, seen.section)
        is_asked = verdict.accept | (asked == "always")
        is_reset = verdict.begins & steepest
        new_state = LineSearchState(
            accepted=accepted,
            direction=d,
            size=size,
            moved=seen.moved,
            section=section,
            progress=progress,
            take_next=verdict.wait | verdict.retreat | verdict.stalled,
            steepest=jnp.where(verdict.begins, steepest, state.steepest),
            restart=steepest | (state.restart & ~is_asked),
            inner_state=inner_state,
            info=_reported(state.info, seen, grad_norm, is_reset, progress),
        )
        updates = tree.map(lambda x, d, p: (x + section.t * d) - p, accepted.params, d, here.params)
        return tree.cast_like(tree.unflatten(updates, grads), grads), new_state

    return transformation(init, update)


@eval_params.register
def _(state: LineSearchState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda _, x: x, params, tree.unflatten(state.accepted.params, params))


class _Seen(NamedTuple):
    """What the point in the loop turned out to be."""

    trial: Trial
    verdict: Verdict
    section: Section  # narrowed by the trial
    accepted: Point  # the trial point itself, or the accepted point before
    moved: jax.Array  # largest entry of the last step accepted


def _look(state: LineSearchState, here: Point, rules: Rules, spacing: float) -> _Seen:
    """The trial that ``here`` is, and what it leads to."""
    trial = Trial(state.section.t, here.value, tree.vdot(here.grad, state.direction))
    verdict, section = judge(
        state.section,
        trial,
        rules,
        take_next=state.take_next,
        steepest=state.steepest,
        spacing=spacing,
    )
    value = jnp.where(verdict.accept, trial.value, state.accepted.value)
    has_moved = verdict.accept & (trial.t > 0)
    moved = jnp.where(has_moved, trial.t * state.size, state.moved)
    numbers = verdict, section.low, section.high, section.t, value, moved
    verdict, low, high, t, value, moved = in_one_kernel(numbers)
    section = section._replace(low=low, high=high, t=t)
    accepted = tree.select(verdict.accept, here, state.accepted)._replace(value=value)
    return _Seen(trial, verdict, section, accepted, moved)


def _descends(d: tree.PyTree, g: tree.PyTree) -> jax.Array:
    slope = tree.vdot(g, d)
    return (slope < 0) & jnp.isfinite(slope)


def _spacing(params: tree.PyTree) -> float:
    """The relative spacing of the numbers in ``params``, where it is finest."""
    dtypes = [jnp.asarray(p).dtype for p in jax.tree.leaves(params)]
    return min((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


def _begin(
    d: tree.PyTree,
    seen: _Seen,
    last: Section,
    steepest: jax.Array,
    unit_step: bool,
    spacing: float,
) -> tuple[tree.PyTree, jax.Array, Section]:
    """A search along d, or −g where it is ``steepest``: the direction, its size and the section.

    A direction without a scale of its own gets the largest entry 1, when the search begins.
    """
    x, value, g = seen.accepted
    sizes = (jax.tree.map(tree.magnitudes, y) for y in (x, d, g))
    finest = (jax.tree.map(jnp.negative, slowness(y, x, spacing)) for y in (d, g))
    size_x, size_d, size_g, finest_d, finest_g = map(scalar, maxima(*sizes, *finest))
    size, finest = jnp.where(steepest, size_g, size_d), -jnp.where(steepest, finest_g, finest_d)

    first = steepest | (seen.moved == 0)  # no step along such a direction yet
    unscaled = seen.verdict.begins & (first | (not unit_step))
    unit = tree.reciprocal(jnp.where(unscaled, size, 1))
    finest = jnp.where(size > 0, finest * jnp.where(unscaled, size, 1), 0)
    size = jnp.where(unscaled & (size > 0), 1, size)
    numbers = steepest, first, unscaled, size, finest
    steepest, first, unscaled, size, finest = in_one_kernel(numbers)

    d = tree.map(lambda d, g: unit * jnp.where(steepest, -g, d), d, g)
    slope = tree.vdot(g, d)
    t = jnp.where(unscaled, first_step(size_x, value, slope, last, first), 1)
    far = jnp.where(unscaled, _REACH, _SCALED_REACH) * seen.moved
    is_bounded = (far > 0) & (size > 0)
    t = in_one_kernel(jnp.where(is_bounded, jnp.minimum(t, tree.divide(far, size)), t))
    return d, size, new_section(value, slope, t, finest)


def _reported(
    info: LineSearchInfo,
    seen: _Seen,
    grad_norm: jax.Array,
    is_reset: jax.Array,
    progress: Progress,
) -> LineSearchInfo:
    accept = seen.verdict.accept
    return LineSearchInfo(
        accepted=tree.add_count(info.accepted, accept.astype(jnp.int32)),
        resets=tree.add_count(info.resets, is_reset.astype(jnp.int32)),
        non_finite=tree.add_count(info.non_finite, (~is_finite(seen.trial)).astype(jnp.int32)),
        step_length=jnp.where(accept, seen.trial.t, info.step_length),
        value=jnp.where(accept, seen.trial.value, info.value),
        grad_norm=jnp.where(accept, grad_norm, info.grad_norm),
        stalled=seen.verdict.stalled | (progress.idle >= 2 * PATIENCE),
    )
