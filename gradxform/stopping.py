"""When :func:`gradxform.minimize` stops: rules as values, combined by ``&`` and ``|``.

A rule is a function of the :class:`Progress` of a run. Its numbers are traced, so other numbers do
not compile again, and each lane of ``jax.vmap`` has its own verdict.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradxform import tree
from gradxform.hyperparameters import Count, Finite, NonNegative, checked, shown


class Progress(NamedTuple):
    """What a stop rule sees, after each evaluation of value and gradient.

    Your own rule is a function of this that returns one boolean, with JAX operations only:
    ``gx.minimize(fn, params, stop=lambda progress: progress.value < 0.1)``.

    A step is a change of the accepted point: with a line search or trust region it can take several
    evaluations. Before the first step its changes are infinite.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> rule = lambda progress: progress.grad_norm < 1e-3 * progress.first_grad_norm
    >>> solution = gx.minimize(lambda x: jnp.sum((x - 1) ** 4), jnp.zeros(2), stop=rule)
    >>> bool(solution.grad_norm < 1e-3 * 4), gx.Status(int(solution.status)).name
    (True, 'stopped')
    """

    params: tree.PyTree  #: the parameters evaluated last; with a search, a trial point
    value: jax.Array  #: the objective there
    grad_norm: jax.Array  #: largest absolute gradient entry there, without frozen leaves
    first_value: jax.Array  #: the objective at the start
    first_grad_norm: jax.Array  #: largest absolute gradient entry at the start
    value_change: jax.Array  #: absolute change of the value in the last step
    params_change: jax.Array  #: largest absolute change of a parameter in the last step
    params_size: jax.Array  #: largest absolute parameter
    decrease: jax.Array  #: lowest value of the points before, minus the value here
    expected: jax.Array  #: the decrease that the method expected here; infinite if it tells none
    relative_step: jax.Array  #: ``relative_step`` of ``info``; infinite if the method tells none
    steps: jax.Array  #: number of updates so far
    evaluations: jax.Array  #: number of evaluations of value and gradient so far


Test: TypeAlias = Callable[[Progress], jax.typing.ArrayLike]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopRule:
    """A stop rule with numbers: ``rule(progress)`` says whether to stop.

    ``a & b`` stops if both do, ``a | b`` if one of them does. Either may be a function of your own.
    """

    test: Callable[..., jax.typing.ArrayLike] = dataclasses.field(metadata={"static": True})
    means_success: bool = dataclasses.field(metadata={"static": True})
    parts: tuple[Any, ...]  #: the numbers of the test, or the rules that it combines

    def __call__(self, progress: Progress) -> jax.Array:
        return jnp.asarray(self.test(progress, *self.parts))

    def __and__(self, other: Test) -> "StopRule":
        return _combined(_both, self, other)

    def __rand__(self, other: Test) -> "StopRule":
        return _combined(_both, other, self)

    def __or__(self, other: Test) -> "StopRule":
        return _combined(_either, self, other)

    def __ror__(self, other: Test) -> "StopRule":
        return _combined(_either, other, self)


@checked
def small_gradient(
    atol: NonNegative = 0.0, rtol: NonNegative = 0.0, value_rtol: NonNegative = 0.0
) -> StopRule:
    """Stops at a small gradient g.

    The rule holds if one of these does::

        |g| ≤ atol,   |g| ≤ rtol · |g at the start|,   |g| ≤ value_rtol · |f|

    |g| is the largest absolute entry, without frozen leaves. The run has then converged.

    Args:
      atol: absolute bound.
      rtol: bound relative to the gradient at the start.
      value_rtol: bound relative to the value.

    Returns:
      A rule for ``stop`` of :func:`minimize`.

    Raises:
      TypeError, ValueError: a number is of the wrong type or negative, or all are zero.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tiny = lambda x: 1e-20 * jnp.sum((x - 1) ** 2)  # its gradient is below 1e-6 everywhere
    >>> gx.minimize(tiny, jnp.zeros(2), stop=gx.small_gradient(rtol=1e-3)).params.round(3)
    Array([1., 1.], dtype=float32)
    """
    numbers = atol, rtol, value_rtol
    if all(isinstance(x, int | float) and x == 0 for x in numbers):
        raise ValueError(
            "small_gradient(atol=0): all bounds are zero; give a positive one, for instance "
            "rtol=1e-6"
        )
    return StopRule(_has_small_gradient, True, tuple(map(_number, numbers)))


@checked
def small_change(rtol: NonNegative, *, of: Literal["value", "params", "both"] = "both") -> StopRule:
    """Stops when a step changes hardly anything any more.

    The rule holds if both of these do::

        |f_new − f_old| ≤ rtol · |f_new|   and   |θ_new − θ_old| ≤ rtol · |θ_new|

    |θ| is the largest absolute entry. The run has then converged. Methods with a small learning
    rate make small steps everywhere; look at the gradient with them.

    Args:
      rtol: the relative change that is small.
      of: ``"value"`` or ``"params"`` tests only one of the two conditions.

    Returns:
      A rule for ``stop`` of :func:`minimize`.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: 1 + jnp.sum((x - 1) ** 4)
    >>> rule = gx.small_change(1e-4, of="value") | gx.max_evaluations(100)
    >>> bool(gx.minimize(bowl, jnp.zeros(2), stop=rule).converged)
    True
    """
    tests = {"value": _has_small_step, "params": _has_small_move, "both": _has_small_change}
    return StopRule(tests[of], True, (_number(rtol),))


@checked
def small_step(*, value_rtol: NonNegative = 1e-14, params_rtol: NonNegative = 1e-8) -> StopRule:
    """Stops when the method itself expects nothing more of its steps.

    With the value f, the decrease Δf in the last evaluation, the decrease E that the method had
    expected there, and the length ℓ of its step relative to the parameters, it stops if one of
    these holds::

        E ≤ value_rtol · |f|   and   |Δf| ≤ 100 value_rtol · |f|
        ℓ ≤ params_rtol        and   f has not risen

    Rounding is allowed for: Δf may be 100 units of rounding, ℓ one, and E the square of ten. The
    run has then converged. :func:`gradxform.least_squares` stops so by default. Methods with a line
    search tell E, trust regions tell it too, and :func:`gradxform.levenberg_marquardt` tells ℓ, in
    its own scaling; with other methods the rule never holds.

    Args:
      value_rtol: bound on E and Δf. For a sum of squares, 1e-14 means that the parameters would
        move by about 1e-7 of their standard errors.
      params_rtol: bound on ℓ.

    Returns:
      A rule for ``stop`` of :func:`minimize`.

    References:
      Moré, "The Levenberg-Marquardt algorithm: implementation and theory" (1978), §7.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: 1 + jnp.sum((x - 1) ** 4)
    >>> bool(gx.minimize(bowl, jnp.zeros(2), gx.trust_region(), stop=gx.small_step()).converged)
    True
    """
    return StopRule(_expects_little, True, (_number(value_rtol), _number(params_rtol)))


@checked
def reached(value: Finite) -> StopRule:
    """Stops at the first point whose value is at most ``value``, with status ``stopped``.

    Args:
      value: the target.

    Returns:
      A rule for ``stop`` of :func:`minimize`.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: jnp.sum((x - 1) ** 2)
    >>> solution = gx.minimize(bowl, jnp.zeros(2), gx.sgd(0.1), stop=gx.reached(0.5))
    >>> int(solution.steps), gx.Status(int(solution.status)).name
    (4, 'stopped')
    """
    return StopRule(_has_reached, False, (_number(value),))


@checked
def max_evaluations(number: Count) -> StopRule:
    """Stops after ``number`` evaluations of value and gradient, with status ``stopped``.

    An update that evaluates more than once, such as that of ``coordinate_descent``, is finished.

    Args:
      number: the budget, at least 1.

    Returns:
      A rule for ``stop`` of :func:`minimize`.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> stop = gx.small_gradient(1e-6) | gx.max_evaluations(5)
    >>> int(gx.minimize(lambda x: jnp.sum(x**4), jnp.ones(2), gx.sgd(0.1), stop=stop).evaluations)
    5
    """
    return StopRule(_is_spent, False, (_number(number, np.int32),))


class Ends(NamedTuple):
    """The verdict of a rule."""

    stops: jax.Array  #: whether the rule holds
    succeeds: jax.Array  #: whether that means convergence


def ends(rule: Test, progress: Progress) -> Ends:
    """Whether ``rule`` stops a run, and whether the run has then converged.

    Raises:
      TypeError: a function of the user's does not return one boolean.
    """
    if isinstance(rule, StopRule) and rule.test in (_both, _either):
        a, b = (ends(part, progress) for part in rule.parts)
        stops = a.stops & b.stops if rule.test is _both else a.stops | b.stops
        return Ends(stops, stops & (a.succeeds | b.succeeds))
    holds = rule(progress)
    is_array = isinstance(holds, jax.Array | np.ndarray | np.generic)
    if not (is_array and holds.dtype == bool and holds.shape == ()) and type(holds) is not bool:
        got = f"{holds.dtype} of shape {holds.shape}" if is_array else shown(holds)
        raise TypeError(
            f"minimize(stop={shown(rule)}): a stop rule must return one boolean, got {got}; "
            "compare, for instance progress.value < 0.1"
        )
    means_success = isinstance(rule, StopRule) and rule.means_success
    return Ends(jnp.asarray(holds), jnp.asarray(holds) & means_success)


def _combined(test: Callable[..., jax.Array], first: Test, second: Test) -> StopRule:
    for rule in (first, second):
        if not callable(rule):
            raise TypeError(
                f"stop={shown(rule)}: & and | combine stop rules, and functions of the progress"
            )
    return StopRule(test, False, (first, second))


def _both(progress: Progress, first: Test, second: Test) -> jax.Array:
    return jnp.asarray(first(progress)) & jnp.asarray(second(progress))


def _either(progress: Progress, first: Test, second: Test) -> jax.Array:
    return jnp.asarray(first(progress)) | jnp.asarray(second(progress))


def _number(value: Any, dtype: Any = float) -> Any:
    """``value`` as an array, so that it is an input of the compiled run."""
    return value if isinstance(value, jax.Array) else np.asarray(value, dtype)[()]


def _has_small_gradient(
    progress: Progress, atol: jax.Array, rtol: jax.Array, value_rtol: jax.Array
) -> jax.Array:
    bounds = atol, rtol * progress.first_grad_norm, value_rtol * jnp.abs(progress.value)
    return progress.grad_norm <= jnp.maximum(bounds[0], jnp.maximum(*bounds[1:]))


def _has_small_step(progress: Progress, rtol: jax.Array) -> jax.Array:
    return progress.value_change <= rtol * jnp.abs(progress.value)


def _has_small_move(progress: Progress, rtol: jax.Array) -> jax.Array:
    return progress.params_change <= rtol * progress.params_size


def _has_small_change(progress: Progress, rtol: jax.Array) -> jax.Array:
    return _has_small_step(progress, rtol) & _has_small_move(progress, rtol)


def _expects_little(progress: Progress, value_rtol: jax.Array, params_rtol: jax.Array) -> jax.Array:
    unit = jnp.finfo(progress.value.dtype).eps
    size = jnp.abs(progress.value)
    rounding = 100 * unit * size
    is_level = jnp.abs(progress.decrease) <= jnp.maximum(100 * value_rtol * size, rounding)
    is_short = progress.relative_step <= jnp.maximum(params_rtol, unit)
    is_idle = progress.expected <= jnp.maximum(value_rtol, (10 * unit) ** 2) * size
    is_end = is_short & (progress.decrease >= -rounding)
    # infinite at the start, and at a trial point that is not finite
    return jnp.isfinite(progress.decrease) & (is_end | (is_level & is_idle))


def _has_reached(progress: Progress, value: jax.Array) -> jax.Array:
    return progress.value <= value


def _is_spent(progress: Progress, number: jax.Array) -> jax.Array:
    return progress.evaluations >= number
