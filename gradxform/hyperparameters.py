"""What a method does with its hyperparameters, and the check that reads a function's signature.

Each one may be a Python number, a scalar array or a tracer; a learning rate may also be a schedule.
No Python ``if`` looks at one inside ``update``, so that one compiled program can sweep any of them
under ``jax.vmap``. Python numbers are checked when the method is built.

The range of a number is said once, in the signature: ``momentum: Fraction`` lies in [0, 1).
:func:`checked` reads it there, and so does the lab.
"""

import collections.abc
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import jax
import jax.numpy as jnp
import numpy as np
import optax

P = ParamSpec("P")
R = TypeVar("R")


class Interval(NamedTuple):
    """The numbers from ``low`` up to ``high``, which is not among them itself."""

    low: float
    high: float = math.inf


Scalar: TypeAlias = float | jax.Array
NonNegative: TypeAlias = Annotated[Scalar, Interval(0)]
Positive: TypeAlias = Annotated[
    Scalar, Interval(1.1754943508222875e-38)
]  # the least normal float32
Fraction: TypeAlias = Annotated[Scalar, Interval(0, 1)]
UpToOne: TypeAlias = Annotated[Scalar, Interval(0, 1.000000001)]
BelowHalf: TypeAlias = Annotated[Scalar, Interval(0, 0.5)]
BelowQuarter: TypeAlias = Annotated[Scalar, Interval(0, 0.25)]
Count: TypeAlias = Annotated[Scalar, Interval(1)]
Seed: TypeAlias = Annotated[Scalar, Interval(0, 4294967296)]  # of 32 bits
Int32: TypeAlias = Annotated[Scalar, Interval(0, 2147483648)]
Whole: TypeAlias = Annotated[int, Interval(1)]
Size: TypeAlias = Annotated[
    int,
    Interval(1),
    "a Python integer, since it decides what is compiled; under inject_hyperparams list it in "
    "static_args",
]
Schedule: TypeAlias = Annotated[Callable[[jax.Array], jax.typing.ArrayLike], "a schedule"]
LearningRate: TypeAlias = NonNegative | Schedule


def scalar(value: jax.typing.ArrayLike) -> jax.Array:
    """``value`` in at least float32, whatever dtype a wrapper rounded it to, and strongly typed."""
    return jnp.asarray(value, dtype=jnp.result_type(float))


def below_one(decay: jax.typing.ArrayLike) -> jax.Array:
    """A decay rate, at most one unit of rounding below 1: a wrapper may have rounded it to 1.

    Bias-corrected means are then plain means, the limit, where 1 itself would give 0/0.
    """
    value = scalar(decay)
    return jnp.minimum(value, 1 - jnp.finfo(value.dtype).eps)


def rate(learning_rate: LearningRate, count: jax.Array) -> jax.Array:
    """ε_k: the learning rate at update ``count`` (0 for the first)."""
    if not callable(learning_rate):
        return scalar(learning_rate)
    value = learning_rate(count)
    if not _is_real(value):
        raise TypeError(
            f"learning_rate={shown(learning_rate)}: a schedule must return one number for the "
            f"update count, got {shown(value)}"
        )
    return scalar(value)


# -- the check of a function's arguments


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Checks the arguments of ``function`` against its annotations before it runs.

    A public function that passes its arguments on to others carries this itself, so that an error
    names the function that was called.

    Raises:
      TypeError: an argument is none of the things that its annotation allows.
      ValueError: a number is NaN, infinite or outside its interval, or a choice is not offered.

    >>> @checked
    ... def method(rate: Fraction) -> None: ...
    >>> method(rate=2)
    Traceback (most recent call last):
    ValueError: method(rate=2): rate must be at least 0 and below 1
    """
    parameters = inspect.signature(function).parameters
    positional = [name for name, p in parameters.items() if p.kind != p.KEYWORD_ONLY]

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        # an argument too many or unknown is left to Python, whose message names function and all
        for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
            if name in parameters:
                check_argument(function.__name__, name, value, parameters[name].annotation)
        return function(*args, **kwargs)

    return checking


def check_argument(function: str, name: str, value: object, annotation: Any) -> None:
    """Checks one argument of ``function`` against its annotation; see :func:`checked`.

    An annotation that this module does not know admits everything.
    """
    rules = _rules(annotation)
    for rule in rules:
        if rule.fits(value):
            if rule.interval is not None:
                _check_interval(function, name, value, rule.interval)
            return
    refuse = _refuse_choice if get_origin(annotation) is Literal else _refuse
    refuse(function, name, value, [word for rule in rules for word in rule.words])


def shown(value: object) -> str:
    """``repr(value)`` in one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


class _Rule(NamedTuple):
    """What one member of an annotation admits."""

    fits: Callable[[Any], bool]
    words: tuple[str, ...]  #: what fits, in words
    interval: Interval | None  #: of a number


@functools.cache
def _rules(annotation: Any) -> list[_Rule]:
    return [_Rule(*_rule(member), _interval(member)) for member in _members(annotation)]


def _members(annotation: Any) -> tuple[Any, ...]:
    """What a union is of; one member if it is none."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _rule(member: Any) -> tuple[Callable[[Any], bool], tuple[str, ...]]:
    """Whether a value is what this member of an annotation says, and that in words."""
    number = _is_real, ("a number", "a scalar array")
    base, *notes = get_args(member) if get_origin(member) is Annotated else (member,)
    if notes and isinstance(notes[0], Interval):
        whole = _is_whole, (str(notes[1]) if notes[1:] else "a Python integer",)
        return whole if base is int else number
    if base in (float, jax.Array):
        return number
    if base is bool:
        return lambda value: isinstance(value, bool | np.bool_), ("True", "False")
    if base is types.NoneType:
        return lambda value: value is None, ()
    if get_origin(base) is Literal:
        options = get_args(base)
        words = tuple(map(repr, options))
        return lambda value: isinstance(value, str) and value in options, words
    if base is str:
        return lambda value: isinstance(value, str), ("a name",)
    if get_origin(base) is collections.abc.Iterable:
        return _is_names, ("a list of names",)
    if get_origin(base) is collections.abc.Callable:
        return callable, (str(notes[0]) if notes else "a function",)
    if get_origin(base) is collections.abc.Mapping:
        return lambda value: isinstance(value, collections.abc.Mapping), ("a dictionary",)
    if base is optax.GradientTransformation:
        return _is_method, ("a method, for instance gx.momentum(0.1)",)
    return lambda value: True, ()


def _interval(member: Any) -> Interval | None:
    notes = get_args(member)[1:] if get_origin(member) is Annotated else ()
    return next((note for note in notes if isinstance(note, Interval)), None)


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating)
    return is_number and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    if _is_number(value) or not hasattr(value, "dtype"):
        return _is_number(value)
    is_real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))
    return is_real and getattr(value, "shape", None) == ()


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list | tuple | set | frozenset)
    return is_list and all(isinstance(name, str) for name in value)


def _is_method(value: Any) -> bool:
    is_pair = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    return is_pair and not isinstance(value, type)


def _check_interval(function: str, name: str, value: Any, interval: Interval) -> None:
    """Raises a ValueError where a number, whose value is known, lies outside its interval."""
    if not (_is_number(value) or isinstance(value, np.ndarray)):
        return
    low, high = interval
    try:
        inside = low <= float(value) < high
    except OverflowError:  # an integer beyond every float
        inside = False
    if not inside:
        below = f"below {high:.10g}" if high < math.inf else "finite"
        raise ValueError(
            f"{function}({name}={shown(value)}): {name} must be at least {low:g} and {below}"
        )


def _refuse_choice(function: str, name: str, value: object, expected: list[str]) -> NoReturn:
    raise ValueError(
        f"{function}({name}={shown(value)}): {name} must be one of {', '.join(expected)}"
    )


def _refuse(function: str, name: str, value: object, expected: list[str]) -> NoReturn:
    *most, last = dict.fromkeys(expected)
    words = f"{', '.join(most)} or {last}" if most else last
    raise TypeError(f"{function}({name}={shown(value)}): expected {words}")
