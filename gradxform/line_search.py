"""A line search as a transformation: one value and one gradient an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import Scalar, check, scalar
from gradxform.protocol import check_value, require, transformation


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
    origin: Trial  #: φ(0) and φ'(0)
    low: Trial  #: the end of the bracket from which φ descends into it
    high: Trial  #: the other end; infinite while there is none
    t: jax.Array  #: of the trial point in the loop
    trials: jax.Array  #: trial points of this search so far
    begin: jax.Array  #: whether the point in the loop is accepted as it is
    steepest: jax.Array  #: whether d is the negative gradient after a reset
    inner_state: optax.OptState  #: of the method that gives the direction
    info: LineSearchInfo


def with_line_search(
    direction: optax.GradientTransformation,
    *,
    unit_step: bool = True,
    decrease: Scalar = 0.1,
    curvature: Scalar = 0.9,
    noise: Scalar = 1e-6,
    max_trials: Scalar = 30,
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
    of the bracket, safeguarded, or farther out while there is no bracket.

    **The parameters in the loop are the trial point**, so each update costs the one value and
    gradient that a training loop takes anyway; :func:`gradxform.eval_params` gives the accepted
    point x. A trial with a value that is NaN or infinite is stepped back from. A search that fails
    goes to the best point it saw; without one it begins again along the negative gradient, and
    ``direction`` with a new state; when that fails too, ``info.stalled`` says so.

    Args:
      direction: a method whose updates are ascent directions without a rate, like every
        ``scale_by_*``. It sees accepted points only.
      unit_step: whether the direction has a scale of its own, as Newton's and quasi-Newton's have,
        so that t = 1 is tried first. If not, the first trial promises what the last step did.
      decrease: δ in (0, 1/2), the part of the promised decrease that is enough.
      curvature: σ in (δ, 1), the part of the slope that may be left.
      noise: ε ≥ 0, relative error of the objective; at least ten units of rounding are taken.
      max_trials: trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params``, ``value``, and whatever ``direction`` needs.

    Raises:
      ValueError: an argument is out of range or missing in ``update``.

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
    check(
        "with_line_search",
        decrease=(decrease, 0, 0.5),
        curvature=(curvature, 0, 1),
        noise=(noise, 0, 1),
        max_trials=(max_trials, 1, float("inf")),
    )
    inner = optax.with_extra_args_support(direction)

    def init(params: tree.PyTree) -> LineSearchState:
        def number() -> jax.Array:
            return jnp.array(scalar(0), copy=True)

        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        def trial() -> Trial:
            return Trial(number(), number(), number())

        return LineSearchState(
            params=tree.copy(params),
            grad=tree.zeros_like(params),
            direction=tree.zeros_like(params),
            origin=trial(),
            low=trial(),
            high=trial(),
            t=number(),
            trials=count(),
            begin=jnp.array(True),
            steepest=jnp.array(False),
            inner_state=inner.init(params),
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
        params = require("with_line_search", "params", params)
        value = check_value("value", require("with_line_search", "value", value))
        delta, sigma, info = scalar(decrease), scalar(curvature), state.info
        rounding = jnp.finfo(value.dtype).eps
        eps = jnp.maximum(scalar(noise), 10 * rounding) * jnp.abs(state.origin.value)

        trial = Trial(state.t, scalar(value), tree.vdot(grads, state.direction))
        finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.slope)
        accept = finite & (state.begin | _is_wolfe(trial, state.origin, delta, sigma, eps))

        # -- another trial of the same search
        low, high, t = _narrow(state, trial, finite, eps)
        narrow = jnp.isfinite(high.t) & (high.t - low.t <= 4 * rounding * high.t)
        failed = ~accept & ~state.begin & ((state.trials + 1 >= scalar(max_trials)) | narrow)
        improved = (low.t > 0) & (low.value < state.origin.value)
        reset = failed & ~improved & ~state.steepest
        stalled = failed & ~improved & state.steepest

        # -- a new search, from the accepted point or along the negative gradient
        x = tree.select(accept, jax.tree.map(tree.promote, params), state.params)
        g = tree.select(accept, jax.tree.map(tree.promote, grads), state.grad)
        extra = {**extra_args, "value": value, "grad": grads}

        def next_direction() -> tuple[tree.PyTree, optax.OptState]:
            ascent, inner_state = inner.update(grads, state.inner_state, params, **extra)
            return tree.map(lambda d, a: -a, state.direction, ascent), inner_state

        def same_direction() -> tuple[tree.PyTree, optax.OptState]:
            return state.direction, state.inner_state

        d, inner_state = jax.lax.cond(accept, next_direction, same_direction)
        inner_state = jax.lax.cond(reset, lambda: inner.init(state.params), lambda: inner_state)
        slope = tree.vdot(g, d)
        uphill = accept & ~((slope < 0) & jnp.isfinite(slope))
        start = accept | reset
        steepest = reset | uphill
        d = tree.select(steepest, jax.tree.map(jnp.negative, g), d)

        unscaled = start & (steepest | (info.accepted == 0) | (not unit_step))
        d = tree.scale(jnp.where(unscaled, tree.reciprocal(tree.max_abs(d)), 1), d)
        slope = tree.vdot(g, d)
        origin = Trial(scalar(0), jnp.where(accept, trial.value, state.origin.value), slope)
        first = _first_step(x, origin)
        again = jnp.abs(tree.divide(state.t * state.origin.slope, slope))
        carried = jnp.where((info.accepted > 0) & ~steepest & (again > 0), again, first)
        fresh_t = jnp.where(unscaled, carried, 1)

        beyond = Trial(scalar(jnp.inf), scalar(jnp.inf), scalar(jnp.inf))
        low = tree.select(start, origin, low)
        high = tree.select(start, beyond, high)
        t = jnp.select([start, failed & improved, stalled], [fresh_t, low.t, 0.0], t)
        waiting = state.begin & ~accept  # the first value is not finite: stay
        t = jnp.where(waiting, 0, t)

        new_state = LineSearchState(
            params=x,
            grad=g,
            direction=d,
            origin=tree.select(start, origin, state.origin),
            low=low,
            high=high,
            t=t,
            trials=jnp.where(start, 0, state.trials + 1),
            begin=waiting | (failed & ~reset),
            steepest=jnp.where(start, steepest, state.steepest),
            inner_state=inner_state,
            info=LineSearchInfo(
                tree.add_count(info.accepted, accept.astype(jnp.int32)),
                tree.add_count(info.resets, (reset | uphill).astype(jnp.int32)),
                tree.add_count(info.non_finite, (~finite).astype(jnp.int32)),
                jnp.where(accept, state.t, info.step_length),
                stalled,
            ),
        )
        updates = tree.map(lambda _, x, d, p: (x + t * d) - p, grads, x, d, params)
        return updates, new_state

    return transformation(init, update)


@eval_params.register
def _(state: LineSearchState, params: tree.PyTree) -> tree.PyTree:
    return tree.map_unmasked(lambda _, x: x, params, state.params)


def _is_wolfe(
    trial: Trial, origin: Trial, delta: jax.Array, sigma: jax.Array, eps: jax.Array
) -> jax.Array:
    """The conditions (T1) and (T2) of Hager & Zhang."""
    decreased = trial.value <= origin.value + delta * trial.t * origin.slope
    close = (trial.value <= origin.value + eps) & (trial.slope <= (2 * delta - 1) * origin.slope)
    return (jnp.abs(trial.slope) <= sigma * jnp.abs(origin.slope)) & (decreased | close)


def _narrow(
    state: LineSearchState, trial: Trial, finite: jax.Array, eps: jax.Array
) -> tuple[Trial, Trial, jax.Array]:
    """The bracket after a trial that was not accepted, and the next trial in it or beyond it."""
    before = state.low
    too_far = ~finite | (trial.value > state.origin.value + eps) | (trial.slope >= 0)
    barrier = Trial(trial.t, jnp.where(finite, trial.value, jnp.inf), trial.slope)
    low = tree.select(too_far, before, trial)
    high = tree.select(too_far, barrier, state.high)

    width = high.t - low.t
    guess = jnp.where(jnp.abs(high.value - low.value) <= eps, _secant(low, high), _cubic(low, high))
    guess = jnp.where(jnp.isfinite(guess), guess, low.t + 0.5 * width)
    guess = jnp.where(state.trials % 3 == 2, low.t + 0.5 * width, guess)  # always shrinks
    inside = jnp.clip(guess, low.t + 0.1 * width, high.t - 0.1 * width)
    inside = jnp.where(jnp.isfinite(high.value), inside, low.t + 0.1 * width)

    ahead = _secant(before, trial)
    ahead = jnp.where(ahead > trial.t, ahead, 10 * trial.t)
    beyond = jnp.clip(ahead, 2 * trial.t, 10 * trial.t)
    return low, high, jnp.where(jnp.isfinite(high.t), inside, beyond)


def _secant(a: Trial, b: Trial) -> jax.Array:
    """Where the line through the two slopes is zero."""
    return (a.t * b.slope - b.t * a.slope) / (b.slope - a.slope)


def _cubic(a: Trial, b: Trial) -> jax.Array:
    """The minimum of the cubic through two values and slopes (Nocedal & Wright, eq. 3.59)."""
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    size = jnp.maximum(jnp.abs(d1), jnp.maximum(jnp.abs(a.slope), jnp.abs(b.slope)))
    root = size * jnp.sqrt((d1 / size) ** 2 - (a.slope / size) * (b.slope / size))
    d2 = jnp.sign(b.t - a.t) * root
    return b.t - (b.t - a.t) * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)


def _first_step(x: tree.PyTree, origin: Trial) -> jax.Array:
    """A first trial along a direction of largest entry 1 (Hager & Zhang 2006, I0)."""
    size = tree.max_abs(x)
    by_value = jnp.abs(tree.divide(origin.value, origin.slope))
    return 0.01 * jnp.where(size > 0, size, jnp.where(by_value > 0, by_value, 100))
