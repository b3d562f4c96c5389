"""Turns the optimiser tables of a config into gradient transformations.

A table names a function and its arguments:

- ``{method = "adam", learning_rate = 1e-3}`` is a method;
- ``{chain = [...]}`` applies several methods in order;
- ``{schedule = "linear_decay", ...}`` replaces a number that may change over time;
- ``curvature = "gauss_newton"`` is a curvature, which has no arguments;
- ``preconditioner = {preconditioner = "hutchinson_diagonal", samples = 4}`` is a preconditioner.

A config can name the public functions of gradxform, optax and optax.contrib that are declared to
return a gradient transformation, a schedule, a curvature or a preconditioner.
"""

import ast
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradxform.lab.experiment import registry
from gradxform.lab.experiment.catalogue import (
    METHOD,
    RETURNS,
    Table,
    admitted,
    described,
    expected_by,
    find,
    split_name,
    takes_curvature,
    unknown,
)
from gradxform.lab.experiment.problems import ConfigError, Problem, suggest
from gradxform.lab.experiment.signatures import (
    Argument,
    Signature,
    interval,
    signature,
)

if TYPE_CHECKING:
    import optax


LARGEST = 3.4e38  # the largest float32


def check(table: Table, path: str) -> Iterator[Problem]:
    """Checks an optimiser's table against the signatures of its functions.

    This imports neither JAX nor Optax.

    >>> [str(p) for p in check({"method": "adam", "learning_rat": 0.1}, "optimizers.a")]
    ["optimizers.a.learning_rat: unknown argument of gradxform.adam, did you mean 'learning_rate'?"]
    """
    tags = [tag for tag in ("method", "chain") if tag in table]
    if len(tags) != 1:
        yield Problem(path, 'needs either method = "NAME" or chain = [{method = "NAME", ...}, ...]')
    elif tags == ["method"]:
        yield from _check_call(table, path, "method")
    else:
        for key in table.keys() - {"chain"}:
            yield Problem(f"{path}.{key}", "a chain takes no arguments: give them to its links")
        links = table["chain"]
        if not isinstance(links, list) or not links:
            yield Problem(f"{path}.chain", f"should be a list of links, found {links!r}")
            return
        for i, link in enumerate(links):
            where = f"{path}.chain[{i}]"
            if isinstance(link, Mapping):
                yield from check(link, where)
            else:
                yield Problem(where, f"should be {METHOD}, found {link!r}")


def check_arguments(function: Signature, arguments: Table, path: str) -> Iterator[Problem]:
    """Checks the arguments of a call against the function's signature.

    Args:
      function: the signature.
      arguments: the arguments by name.
      path: their place in the config.
    """
    for key, value in arguments.items():
        argument = function.arguments.get(key)
        if argument is None:
            hint = suggest(key, function.arguments)
            takes = "" if hint else f"; it takes {', '.join(function.arguments) or 'none'}"
            message = f"unknown argument of {function.name}{hint}{takes}"
            yield Problem(f"{path}.{key}", message)
        else:
            problems = list(_check_value(value, argument, f"{path}.{key}"))
            yield from problems or _check_interval(value, function, key, f"{path}.{key}")
    for key, argument in function.arguments.items():
        if argument.required and key not in arguments:
            kinds = expected_by(argument)
            message = f"missing: {function.name} needs it" + (f" ({kinds})" if kinds else "")
            yield Problem(f"{path}.{key}", message)


def build_all(tables: Mapping[str, Table]) -> "dict[str, optax.GradientTransformationExtraArgs]":
    """The gradient transformations of a config's ``optimizers``, by label.

    Raises:
      ConfigError: a function refuses its arguments. The error lists all such functions.
    """
    built, problems = {}, []
    for label, table in tables.items():
        try:
            built[label] = build(table, f"optimizers.{label}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("optimisers", problems)
    return built


def build(table: Table, path: str) -> "optax.GradientTransformationExtraArgs":
    """The gradient transformation of a table that :func:`check` accepted.

    Raises:
      ConfigError: a function refuses its arguments.

    >>> tx = build({"chain": [{"method": "optax.clip", "max_delta": 1.0}, {"method": "sgd",
    ...     "learning_rate": 0.1}]}, "optimizers.clipped")
    >>> tx.update([2.0], tx.init([0.0]))[0]
    [Array(-0.1, dtype=float32)]
    """
    import optax

    return optax.with_extra_args_support(_build(table, path))


def _check_call(table: Table, path: str, kind: str) -> Iterator[Problem]:
    name = table[kind]
    if not isinstance(name, str):
        yield Problem(f"{path}.{kind}", f"should be a name, found {name!r}")
        return
    function = find(name, kind)
    if function is None:
        yield Problem(f"{path}.{kind}", unknown(name, kind))
        return
    if function.variadic:
        yield Problem(f"{path}.{kind}", f"{function.name}: write chain = [...] instead")
        return
    arguments = {key: value for key, value in table.items() if key != kind}
    yield from check_arguments(function, arguments, path)


def _check_value(value: Any, argument: Argument, path: str) -> Iterator[Problem]:
    wanted = admitted(argument.annotation)
    found = described(value)
    if (wrong := next(_unusable(value), None)) is not None:
        yield Problem(path, f"should be a number that float32 can hold, found {wrong!r}")
    elif wanted is not None and not set(found) & set(wanted):
        texts = [words.strip("'") for words in wanted if words.startswith("'")]
        hint = suggest(value, texts) if isinstance(value, str) else ""
        yield Problem(path, f"should be {expected_by(argument)}, found {value!r}{hint}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, Mapping):
                yield from _check_table(item, f"{path}[{i}]")
    elif isinstance(value, Mapping):
        if argument.annotation is not None and "dict[int," in ast.unparse(argument.annotation):
            for key in value:
                if not _is_whole(key):
                    message = f"the keys here should be whole numbers below 10^9, found {key!r}"
                    yield Problem(f"{path}.{key}", message)
        yield from _check_table(value, path)


def _unusable(value: Any) -> Iterator[int | float]:
    """The numbers in a value that float32 cannot hold; it can hold infinity."""
    match value:
        case list():
            for item in value:
                yield from _unusable(item)
        case Mapping() if not any(kind in value for kind in (*RETURNS, "chain")):
            for item in value.values():
                yield from _unusable(item)
        case int() | float() if not (abs(value) <= LARGEST or abs(value) == math.inf):
            yield value


def _is_whole(key: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,8}", key) is not None


def _check_interval(value: Any, function: Signature, key: str, path: str) -> Iterator[Problem]:
    package, _ = split_name(function.name)
    within = interval(function.arguments[key].annotation)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if package != "gradxform" or within is None or not is_number:
        return
    low, high = within
    if not low <= value < high:
        below = f"below {high:.10g}" if high < math.inf else "finite"
        yield Problem(path, f"should be at least {low:g} and {below}, found {value!r}")


def _check_table(table: Table, path: str) -> Iterator[Problem]:
    if "schedule" in table:
        yield from _check_call(table, path, "schedule")
    elif "method" in table or "chain" in table:
        yield from check(table, path)
    elif "preconditioner" in table:
        yield from _check_call(table, path, "preconditioner")


def _build(value: Any, path: str) -> Any:
    match value:
        case {"chain": links}:
            import optax

            return optax.chain(
                *(_build(link, f"{path}.chain[{i}]") for i, link in enumerate(links))
            )
        case {"method": name, **arguments}:
            return _call(name, arguments, path)
        case {"schedule": name, **arguments}:
            return _call(name, arguments, path)
        case {"preconditioner": name, **arguments}:
            return _call(name, arguments, path)
        case list():
            return [_build(item, f"{path}[{i}]") for i, item in enumerate(value)]
        case Mapping():  # keys are text in TOML, but whole numbers in Optax's tables of boundaries
            return {int(k) if _is_whole(k) else k: _build(v, path) for k, v in value.items()}
        case _:
            return value


def _call(name: str, arguments: Table, path: str) -> Any:
    package, function = split_name(name)
    values = {key: _build(value, f"{path}.{key}") for key, value in arguments.items()}
    own = registry.find("method", name)
    if own is not None:
        return _call_own(own, values, path)
    found = signature(package, function)
    for key, argument in found.arguments.items() if found else ():
        if key in values and takes_curvature(argument.annotation):
            values[key] = _call(values[key], {}, f"{path}.{key}")
    try:
        return getattr(importlib.import_module(package), function)(**values)
    except Exception as error:  # a function of another package may raise anything
        message = str(error)
        # gradxform names the argument, maybe of an inner function: "scale_by_adam(b1=2): …"
        found = re.match(r"\w+\((\w+)=", message)
        if found and found[1] in arguments:
            path, message = f"{path}.{found[1]}", function + message[message.index("(") :]
        raise ConfigError("optimiser", [Problem(path, message)]) from error


def _call_own(own: registry.Entry, arguments: Table, path: str) -> Any:
    try:
        made = own.make(**arguments)
    except Exception as error:  # what a user's function raises is unknown
        said = registry.in_own_words(error, own.make)
        raise ConfigError("optimiser", [Problem(path, said)]) from error
    if not all(callable(getattr(made, name, None)) for name in ("init", "update")):
        message = f"{own.name} should return a gradient transformation, found {made!r:.200}"
        raise ConfigError("optimiser", [Problem(path, message)])
    return made
