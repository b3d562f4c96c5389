"""Hyperparameters: their types, and the check of a function's arguments.

A hyperparameter is a Python number, a scalar array or a tracer. A learning rate may also be a
schedule. No Python ``if`` looks at one inside ``update``, so one compiled program can sweep any of
them under ``jax.vmap``. Python numbers are checked when the method is built.

The signature alone says which numbers are allowed: ``momentum: Fraction`` lies in [0, 1).
:func:`checked` reads the range there, and so does the lab.
"""

import ast
import collections.abc
import functools
import inspect
import math
import re
import textwrap
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
F = TypeVar("F", bound=Callable[..., Any])


class Interval(NamedTuple):
    """The numbers x with ``low`` ≤ x < ``high``."""

    low: float
    high: float = math.inf


_LARGEST = 1.7976931348623157e308  # the largest float64

Scalar: TypeAlias = float | jax.Array
Finite: TypeAlias = Annotated[Scalar, Interval(-_LARGEST)]
NonNegative: TypeAlias = Annotated[Scalar, Interval(0)]
Positive: TypeAlias = Annotated[
    Scalar, Interval(1.1754943508222875e-38)
]  # the least normal float32
Fraction: TypeAlias = Annotated[Scalar, Interval(0, 1)]
UpToOne: TypeAlias = Annotated[Scalar, Interval(0, 1.000000001)]
BelowHalf: TypeAlias = Annotated[Scalar, Interval(0, 0.5)]
BelowQuarter: TypeAlias = Annotated[Scalar, Interval(0, 0.25)]
AtLeastOne: TypeAlias = Annotated[Scalar, Interval(1)]
Count: TypeAlias = AtLeastOne
Seed: TypeAlias = Annotated[Scalar, Interval(0, 4294967296)]  # of 32 bits
Int32: TypeAlias = Annotated[Scalar, Interval(0, 2147483648)]
PositiveInt: TypeAlias = Annotated[int, Interval(1)]
Length: TypeAlias = Annotated[int, Interval(0)]
Size: TypeAlias = Annotated[
    int,
    Interval(1),
    "a Python integer, since it decides what is compiled; under inject_hyperparams list it in "
    "static_args",
]
Schedule: TypeAlias = Annotated[Callable[[jax.Array], jax.typing.ArrayLike], "a schedule"]
LearningRate: TypeAlias = NonNegative | Schedule


def scalar(value: jax.typing.ArrayLike) -> jax.Array:
    """``value`` as a strongly typed array of at least float32.

    A wrapper may have rounded it to a narrower dtype.
    """
    return jnp.asarray(value, dtype=jnp.result_type(float))


def below_one(decay: jax.typing.ArrayLike) -> jax.Array:
    """``decay``, or the largest number below 1 if a wrapper has rounded it to 1.

    A bias-corrected mean then becomes the plain mean, which is the limit. At 1 it would be 0/0.
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

    Every public function carries this, even if it only passes its arguments on. An error then names
    the function that the user called. The signature is made :func:`readable`.

    Raises:
      TypeError: the annotation does not allow an argument of this type.
      ValueError: a number is NaN, infinite or outside its interval, or a name is not one of the
        choices.

    >>> @checked
    ... def method(rate: Fraction) -> None: ...
    >>> method(rate=2)
    Traceback (most recent call last):
    ValueError: method(rate=2): rate must be at least 0 and below 1
    """
    parameters = inspect.signature(function).parameters
    positional = [name for name, p in parameters.items() if p.kind != p.KEYWORD_ONLY]
    rules = functools.cache(lambda: {name: _rules(p.annotation) for name, p in parameters.items()})

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        # Python itself reports surplus and unknown arguments
        rules_of = rules()
        for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
            if name in rules_of and not rules_of[name].surely_fits(value):
                _check(function.__name__, name, value, rules_of[name])
        return function(*args, **kwargs)

    return readable(checking)


class _AsWritten(NamedTuple):
    """An annotation whose ``repr`` is its text in the source, without module names."""

    function: Callable[..., Any]
    name: str  #: the argument, or "return"
    annotation: Any  #: what Python makes of the text

    def __repr__(self) -> str:
        text = _written_annotations(self.function).get(self.name)
        return inspect.formatannotation(self.annotation) if text is None else text


def readable(function: F) -> F:
    """``function`` with a signature that ``help`` prints with the names of the type aliases.

    Python would print what each alias stands for. ``typing.get_type_hints`` gives the true types.

    >>> @readable
    ... def method(learning_rate: LearningRate, b1: Fraction = 0.9) -> optax.Schedule: ...
    >>> inspect.signature(method)
    <Signature (learning_rate: LearningRate, b1: Fraction = 0.9) -> Schedule>
    """

    def written(name: str, annotation: Any) -> Any:
        is_empty = annotation is inspect.Signature.empty
        return annotation if is_empty else _AsWritten(function, name, annotation)

    signature = inspect.signature(function)
    vars(function)["__signature__"] = signature.replace(
        parameters=[
            p.replace(annotation=written(p.name, p.annotation))
            for p in signature.parameters.values()
        ],
        return_annotation=written("return", signature.return_annotation),
    )
    return function


@functools.cache
def _written_annotations(function: Callable[..., Any]) -> dict[str, str]:
    """The annotations of a function as its source has them; empty without a source."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    if not isinstance(node, ast.FunctionDef):
        return {}
    args = node.args
    arguments = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    found = {a.arg: a.annotation for a in arguments if a} | {"return": node.returns}
    return {name: _without_modules(x) for name, x in found.items() if x}


def _without_modules(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value  # a forward reference
    return re.sub(r"(?:\w+\.)+(\w)", r"\1", ast.unparse(annotation))


def check_argument(function: str, name: str, value: object, annotation: Any) -> None:
    """Checks one argument of ``function`` against its annotation; see :func:`checked`.

    An annotation that this module does not know allows every value.
    """
    _check(function, name, value, _rules(annotation))


def shown(value: object) -> str:
    """``repr(value)`` in one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


class _Rule(NamedTuple):
    """What one member of an annotation allows."""

    fits: Callable[[Any], bool]  #: whether a value is of the right type
    words: tuple[str, ...]  #: the values allowed, in words
    interval: Interval | None  #: the range of a number


class _Rules(NamedTuple):
    """What an annotation allows."""

    members: list[_Rule]
    is_choice: bool  #: whether it is a list of names
    surely_fits: Callable[[Any], bool]  #: a quick test; if it says no, the value may still fit


@functools.cache
def _rules(annotation: Any) -> _Rules:
    members = [_Rule(*_rule(member), _interval(member)) for member in _members(annotation)]
    return _Rules(members, get_origin(annotation) is Literal, _quick_test(members[0]))


_PLAIN = (int, float)


def _quick_test(rule: _Rule) -> Callable[[Any], bool]:
    if rule.interval is None:
        return rule.fits
    low, high = rule.interval.low, min(rule.interval.high, _LARGEST)
    kinds = (int,) if rule.fits is _is_integer else _PLAIN
    return lambda value: type(value) in kinds and low <= value < high


def _check(function: str, name: str, value: object, rules: _Rules) -> None:
    for rule in rules.members:
        if rule.fits(value):
            if rule.interval is not None and not _lies_in(value, rule.interval):
                _refuse_number(function, name, value, rule.interval)
            return
    refuse = _refuse_choice if rules.is_choice else _refuse
    refuse(function, name, value, [word for rule in rules.members for word in rule.words])


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its own only member."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _rule(member: Any) -> tuple[Callable[[Any], bool], tuple[str, ...]]:
    """A test of whether a value fits this member of an annotation, and the same in words."""
    number = _is_real, ("a number", "a scalar array")
    base, *notes = get_args(member) if get_origin(member) is Annotated else (member,)
    if notes and isinstance(notes[0], Interval):
        integer = _is_integer, (str(notes[1]) if notes[1:] else "a Python integer",)
        return integer if base is int else number
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
    if get_origin(base) in (tuple, list):
        kind = get_origin(base)
        return lambda value: isinstance(value, kind), (f"a {kind.__name__}",)
    if get_origin(base) is collections.abc.Mapping:
        return lambda value: isinstance(value, collections.abc.Mapping), ("a dictionary",)
    if base is optax.GradientTransformation:
        return _is_method, ("a method, for instance gx.momentum(0.1)",)
    if isinstance(base, type) and issubclass(base, tuple):
        return lambda value: isinstance(value, base), (
            str(notes[0]) if notes else f"a {base.__name__}",
        )
    return lambda value: True, ()


def _interval(member: Any) -> Interval | None:
    notes = get_args(member)[1:] if get_origin(member) is Annotated else ()
    return next((note for note in notes if isinstance(note, Interval)), None)


_NUMBERS = (int, float, np.integer, np.floating)


def _is_number(value: object) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
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


def _lies_in(value: Any, interval: Interval) -> bool:
    """Whether a number lies in its interval. Traced numbers are not checked."""
    if not (_is_number(value) or isinstance(value, np.ndarray)):
        return True
    try:
        return interval.low <= float(value) < interval.high
    except OverflowError:  # an integer beyond every float
        return False


def _refuse_number(function: str, name: str, value: object, interval: Interval) -> NoReturn:
    low, high = interval
    least = [f"at least {low:g}"] if low > -_LARGEST else []
    range_ = " and ".join([*least, f"below {high:.10g}" if high < math.inf else "finite"])
    raise ValueError(f"{function}({name}={shown(value)}): {name} must be {range_}")


def _refuse_choice(function: str, name: str, value: object, expected: list[str]) -> NoReturn:
    raise ValueError(
        f"{function}({name}={shown(value)}): {name} must be one of {', '.join(expected)}"
    )


def _refuse(function: str, name: str, value: object, expected: list[str]) -> NoReturn:
    *most, last = dict.fromkeys(expected)
    words = f"{', '.join(most)} or {last}" if most else last
    raise TypeError(f"{function}({name}={shown(value)}): expected {words}")
