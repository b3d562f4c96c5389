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
import difflib
import functools
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradxform.lab.experiment import registry
from gradxform.lab.experiment.problems import ConfigError, Problem, suggest
from gradxform.lab.experiment.signatures import (
    Argument,
    Signature,
    interval,
    public_names,
    ranges,
    signature,
)

if TYPE_CHECKING:
    import optax

Table = Mapping[str, Any]

PACKAGES = ("gradxform", "optax", "optax.contrib")
RETURNS = {
    "method": ("GradientTransformation", "GradientTransformationExtraArgs"),
    "schedule": ("Schedule",),
    "curvature": ("Curvature",),
    "preconditioner": ("Preconditioner",),
}
LARGEST = 3.4e38  # the largest float32
METHOD, SCHEDULE = 'a table {method = "NAME", ...}', 'a schedule {schedule = "NAME", ...}'
PRECONDITIONER = 'a table {preconditioner = "NAME", ...}'


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
            expected = _expected(argument)
            message = f"missing: {function.name} needs it" + (f" ({expected})" if expected else "")
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


@functools.cache
def methods(package: str, kind: str = "method") -> tuple[Signature, ...]:
    """The functions of ``package`` that a table can call as a ``kind``, a key of :data:`RETURNS`.

    Functions that need an argument that TOML cannot express are left out.
    """
    found = (signature(package, name) for name in public_names(package))
    return tuple(
        f
        for f in found
        if f is not None
        and f.returns in RETURNS[kind]
        and not f.variadic
        and all(_admitted(a.annotation) for a in f.arguments.values() if a.required)
    )


def curvatures() -> tuple[str, ...]:
    """The curvatures that a table can name.

    >>> curvatures()
    ('gauss_newton', 'hessian')
    """
    found = methods("gradxform", "curvature")
    return tuple(f.name.rpartition(".")[2] for f in found)


def numbers(table: Any) -> dict[str, bool]:
    """The numeric arguments of a table's functions, by dotted path, and whether each sets a shape.

    A number that sets a shape must be known when the program is compiled, and must be whole.

    >>> numbers({"chain": [{"method": "lbfgs"}]})["chain.0.memory_size"]
    True
    """
    found: dict[str, bool] = {}
    if not isinstance(table, Mapping):
        return found
    kind = next((kind for kind in RETURNS if kind in table), None)
    if kind is not None and isinstance(table[kind], str):
        function = _find(table[kind], kind)
        for key, argument in function.arguments.items() if function is not None else ():
            admitted = _admitted(argument.annotation) or ()
            if "a number" in admitted or "a whole number" in admitted:
                found[key] = "a number" not in admitted
    for key, value in table.items():
        items = enumerate(value) if isinstance(value, list) else [("", value)]
        for i, item in items:
            prefix = f"{key}.{i}." if isinstance(value, list) else f"{key}."
            found |= {prefix + name: static for name, static in numbers(item).items()}
            if isinstance(item, Mapping) and not isinstance(value, list):
                found.pop(key, None)  # a schedule replaces the number
    return found


def _split(name: str) -> tuple[str, str]:
    package, dot, function = name.rpartition(".")
    return package if dot else "gradxform", function


def _find(name: str, kind: str) -> Signature | None:
    own = registry.find(kind, name) if kind == "method" else None
    if own is not None:
        return own.signature
    package, function = _split(name)
    if package not in PACKAGES or function not in public_names(package):
        return None
    found = signature(package, function)
    return found if found is not None and found.returns in RETURNS[kind] else None


def _unknown(name: str, kind: str) -> str:
    package, function = _split(name)
    same_name = [f"{p}.{function}" for p in PACKAGES if _find(f"{p}.{function}", kind)]
    if same_name:
        hint = f", did you mean {same_name[0]!r}?"
    elif package in PACKAGES:
        valid = [f.name.rpartition(".")[2] for f in methods(package, kind)]
        valid += registry.named(kind) if kind == "method" and "." not in name else ()
        near = difflib.get_close_matches(function, valid, n=1)
        prefix = f"{package}." if "." in name else ""
        hint = f", did you mean {prefix + near[0]!r}?" if near else ""
    else:
        hint = ""
    hint = hint or "; gradxform list methods shows all names"
    return f"no {kind} named {name!r} in {', '.join(PACKAGES[:-1])} or {PACKAGES[-1]}{hint}"


def _check_call(table: Table, path: str, kind: str) -> Iterator[Problem]:
    name = table[kind]
    if not isinstance(name, str):
        yield Problem(f"{path}.{kind}", f"should be a name, found {name!r}")
        return
    function = _find(name, kind)
    if function is None:
        yield Problem(f"{path}.{kind}", _unknown(name, kind))
        return
    if function.variadic:
        yield Problem(f"{path}.{kind}", f"{function.name}: write chain = [...] instead")
        return
    arguments = {key: value for key, value in table.items() if key != kind}
    yield from check_arguments(function, arguments, path)


# The TOML values that a type in a signature accepts, by the last word of the type.
_ADMITS = {
    "bool": ("true or false",),
    "int": ("a whole number",),
    "str": ("a text",),
    "float": ("a number",),
    "Scalar": ("a number",),
    "ArrayLike": ("a number",),
    "Array": ("a number",),
    "LearningRate": ("a number", SCHEDULE),
    "ScalarOrSchedule": ("a number", SCHEDULE),
    "Schedule": (SCHEDULE,),
    "GradientTransformation": (METHOD,),
    "GradientTransformationExtraArgs": (METHOD,),
    "Preconditioner": (PRECONDITIONER,),
    "Sequence": ("a list",),
    "tuple": ("a list",),
    "dict": ("a table",),
    "None": (),
}


def _admitted(annotation: ast.expr | None) -> tuple[str, ...] | None:
    """The TOML values that an argument accepts, in words; ``None`` if its type is unknown."""
    match annotation:
        case None:
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            parts = [left, right]
        case ast.Subscript(value=ast.Name("Optional"), slice=inner):
            parts = [inner]
        case ast.Subscript(value=ast.Name("Union"), slice=ast.Tuple(elts=inner)):
            parts = inner
        case ast.Subscript(value=ast.Name("Literal")):
            choices = ast.literal_eval(annotation.slice)
            choices = choices if isinstance(choices, tuple) else (choices,)
            return tuple(repr(choice) for choice in choices)
        case ast.Name("Curvature"):
            return tuple(repr(name) for name in curvatures())
        case ast.Name(id=name) if name in ranges() and name not in _ADMITS:
            parts = [ranges()[name]]
        case ast.Subscript(value=ast.Name("Annotated"), slice=ast.Tuple(elts=[base, *_])):
            parts = [base]
        case ast.Constant(value=str(text)):
            parts = [ast.parse(text, mode="eval").body]
        case ast.Subscript(value=generic):
            return _ADMITS.get(ast.unparse(generic).rpartition(".")[2])
        case _:
            return _ADMITS.get(ast.unparse(annotation).rpartition(".")[2])
    admitted = [_admitted(part) for part in parts]
    if any(part is None for part in admitted):
        return None
    return tuple(dict.fromkeys(words for part in admitted if part for words in part))


def _takes_curvature(annotation: ast.expr | None) -> bool:
    names = ast.walk(annotation) if annotation is not None else ()
    return any(isinstance(node, ast.Name) and node.id == "Curvature" for node in names)


def _expected(argument: Argument) -> str:
    *most, last = _admitted(argument.annotation) or ("",)
    return f"{', '.join(most)} or {last}" if most else last


def _check_value(value: Any, argument: Argument, path: str) -> Iterator[Problem]:
    admitted = _admitted(argument.annotation)
    found = _described(value)
    if (wrong := next(_unusable(value), None)) is not None:
        yield Problem(path, f"should be a number that float32 can hold, found {wrong!r}")
    elif admitted is not None and not set(found) & set(admitted):
        texts = [words.strip("'") for words in admitted if words.startswith("'")]
        hint = suggest(value, texts) if isinstance(value, str) else ""
        yield Problem(path, f"should be {_expected(argument)}, found {value!r}{hint}")
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
    package, _ = _split(function.name)
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


def _described(value: Any) -> tuple[str, ...]:
    match value:
        case bool():
            return ("true or false",)
        case int():
            return ("a whole number", "a number")
        case float():
            return ("a number",)
        case str():
            return (repr(value), "a text")
        case {"schedule": _}:
            return (SCHEDULE,)
        case {"method": _} | {"chain": _}:
            return (METHOD,)
        case {"preconditioner": _}:
            return (PRECONDITIONER,)
        case list():
            return ("a list",)
        case Mapping():
            return ("a table",)
        case _:
            return ()


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
    package, function = _split(name)
    values = {key: _build(value, f"{path}.{key}") for key, value in arguments.items()}
    own = registry.find("method", name)
    if own is not None:
        return _call_own(own, values, path)
    found = signature(package, function)
    for key, argument in found.arguments.items() if found else ():
        if key in values and _takes_curvature(argument.annotation):
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
    except Exception as error:
        said = registry.in_own_words(error, own.make)
        raise ConfigError("optimiser", [Problem(path, said)]) from error
    if not all(callable(getattr(made, name, None)) for name in ("init", "update")):
        message = f"{own.name} should return a gradient transformation, found {made!r:.200}"
        raise ConfigError("optimiser", [Problem(path, message)])
    return made
