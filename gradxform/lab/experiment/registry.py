"""The user's own parts of an experiment: data sets, models, tasks, surfaces and methods by name.

A config names them as it names ours. A decorator registers a function under a name; the function is
called when a run needs it. This module imports no JAX, and only the command line or Python code
makes it hold anything: no config can.
"""

import ast
import contextlib
import functools
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

from gradxform.lab.experiment.signatures import Argument, Signature, public_names, ranges

F = TypeVar("F", bound=Callable[..., Any])

OURS: dict[str, tuple[str, ...]] = {
    "dataset": ("digits", "mnist", "fashion_mnist", "cifar10", "synthetic_text", "burgers"),
    "model": ("linear", "logistic", "keras_mlp", "mlp", "cnn", "autoencoder", "transformer"),
    "task": (
        *("classification", "regression", "autoencoder", "language", "physics", "surface"),
        "curve_fit",
    ),
    "surface": ("quadratic", "rosenbrock", "beale", "saddle"),
    "curve": ("line", "power", "exponential", "saturation", "logistic", "gaussian"),
    "method": (),  # the public names of gradxform
    "logger": ("tensorboard",),
}
"""The names that the lab itself has, by kind of entry."""

GIVEN = {
    "model": ("shape", "outputs", "key", "rngs"),
    "curve": ("x",),
    "logger": ("folder", "config"),
}
"""Arguments that the lab gives to a function of a kind, if it has them; the others are options."""

_ROW = {"optimizer", "step", "value"}  # columns of a fit's metrics
_LONGEST = 500  # characters of an error's text


class OwnError(RuntimeError):
    """A function of the user failed; the message is one line in the error's own words."""


class Entry(NamedTuple):
    """A function that a user registered."""

    name: str
    make: Callable[..., Any]
    signature: Signature  #: its options
    file: str | None  #: the ``--with`` file that registered it
    facts: Mapping[str, Any]  #: other arguments of the decorator


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in OURS}
_file: str | None = None  # the ``--with`` file that runs now


def dataset(name: str) -> Callable[[F], F]:
    """Registers a data set for ``[task]`` with ``dataset = "NAME"``.

    The function returns ``(x, y)``, which the config splits into parts, or
    ``((x, y), (x_test, y_test))``. The first axis of an array counts examples. For a classification
    ``y`` holds one label an example, numbers or texts; for a regression it holds numbers. The
    function's arguments are the keys of ``dataset_options``.

    Args:
      name: the name in configs.

    Raises:
      ValueError: the name is taken, or is not letters, digits, ``_`` and ``-``.

    >>> import numpy as np
    >>> @dataset("xor")
    ... def xor(repeats: int = 50):
    ...     x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * repeats)
    ...     return x, x[:, 0] ^ x[:, 1]
    >>> named("dataset")
    ('xor',)
    >>> forget()
    """
    return _registering("dataset", name)


def model(name: str) -> Callable[[F], F]:
    """Registers a model for ``[task]`` with ``model = "NAME"``.

    The function returns a Flax linen or NNX module, an Equinox module, or a pair of functions
    ``init(key) -> params`` and ``apply(params, x) -> outputs``. An Equinox module gets one example,
    all others get a batch. A function that has an argument of the name ``shape``, ``outputs``,
    ``key`` or ``rngs`` gets the shape of one input, the number of outputs, a random key or
    ``nnx.Rngs``. Its other arguments are the keys of ``model_options``.

    A module class can be decorated too.

    Args:
      name: the name in configs.

    Raises:
      ValueError: the name is taken, or is not letters, digits, ``_`` and ``-``.
    """
    return _registering("model", name)


def task(name: str) -> Callable[[F], F]:
    """Registers a task for ``[task]`` with ``kind = "NAME"``.

    The function returns a ``gradxform.lab.Task``. Its arguments are the other keys of ``[task]``.

    Args:
      name: the name in configs.

    Raises:
      ValueError: the name is taken, or is not letters, digits, ``_`` and ``-``.
    """
    return _registering("task", name)


def surface(
    name: str,
    *,
    start: tuple[float, float],
    bounds: tuple[tuple[float, float], tuple[float, float]],
    minima: tuple[tuple[float, float], ...] = (),
    formula: str = "f(x, y)",
) -> Callable[[F], F]:
    """Registers a function of two variables for ``[task]`` with ``surface = "NAME"``.

    The function takes a vector of length 2 and returns one number.

    Args:
      name: the name in configs.
      start: where methods start, unless the config says otherwise.
      bounds: the ranges of x and y to draw.
      minima: the global minima, the one nearest to the start first. Without them a sweep takes
        every run that converged as solved.
      formula: the formula in LaTeX, for the title of pictures.

    Raises:
      ValueError: the name is taken, or an argument has another form.
    """
    pairs = {"start": (start,), "bounds": bounds, "minima": minima}
    for argument, values in pairs.items():
        is_good = all(_is_pair(value) for value in values)
        if not is_good or (argument == "bounds" and len(values) != 2):
            found = start if argument == "start" else values
            raise ValueError(f"lab.surface({argument}={found!r}): give pairs of numbers")
    if not all(low < high for low, high in bounds):
        raise ValueError(f"lab.surface(bounds={bounds!r}): the first of a pair should be the lower")
    facts = {"start": start, "bounds": bounds, "minima": minima, "formula": formula}
    return _registering("surface", name, facts)


def curve(name: str) -> Callable[[F], F]:
    """Registers a curve for ``[task]`` with ``kind = "curve_fit"`` and ``model = "NAME"``.

    The function has an argument ``x``, an array of all points, and returns the values there. Its
    other arguments are the parameters, and their default values are where the fit starts.

    Args:
      name: the name in configs.

    Raises:
      ValueError: the name is taken, or is not letters, digits, ``_`` and ``-``; or the function has
        no argument ``x``, or no other.

    >>> import jax.numpy as jnp
    >>> @curve("decay")
    ... def decay(x, height=1.0, rate=0.1):
    ...     return height * jnp.exp(-rate * x)
    >>> forget()
    """

    def register(function: F) -> F:
        names = set(parameters_of(function))
        if "x" not in names or names == {"x"} or names & _ROW:
            wanted = "an argument x and parameters with other names than step and value"
            raise ValueError(f"lab.curve(name={name!r}): the function needs {wanted}")
        return _register("curve", name, function)

    _check_name("curve", name)
    return register


def method(name: str) -> Callable[[F], F]:
    """Registers a method for an optimiser with ``method = "NAME"``.

    The function returns a gradient transformation, such as ``gx.chain(…)``. Its arguments are the
    keys of the optimiser's table. A sweep traces its numbers, as it does ours: an argument is a
    number if its annotation is ``float``, or if it has no annotation. Annotate with ``int`` what
    sets a shape, and with ``gradxform.hyperparameters.LearningRate`` what may be a schedule.

    Args:
      name: the name in configs.

    Raises:
      ValueError: the name is taken, or is not letters, digits, ``_`` and ``-``.
    """
    return _registering("method", name)


def logger(name: str) -> Callable[[F], F]:
    """Registers a logger for ``gradxform run --log NAME``.

    The function is a generator. It yields once: a function of an optimiser's label and a row of its
    metrics, which is called after each epoch. What follows the ``yield`` runs at the end, also of
    an interrupted run. An argument of the name ``folder`` or ``config`` gets the folder of the run,
    a ``Path``, or the config as nested dicts.

    Args:
      name: the name on the command line.

    Raises:
      ValueError: the name is taken, or is not letters, digits, ``_`` and ``-``; or the function is
        not a generator, or has other arguments.

    >>> @logger("printer")
    ... def printer(config):
    ...     print("begin", config["name"])
    ...     yield lambda label, row: print(label, row["epoch"])
    ...     print("end")
    >>> forget()
    """

    def register(function: F) -> F:
        given = set(GIVEN["logger"])
        if not inspect.isgeneratorfunction(function) or set(parameters_of(function)) - given:
            wanted = "a generator function, whose arguments may be folder and config"
            raise ValueError(f"lab.logger(name={name!r}): decorate {wanted}")
        return _register("logger", name, function)

    _check_name("logger", name)
    return register


def named(kind: str) -> tuple[str, ...]:
    """The names that users registered, of one kind, in the order of their registration."""
    return tuple(_entries[kind])


def find(kind: str, name: object) -> Entry | None:
    """The entry of a name, or ``None``."""
    return _entries[kind].get(name) if isinstance(name, str) else None


def choices(kind: str, ours: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a config can use at a place: ``ours`` there, and the users'."""
    return (*ours, *named(kind))


def forget(*, of_files: bool = False) -> None:
    """Removes every entry, or only those that ``--with`` files registered."""
    for entries in _entries.values():
        for name in [name for name, entry in entries.items() if entry.file or not of_files]:
            del entries[name]


@contextlib.contextmanager
def registering(file: str) -> Iterator[None]:
    """While this lasts, the decorators register for a ``--with`` file."""
    global _file
    before, _file = _file, file
    try:
        yield
    finally:
        _file = before


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of what makes an object of a class."""
    found = dict(inspect.signature(function).parameters)
    if isinstance(function, type) and inspect.isfunction(function.__init__):
        # the metaclass of a module may hide them
        found = dict(inspect.signature(function.__init__).parameters)
        found.pop(next(iter(found), ""), None)
    return found


def in_own_words(
    error: BaseException, function: Callable[..., Any] | None = None, file: str = ""
) -> str:
    """One line: the place in the user's file where an error came from, and what it says.

    Args:
      error: the error.
      function: the function of the user that raised it.
      file: the path of the user's file; that of ``function`` if not given.
    """
    own = inspect.unwrap(function) if function is not None else None
    if not file and own is not None:
        file = _file_of(own)
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if file and frame.f_code.co_filename == file]
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, said = [error.lineno or 1], error.msg
    first = getattr(getattr(own, "__code__", None), "co_firstlineno", None)
    line = lines[-1] if lines else first
    where = f"{PurePath(file).name}, line {line}: " if file and line else ""
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return where + (text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")


def of_user(error: BaseException) -> str | None:
    """:func:`in_own_words` of an error that passed through a file of the user, else ``None``."""
    files = {_file_of(entry.make) for entries in _entries.values() for entry in entries.values()}
    frames = traceback.walk_tb(error.__traceback__)
    own = [frame.f_code.co_filename for frame, _ in frames if frame.f_code.co_filename in files]
    return in_own_words(error, file=own[-1]) if own else None


def _file_of(function: Callable[..., Any]) -> str:
    with contextlib.suppress(TypeError):  # a function without source text
        return inspect.getsourcefile(inspect.unwrap(function)) or ""
    return ""


def _registering(kind: str, name: str, facts: Mapping[str, Any] | None = None) -> Callable[[F], F]:
    _check_name(kind, name)
    return functools.partial(_register, kind, name, facts=facts)


def _check_name(kind: str, name: str) -> None:
    call = f"lab.{kind}(name={name!r:.60})"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError(f"{call}: give a letter, then letters, digits, '_' and '-'")
    if name in OURS[kind] or (kind == "method" and name in public_names("gradxform")):
        raise ValueError(f"{call}: gradxform has a {kind} of this name; choose another")


def _register(kind: str, name: str, function: F, facts: Mapping[str, Any] | None = None) -> F:
    call = f"lab.{kind}(name={name!r})"
    if not callable(function):
        raise ValueError(f"{call}: decorate a function, found {function!r:.60}")
    there = _entries[kind].get(name)
    if there is not None and there.file != _file and None not in (there.file, _file):
        raise ValueError(f"{call}: {there.file} has registered this name; choose another")
    signature = _signature(function, name, GIVEN.get(kind, ()))
    _entries[kind][name] = Entry(name, function, signature, _file, facts or {})
    return function


def _signature(function: Callable[..., Any], name: str, given: tuple[str, ...]) -> Signature:
    """The options of a function, as a signature read from source text has them."""
    parameters = parameters_of(function).values()
    hidden = {*given, "parent", "name"} if isinstance(function, type) else set(given)
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    arguments = {
        p.name: Argument(_annotation(p), p.default is p.empty)
        for p in named
        if p.name not in hidden
    }
    variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    return Signature(name, arguments, variadic, "", summary)


def _annotation(parameter: inspect.Parameter) -> ast.expr | None:
    """An annotation as an expression; without one, what the default value suggests."""
    found = parameter.annotation
    if found is parameter.empty:
        default = parameter.default
        if isinstance(default, bool):
            return ast.Name("bool")
        if isinstance(default, int | float) or default is parameter.empty:
            return ast.Name("Scalar")
        return ast.Name("str") if isinstance(default, str) else None
    ours = sys.modules.get("gradxform.hyperparameters")
    known = [name for name in (*ranges(), "LearningRate") if getattr(ours, name, ours) == found]
    written = found if isinstance(found, str) else inspect.formatannotation(found)
    text = known[0] if known else written.removeprefix("gradxform.hyperparameters.")
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(x, int | float) for x in value)
    )
