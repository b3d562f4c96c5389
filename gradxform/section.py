"""The section φ(t) = f(x + t d): the bracket of a line search, and the verdict on a trial point.

It follows Hager & Zhang (2005), §4, and Nocedal & Wright (2006), §3.5, one trial at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import in_one_kernel

_FLAT_TRIALS = 5  # number of trial points if rounding hides all differences of the values


class Point(NamedTuple):
    """A point that was evaluated, in at least float32."""

    params: tree.PyTree  #: x
    value: jax.Array  #: f(x)
    grad: tree.PyTree  #: ∇f(x)


class Trial(NamedTuple):
    """A point of the section φ(t) = f(x + t d)."""

    t: jax.Array  #: the step
    value: jax.Array  #: φ(t)
    slope: jax.Array  #: φ'(t)


class Section(NamedTuple):
    """The known points of φ, and the next t to try."""

    origin: Trial  #: t = 0, φ(0) and φ'(0)
    low: Trial  #: the end of the bracket from which φ descends into it
    high: Trial  #: the other end; all numbers are the largest one while there is no other end
    t: jax.Array  #: the step of the trial point in the loop
    resolution: jax.Array  #: the smallest step that changes x
    trials: jax.Array  #: number of trial points of this search so far


class Rules(NamedTuple):
    """When a search accepts a trial point, and when it has failed."""

    decrease: Scalar  #: δ, the part of the predicted decrease that is enough
    curvature: Scalar  #: σ, the part of the slope that may be left
    noise: Scalar  #: relative error of the objective
    max_trials: Scalar  #: number of trial points after which a search has failed


class Verdict(NamedTuple):
    """What a trial point leads to, as flags. If none is set, the search tries another t."""

    accept: jax.Array  #: the trial point is accepted
    retreat: jax.Array  #: the search failed and takes the lowest point it has seen
    reset: jax.Array  #: the search failed and restarts along the negative gradient
    stalled: jax.Array  #: the search along the negative gradient failed too
    wait: jax.Array  #: a point to be accepted without a test was not finite; the loop stays at x
    begins: jax.Array  #: a search begins, at an accepted point or after a failure


def no_section() -> Section:
    """The section before the first search."""

    def number() -> jax.Array:
        return jnp.array(scalar(0), copy=True)

    origin, low, high = (Trial(number(), number(), number()) for _ in range(3))
    return Section(origin, low, high, number(), number(), jnp.array(0, jnp.int32))


def new_section(value: jax.Array, slope: jax.Array, t: jax.Array, resolution: jax.Array) -> Section:
    """A section with φ(0) and φ'(0) known, and the first trial at ``t``."""
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
    longest: jax.Array | None = None,
) -> tuple[Verdict, Section]:
    """The verdict on a trial point, and the section with the next t.

    Args:
      section: the section before this trial.
      trial: the trial point.
      rules: when to accept a trial point.
      take_next: whether the point is accepted without a test.
      steepest: whether the search runs along the negative gradient after a failure.
      spacing: relative spacing of the floating-point numbers of the objective's dtype.
      longest: the largest t within the bounds, None without bounds.
    """
    delta, sigma, noise, max_trials = map(scalar, rules)
    origin = section.origin
    rounding = spacing * jnp.abs(origin.value)
    eps = jnp.maximum(noise * jnp.abs(origin.value), 10 * rounding)
    finite = is_finite(trial)
    is_enough = _is_wolfe(trial, origin, delta, sigma, eps) | _is_at_wall(section, trial, delta)
    if longest is not None:
        is_enough |= (trial.t >= longest) & _is_downhill(trial, origin, delta, rounding)
    accept = finite & (take_next | is_enough)

    low, high, t = _narrow(section, trial, finite, eps, longest)
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
    """The first trial t along a direction whose largest entry is 1.

    It expects the same decrease as in the last step (Nocedal & Wright, eq. 3.60). In the first
    search t is 0.3 ``size``, the largest entry of x. If x = 0, it comes from the value and the
    slope (after Hager & Zhang 2006, I0).
    """
    decrease = jnp.maximum(last.origin.value - value, 0)
    expected = jnp.where(decrease > 0, 2.02 * decrease, last.t * last.origin.slope)
    by_part = first | (expected == 0) | (slope == 0)
    t = jnp.abs(tree.divide(jnp.where(by_part, 0.3 * value, expected), slope))
    t = jnp.where(by_part & (size > 0), 0.3 * size, t)
    return jnp.where(t > 0, t, 1)


def slowness(d: tree.PyTree, x: tree.PyTree, spacing: float) -> tree.PyTree:
    """For each entry the smallest t for which x + t d differs from x; it has no derivative.

    If no t changes an entry, it is the largest number.
    """

    def least(d: jax.Array, x: jax.Array) -> jax.Array:
        most = tree.largest(d.dtype)
        # the entries of d may have any size, so the test is arranged so that nothing overflows
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


def _is_downhill(trial: Trial, origin: Trial, delta: jax.Array, rounding: jax.Array) -> jax.Array:
    """Whether the trial descends enough, up to rounding, and a longer step would descend more."""
    decreased = trial.value <= origin.value + delta * trial.t * origin.slope
    return (decreased | (trial.value <= origin.value + 10 * rounding)) & (trial.slope < 0)


def _is_at_wall(section: Section, trial: Trial, delta: jax.Array) -> jax.Array:
    """Whether the trial descends enough, and points of at most twice its t are not finite.

    The curvature condition may then hold at no point that can be evaluated.
    """
    origin, wall = section.origin, section.high
    near = _is_closed(wall) & (wall.value >= tree.largest()) & (2 * trial.t >= wall.t)
    return near & (trial.value <= origin.value + delta * trial.t * origin.slope)


def _is_exhausted(section: Section, rounding: jax.Array, max_trials: jax.Array) -> jax.Array:
    """Whether further trial points cannot help: too many trials, or the bracket is too small."""
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
    section: Section,
    trial: Trial,
    finite: jax.Array,
    eps: jax.Array,
    longest: jax.Array | None,
) -> tuple[Trial, Trial, jax.Array]:
    """The bracket after a trial that was not accepted, and the next t."""
    before = section.low
    # branches that are not taken must be finite too, or their derivatives are NaN
    trial = tree.select(finite, trial, section.origin._replace(t=trial.t))
    too_far = ~finite | (trial.value > section.origin.value + eps) | (trial.slope >= 0)
    if longest is not None:
        too_far |= trial.t >= longest
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
    guess = jnp.where(_is_third(section.trials), middle, guess)  # so the bracket always shrinks
    inside = jnp.clip(guess, low.t + 0.01 * width, top - 0.01 * width)
    inside = jnp.where(known, inside, low.t + 0.1 * width)

    ahead = _secant(before, trial, 10 * trial.t)
    ahead = jnp.where(ahead > trial.t, ahead, 10 * trial.t)
    beyond = jnp.clip(ahead, 2 * trial.t, 10 * trial.t)
    if longest is not None:
        beyond = jnp.minimum(beyond, longest)
    return low, high, in_one_kernel(jnp.where(closed, inside, beyond))


def _is_third(trials: jax.Array) -> jax.Array:
    """Whether ``trials % 3 == 2``; an integer remainder would take a kernel of its own."""
    third = (scalar(trials) + 1) / 3
    return third == jnp.floor(third)


def _secant(a: Trial, b: Trial, otherwise: jax.Array) -> jax.Array:
    """The t at which the line through the two slopes is zero; ``otherwise`` if it is level."""
    bend = b.slope - a.slope
    t = tree.divide(a.t * b.slope - b.t * a.slope, bend)
    return jnp.where((bend != 0) & jnp.isfinite(t), t, otherwise)


def _cubic(a: Trial, b: Trial, otherwise: jax.Array) -> jax.Array:
    """The minimum of the cubic through two values and slopes (Nocedal & Wright, eq. 3.59).

    It is ``otherwise`` if the cubic has no minimum.
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
