"""The section φ(t) = f(x + t d): what a line search knows of it, and what a trial point leads to.

Hager & Zhang (2005), §4, and Nocedal & Wright (2006), §3.5, in the form that tries one t at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import in_one_kernel

_FLAT_TRIALS = 5  # trial points where rounding hides all differences of value


class Trial(NamedTuple):
    """A point of the section φ(t) = f(x + t d)."""

    t: jax.Array
    value: jax.Array
    slope: jax.Array


class Section(NamedTuple):
    """What the search knows of φ, and the t it tries next."""

    origin: Trial  #: φ(0) and φ'(0)
    low: Trial  #: the end of the bracket from which φ descends into it
    high: Trial  #: the other end; the largest number three times while there is none
    t: jax.Array  #: of the trial point in the loop
    resolution: jax.Array  #: the step at which x begins to move
    trials: jax.Array  #: trial points of this search so far


class Rules(NamedTuple):
    """When a search accepts a trial point, and when it has failed."""

    decrease: Scalar  #: δ, the part of the promised decrease that is enough
    curvature: Scalar  #: σ, the part of the slope that may be left
    noise: Scalar  #: relative error of the objective
    max_trials: Scalar  #: trial points after which a search has failed


class Verdict(NamedTuple):
    """What a trial point leads to. The search tries another t where none of these holds."""

    accept: jax.Array  #: the next search begins at the trial point
    retreat: jax.Array  #: the search failed but saw a lower point, which it takes next
    reset: jax.Array  #: the search failed and begins again along the negative gradient
    stalled: jax.Array  #: the search along the negative gradient failed too
    wait: jax.Array  #: a point to be taken as it is was not finite: the loop stays at x
    begins: jax.Array  #: whether a search begins, at an accepted point or after a failure


def no_section() -> Section:
    """Before the first search."""

    def number() -> jax.Array:
        return jnp.array(scalar(0), copy=True)

    origin, low, high = (Trial(number(), number(), number()) for _ in range(3))
    return Section(origin, low, high, number(), number(), jnp.array(0, jnp.int32))


def new_section(value: jax.Array, slope: jax.Array, t: jax.Array, resolution: jax.Array) -> Section:
    """A section of which only φ(0) and φ'(0) are known, to be tried at ``t``."""
    origin = Trial(scalar(0), value, slope)
    none = Trial(*(scalar(tree.largest()) for _ in range(3)))
    return Section(origin, origin, none, t, resolution, jnp.array(0, jnp.int32))


def judge(
    section: Section,
    trial: Trial,
    rules: Rules,
    *,
    take_next: jax.Array,
    steepest: jax.Array,
    spacing: float,
) -> tuple[Verdict, Section]:
    """The verdict on a trial point, and the section that the search goes on with.

    Args:
      section: what was known before.
      trial: the point tried.
      rules: the numbers of the search.
      take_next: whether the point is accepted as it is.
      steepest: whether the search goes along the negative gradient because another failed.
      spacing: relative spacing of the numbers that values are given in.
    """
    delta, sigma, noise, max_trials = map(scalar, rules)
    origin = section.origin
    rounding = spacing * jnp.abs(origin.value)
    eps = jnp.maximum(noise * jnp.abs(origin.value), 10 * rounding)
    finite = is_finite(trial)
    accept = finite & (take_next | _is_wolfe(trial, origin, delta, sigma, eps))

    low, high, t = _narrow(section, trial, finite, eps)
    narrowed = Section(origin, low, high, t, section.resolution, section.trials + 1)
    failed = ~accept & ~take_next & _is_exhausted(narrowed, rounding, max_trials)
    lower = (low.t > 0) & (low.value < origin.value)
    reset = failed & ~lower & ~steepest
    verdict = Verdict(
        accept=accept,
        retreat=failed & lower,
        reset=reset,
        stalled=failed & ~lower & steepest,
        wait=take_next & ~accept,
        begins=accept | reset,
    )
    t = jnp.where(verdict.retreat, low.t, jnp.where(verdict.stalled | verdict.wait, 0, t))
    return verdict, narrowed._replace(t=t)


def first_step(
    size: jax.Array, value: jax.Array, slope: jax.Array, last: Section, first: jax.Array
) -> jax.Array:
    """A first trial along a direction of largest entry 1.

    It expects the decrease of the last step (Nocedal & Wright, eq. 3.60). Without one it moves by
    a part of ``size``, the largest entry of x, or where x is 0, for a part of the value (after
    Hager & Zhang 2006, I0).
    """
    decrease = jnp.maximum(last.origin.value - value, 0)
    again = jnp.where(decrease > 0, 2.02 * decrease, last.t * last.origin.slope)
    by_part = first | (again == 0) | (slope == 0)
    t = jnp.abs(tree.divide(jnp.where(by_part, 0.3 * value, again), slope))
    t = jnp.where(by_part & (size > 0), 0.3 * size, t)
    return jnp.where(t > 0, t, 1)


def slowness(d: tree.PyTree, x: tree.PyTree, spacing: float) -> tree.PyTree:
    """For each entry the least t at which x + t d is another number than x.

    Where no t moves it, that is the largest number. It is compared alone, and has no derivative.
    """

    def least(d: jax.Array, x: jax.Array) -> jax.Array:
        most = tree.largest(d.dtype)
        # over the entries of d, which may be of any size, so that no quotient overflows
        still = (d == 0) | (spacing * jnp.abs(x) / most > jnp.abs(d))
        return jnp.where(still, most, spacing * jnp.abs(x) / jnp.where(still, 1, jnp.abs(d)))

    return jax.tree.map(least, *jax.lax.stop_gradient((d, x)))


def is_finite(trial: Trial) -> jax.Array:
    return jnp.isfinite(trial.value) & jnp.isfinite(trial.slope)


def _is_wolfe(
    trial: Trial, origin: Trial, delta: jax.Array, sigma: jax.Array, eps: jax.Array
) -> jax.Array:
    """The conditions (T1) and (T2) of Hager & Zhang."""
    decreased = trial.value <= origin.value + delta * trial.t * origin.slope
    close = (trial.value <= origin.value + eps) & (trial.slope <= (2 * delta - 1) * origin.slope)
    return (jnp.abs(trial.slope) <= sigma * jnp.abs(origin.slope)) & (decreased | close)


def _is_exhausted(section: Section, rounding: jax.Array, max_trials: jax.Array) -> jax.Array:
    """Whether the search has no trial point left that could tell more."""
    low, high = section.low, section.high
    closed = _is_closed(high)
    width = jnp.where(closed, high.t, low.t) - low.t
    slope = jnp.maximum(jnp.abs(low.slope), jnp.where(closed, jnp.abs(high.slope), 0))
    flat = closed & (width * slope <= rounding)
    limit = jnp.where(flat, jnp.minimum(_FLAT_TRIALS, max_trials), max_trials)
    finest = jnp.maximum(4 * (jnp.finfo(high.t.dtype).eps * high.t), section.resolution)
    return (scalar(section.trials) >= limit) | (closed & (width <= finest))


def _is_closed(high: Trial) -> jax.Array:
    """Whether the bracket has an upper end."""
    return high.t < tree.largest()


def _narrow(
    section: Section, trial: Trial, finite: jax.Array, eps: jax.Array
) -> tuple[Trial, Trial, jax.Array]:
    """The bracket after a trial that was not accepted, and the next trial in it or beyond it."""
    before = section.low
    # branches that are not taken must be finite, or their derivatives are NaN
    trial = tree.select(finite, trial, section.origin._replace(t=trial.t))
    too_far = ~finite | (trial.value > section.origin.value + eps) | (trial.slope >= 0)
    barrier = trial._replace(value=jnp.where(finite, trial.value, tree.largest()))
    low = tree.select(too_far, before, trial)
    high = tree.select(too_far, barrier, section.high)
    closed, known = _is_closed(high), high.value < tree.largest()
    end = tree.select(closed & known, high, low)
    top = jnp.where(closed, high.t, low.t)
    width = top - low.t
    middle = low.t + 0.5 * width
    alike = jnp.abs(end.value - low.value) <= eps
    guess = jnp.where(alike, _secant(low, end, middle), _cubic(low, end, middle))
    guess = jnp.where(_is_third(section.trials), middle, guess)  # always shrinks
    inside = jnp.clip(guess, low.t + 0.01 * width, top - 0.01 * width)
    inside = jnp.where(known, inside, low.t + 0.1 * width)

    ahead = _secant(before, trial, 10 * trial.t)
    ahead = jnp.where(ahead > trial.t, ahead, 10 * trial.t)
    beyond = jnp.clip(ahead, 2 * trial.t, 10 * trial.t)
    return low, high, in_one_kernel(jnp.where(closed, inside, beyond))


def _is_third(trials: jax.Array) -> jax.Array:
    """Whether ``trials % 3 == 2``; an integer remainder is a kernel of its own."""
    third = (scalar(trials) + 1) / 3
    return third == jnp.floor(third)


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
    slopes = jnp.maximum(jnp.abs(a.slope), jnp.abs(b.slope))
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(d1), slopes))  # keeps the squares in range
    size = jnp.where(size > 0, size, 1)
    discriminant = (d1 / size) ** 2 - (a.slope / size) * (b.slope / size)
    d2 = jnp.sign(b.t - a.t) * (size * tree.sqrt(jnp.maximum(discriminant, 0)))
    bend = b.slope - a.slope + 2 * d2
    t = b.t - (b.t - a.t) * tree.divide(b.slope + d2 - d1, bend)
    return jnp.where((discriminant >= 0) & (bend != 0) & jnp.isfinite(t), t, otherwise)
