"""A line search as a transformation: one value and one gradient an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.derivatives import constant_size
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import BelowHalf, Count, Fraction, Scalar, checked, scalar
from gradxform.info import carry_totals, diagnostics
from gradxform.objective import check_value
from gradxform.protocol import require, require_params, transformation


@diagnostics
class LineSearchInfo(NamedTuple):
    """What the search did; the counters run over all updates."""

    accepted: jax.Array  #: points accepted, the start included
    resets: jax.Array  #: searches that failed and were begun again along the negative gradient
    non_finite: jax.Array  #: trial points whose value or slope was NaN or infinite
    step_length: jax.Array  #: the multiple of the direction that was accepted last
    stalled: jax.Array  #: the search along the negative gradient failed too: no descent is left


class Trial(NamedTuple):
    """A point of the section φ(t) = f(x + t d)."""

    t: jax.Array
    value: jax.Array
    slope: jax.Array


class LineSearchState(NamedTuple):
    """State of :func:`with_line_search`. The loop holds the trial point x + t d."""

    params: tree.PyTree  #: x, the accepted point, in at least float32
    grad: tree.PyTree  #: ∇f(x), in at least float32
    direction: tree.PyTree  #: d, in at least float32
    size: jax.Array  #: largest entry of d
    moved: jax.Array  #: largest entry of the last step accepted; 0 before there is one
    origin: Trial  #: φ(0) and φ'(0)
    low: Trial  #: the end of the bracket from which φ descends into it
    high: Trial  #: the other end; the largest number three times while there is none
    t: jax.Array  #: of the trial point in the loop
    resolution: jax.Array  #: the step at which x begins to move
    trials: jax.Array  #: trial points of this search so far
    begin: jax.Array  #: whether the point in the loop is accepted as it is
    steepest: jax.Array  #: whether d is the negative gradient after a reset
    forget: jax.Array  #: whether the method is to begin with a new state
    lowest: jax.Array  #: value accepted
    smallest: jax.Array  #: largest gradient entry accepted
    idle: jax.Array  #: points accepted in a row without progress in either
    inner_state: optax.OptState  #: of the method that gives the direction
    info: LineSearchInfo


_IDLE = 10  # accepted points without progress before a reset, and again before a stall
# how many times as far out as the last step a search begins at most; directions with a scale of
# their own know better how far to go
_REACH, _SCALED_REACH = 10.0, 1000.0
_FLAT_TRIALS = 5  # trial points where rounding hides all differences of value


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
        unit_step=unit_step,
        ravel=ravel,
        repeatable=repeatable,
        decrease=decrease,
        curvature=curvature,
        noise=noise,
        max_trials=max_trials,
    )


def search(
    method: str,
    direction: optax.GradientTransformation,
    *,
    unit_step: bool,
    ravel: bool,
    repeatable: bool,
    decrease: Scalar,
    curvature: Scalar,
    noise: Scalar,
    max_trials: Scalar,
) -> optax.GradientTransformationExtraArgs:
    """:func:`with_line_search` as a part of ``method``, which its errors name."""
    inner = optax.with_extra_args_support(direction)

    def flatten(values: tree.PyTree) -> tree.PyTree:
        values = jax.tree.map(tree.promote, values)
        return tree.ravel(values)[0] if ravel and not tree.has_holes(values) else values

    def init(params: tree.PyTree) -> LineSearchState:
        def number(x: float = 0) -> jax.Array:
            return jnp.array(scalar(x), copy=True)

        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        def trial() -> Trial:
            return Trial(number(), number(), number())

        if ravel:
            tree.check_whole(method, params)
        return LineSearchState(
            params=flatten(tree.copy(params)),
            grad=flatten(tree.zeros_like(params)),
            direction=flatten(tree.zeros_like(params)),
            size=number(),
            moved=number(),
            origin=trial(),
            low=trial(),
            high=trial(),
            t=number(),
            resolution=number(),
            trials=count(),
            begin=jnp.array(True),
            steepest=jnp.array(False),
            forget=jnp.array(False),
            lowest=number(tree.largest()),
            smallest=number(tree.largest()),
            idle=count(),
            inner_state=inner.init(flatten(params)),
            info=LineSearchInfo(count(), count(), count(), number(), jnp.array(False)),
        )

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
        delta, sigma, info = scalar(decrease), scalar(curvature), state.info
        rounding = jnp.finfo(value.dtype).eps * jnp.abs(state.origin.value)
        eps = jnp.maximum(scalar(noise) * jnp.abs(state.origin.value), 10 * rounding)

        there, here = flatten(params), flatten(tree.sharded_like(grads, params))
        trial = Trial(state.t, scalar(value), tree.vdot(here, state.direction))
        finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.slope)
        accept = finite & (state.begin | _is_wolfe(trial, state.origin, delta, sigma, eps))

        # -- another trial of the same search
        low, high, t = _narrow(state, trial, finite, eps)
        failed = ~accept & ~state.begin & _exhausted(state, low, high, rounding, scalar(max_trials))
        improved = failed & (low.t > 0) & (low.value < state.origin.value)
        reset = failed & ~improved & ~state.steepest

        # -- progress from one accepted point to the next
        largest = scalar(tree.max_abs(here))
        progress = (trial.value < state.lowest) | (largest < 0.9 * state.smallest)
        idle = jnp.where(accept, jnp.where(progress, 0, state.idle + 1), state.idle)
        tired = idle == _IDLE
        stalled = (failed & ~improved & state.steepest) | (idle >= 2 * _IDLE)

        # -- a new search, from the accepted point or along the negative gradient
        x = tree.select(accept, there, state.params)
        g = tree.select(accept, here, state.grad)

        def next_direction() -> tuple[tree.PyTree, optax.OptState]:
            point, slopes = (x, g) if repeatable else (there, here)
            anew = carry_totals(inner.init(point), state.inner_state)
            memory = tree.select(state.forget, anew, state.inner_state)
            extra = {**extra_args, "value": value, "grad": slopes}
            ascent, memory = inner.update(slopes, memory, point, **extra)
            return tree.map(lambda _, a: -a, state.direction, ascent), memory

        def same_direction() -> tuple[tree.PyTree, optax.OptState]:
            return state.direction, state.inner_state

        asked = jnp.array(True) if repeatable else accept
        d, inner_state = (
            next_direction() if repeatable else jax.lax.cond(accept, next_direction, same_direction)
        )
        slope = tree.vdot(g, d)
        useless = accept & (tired | ~((slope < 0) & jnp.isfinite(slope)))
        steepest = reset | useless
        d = tree.select(accept, d, state.direction)
        d = tree.select(steepest, jax.tree.map(jnp.negative, g), d)
        start = accept | reset
        moved = jnp.where(accept & (trial.t > 0), trial.t * state.size, state.moved)
        first = steepest | (moved == 0)
        unscaled = start & (first | (not unit_step))
        size = scalar(tree.max_abs(d))
        unit = jnp.where(unscaled, tree.reciprocal(size), 1)
        d, size = tree.scale(unit, d), unit * size
        origin = Trial(
            scalar(0), jnp.where(accept, trial.value, state.origin.value), tree.vdot(g, d)
        )
        fresh_t = jnp.where(unscaled, _first_step(x, origin, state, first), 1)
        reach = tree.divide(jnp.where(unscaled, _REACH, _SCALED_REACH) * moved, size)
        fresh_t = jnp.where(reach > 0, jnp.minimum(fresh_t, reach), fresh_t)
        none = Trial(*(scalar(tree.largest()) for _ in range(3)))
        low = tree.select(start, origin, low)
        high = tree.select(start, none, high)
        t = jnp.select([start, improved, failed], [fresh_t, low.t, 0.0], t)
        waiting = state.begin & ~accept  # the first value is not finite: stay
        t = jnp.where(waiting, 0, t)
        ulp = min(
            (float(jnp.finfo(jnp.asarray(p).dtype).eps) for p in jax.tree.leaves(params)), default=0
        )

        new_state = LineSearchState(
            params=x,
            grad=g,
            direction=d,
            size=size,
            moved=moved,
            origin=tree.select(start, origin, state.origin),
            low=low,
            high=high,
            t=t,
            resolution=jnp.where(start, scalar(_resolution(d, x, ulp)), state.resolution),
            trials=jnp.where(start, 0, state.trials + 1),
            begin=waiting | (failed & ~reset),
            steepest=jnp.where(start, steepest, state.steepest),
            forget=steepest | (state.forget & ~asked),
            lowest=jnp.where(accept, jnp.minimum(state.lowest, trial.value), state.lowest),
            smallest=jnp.where(accept, jnp.minimum(state.smallest, largest), state.smallest),
            idle=idle,
            inner_state=inner_state,
            info=LineSearchInfo(
                tree.add_count(info.accepted, accept.astype(jnp.int32)),
                tree.add_count(info.resets, (start & steepest).astype(jnp.int32)),
                tree.add_count(info.non_finite, (~finite).astype(jnp.int32)),
                jnp.where(accept, state.t, info.step_length),
                stalled,
            ),
        )
        updates = tree.map(lambda x, d, p: (x + t * d) - p, x, d, there)
        return tree.cast_like(tree.unflatten(updates, grads), grads), new_state

    return transformation(init, update)


@eval_params.register
def _(state: LineSearchState, params: tree.PyTree) -> tree.PyTree:
    return tree.map_unmasked(lambda _, x: x, params, tree.unflatten(state.params, params))


def _is_wolfe(
    trial: Trial, origin: Trial, delta: jax.Array, sigma: jax.Array, eps: jax.Array
) -> jax.Array:
    """The conditions (T1) and (T2) of Hager & Zhang."""
    decreased = trial.value <= origin.value + delta * trial.t * origin.slope
    close = (trial.value <= origin.value + eps) & (trial.slope <= (2 * delta - 1) * origin.slope)
    return (jnp.abs(trial.slope) <= sigma * jnp.abs(origin.slope)) & (decreased | close)


def _exhausted(
    state: LineSearchState, low: Trial, high: Trial, rounding: jax.Array, max_trials: jax.Array
) -> jax.Array:
    """Whether the search has no trial point left that could tell more."""
    closed = _is_closed(high)
    width = jnp.where(closed, high.t, low.t) - low.t
    slope = jnp.maximum(jnp.abs(low.slope), jnp.where(closed, jnp.abs(high.slope), 0))
    flat = closed & (width * slope <= rounding)
    limit = jnp.where(flat, jnp.minimum(_FLAT_TRIALS, max_trials), max_trials)
    finest = jnp.maximum(4 * (jnp.finfo(high.t.dtype).eps * high.t), state.resolution)
    return (scalar(state.trials + 1) >= limit) | (closed & (width <= finest))


def _is_closed(high: Trial) -> jax.Array:
    """Whether the bracket has an upper end."""
    return high.t < tree.largest()


def _resolution(d: tree.PyTree, x: tree.PyTree, ulp: jax.typing.ArrayLike) -> jax.Array:
    """The least t that moves an entry of x + t d, for a relative spacing of the numbers."""

    def speed(d: jax.Array, x: jax.Array) -> jax.Array:
        # over the entries of d, which may be of any size, so that no quotient overflows
        still = ulp * jnp.abs(x) <= jnp.abs(d) / tree.largest(d.dtype)
        quotient = jnp.abs(d) / jnp.where(still, 1, ulp * jnp.abs(x))
        return jnp.where(d == 0, 0, jnp.where(still, tree.largest(d.dtype), quotient))

    # it is compared alone, and has no derivative
    fastest = tree.max_abs(jax.tree.map(speed, *jax.lax.stop_gradient((d, x))))
    moves = (fastest > 0) & (fastest < tree.largest(fastest.dtype))
    return jnp.where(moves, 1 / jnp.where(moves, fastest, 1), 0)


def _narrow(
    state: LineSearchState, trial: Trial, finite: jax.Array, eps: jax.Array
) -> tuple[Trial, Trial, jax.Array]:
    """The bracket after a trial that was not accepted, and the next trial in it or beyond it."""
    before = state.low
    # branches that are not taken must be finite, or their derivatives are NaN
    trial = tree.select(finite, trial, state.origin._replace(t=trial.t))
    too_far = ~finite | (trial.value > state.origin.value + eps) | (trial.slope >= 0)
    barrier = trial._replace(value=jnp.where(finite, trial.value, tree.largest()))
    low = tree.select(too_far, before, trial)
    high = tree.select(too_far, barrier, state.high)

    closed, known = _is_closed(high), high.value < tree.largest()
    end = tree.select(closed & known, high, low)
    top = jnp.where(closed, high.t, low.t)
    width = top - low.t
    middle = low.t + 0.5 * width
    alike = jnp.abs(end.value - low.value) <= eps
    guess = jnp.where(alike, _secant(low, end, middle), _cubic(low, end, middle))
    guess = jnp.where(state.trials % 3 == 2, middle, guess)  # always shrinks
    inside = jnp.clip(guess, low.t + 0.01 * width, top - 0.01 * width)
    inside = jnp.where(known, inside, low.t + 0.1 * width)

    ahead = _secant(before, trial, 10 * trial.t)
    ahead = jnp.where(ahead > trial.t, ahead, 10 * trial.t)
    beyond = jnp.clip(ahead, 2 * trial.t, 10 * trial.t)
    return low, high, jnp.where(closed, inside, beyond)


def _secant(a: Trial, b: Trial, otherwise: jax.Array) -> jax.Array:
    """Where the line through the two slopes is zero; ``otherwise`` where it is level."""
    bend = b.slope - a.slope
    t = tree.divide(a.t * b.slope - b.t * a.slope, bend)
    return jnp.where((bend != 0) & jnp.isfinite(t), t, otherwise)


def _cubic(a: Trial, b: Trial, otherwise: jax.Array) -> jax.Array:
    """The minimum of the cubic through two values and slopes (Nocedal & Wright, eq. 3.59).

    ``otherwise`` where it has none.
    """
    d1 = a.slope + b.slope - 3 * tree.divide(a.value - b.value, a.t - b.t)
    size = constant_size((d1, a.slope, b.slope))  # keeps the squares in range
    size = jnp.where(size > 0, size, 1)
    discriminant = (d1 / size) ** 2 - (a.slope / size) * (b.slope / size)
    d2 = jnp.sign(b.t - a.t) * (size * tree.sqrt(jnp.maximum(discriminant, 0)))
    bend = b.slope - a.slope + 2 * d2
    t = b.t - (b.t - a.t) * tree.divide(b.slope + d2 - d1, bend)
    return jnp.where((discriminant >= 0) & (bend != 0) & jnp.isfinite(t), t, otherwise)


def _first_step(
    x: tree.PyTree, origin: Trial, state: LineSearchState, anew: jax.Array
) -> jax.Array:
    """A first trial along a direction of largest entry 1.

    It expects the decrease of the last step (Nocedal & Wright, eq. 3.60). Without one it moves by
    a part of x, or where x is 0, for a part of the value (after Hager & Zhang 2006, I0).
    """
    size, by_value = tree.max_abs(x), jnp.abs(tree.divide(origin.value, origin.slope))
    part = 0.3 * jnp.where(size > 0, size, by_value)
    decrease = jnp.maximum(state.origin.value - origin.value, 0)
    by_decrease = 2.02 * jnp.abs(tree.divide(decrease, origin.slope))
    by_slope = jnp.abs(tree.divide(state.t * state.origin.slope, origin.slope))
    again = jnp.where(by_decrease > 0, by_decrease, by_slope)
    t = jnp.where(anew | ~(again > 0), part, again)
    return jnp.where(t > 0, t, 1)
