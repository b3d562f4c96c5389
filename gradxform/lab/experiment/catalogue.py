"""What an optimiser's table can name, and the values that each argument accepts."""

import ast
import difflib
import functools
from collections.abc import Mapping
from typing import Any

from gradxform.lab.experiment import registry
from gradxform.lab.experiment.signatures import (
    Argument,
    Signature,
    public_names,
    ranges,
    signature,
)

Table = Mapping[str, Any]
PACKAGES = ("gradxform", "optax", "optax.contrib")
RETURNS = {
    "method": ("GradientTransformation", "GradientTransformationExtraArgs"),
    "schedule": ("Schedule",),
    "curvature": ("Curvature",),
    "preconditioner": ("Preconditioner",),
}
METHOD, SCHEDULE = 'a table {method = "NAME", ...}', 'a schedule {schedule = "NAME", ...}'
PRECONDITIONER = 'a table {preconditioner = "NAME", ...}'


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
        and all(admitted(a.annotation) for a in f.arguments.values() if a.required)
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
        function = find(table[kind], kind)
        for key, argument in function.arguments.items() if function is not None else ():
            words = admitted(argument.annotation) or ()
            if "a number" in words or "a whole number" in words:
                found[key] = "a number" not in words
    for key, value in table.items():
        items = enumerate(value) if isinstance(value, list) else [("", value)]
        for i, item in items:
            prefix = f"{key}.{i}." if isinstance(value, list) else f"{key}."
            found |= {prefix + name: static for name, static in numbers(item).items()}
            if isinstance(item, Mapping) and not isinstance(value, list):
                found.pop(key, None)  # a schedule replaces the number
    return found


def split_name(name: str) -> tuple[str, str]:
    package, dot, function = name.rpartition(".")
    return package if dot else "gradxform", function


def find(name: str, kind: str) -> Signature | None:
    own = registry.find("method", name) if kind == "method" else None
    if own is not None:
        return own.signature
    package, function = split_name(name)
    if package not in PACKAGES or function not in public_names(package):
        return None
    found = signature(package, function)
    return found if found is not None and found.returns in RETURNS[kind] else None


def unknown(name: str, kind: str) -> str:
    package, function = split_name(name)
    same_name = [f"{p}.{function}" for p in PACKAGES if find(f"{p}.{function}", kind)]
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


def admitted(annotation: ast.expr | None) -> tuple[str, ...] | None:
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
    each = [admitted(part) for part in parts]
    if any(words is None for words in each):
        return None
    return tuple(dict.fromkeys(word for words in each if words for word in words))


def takes_curvature(annotation: ast.expr | None) -> bool:
    names = ast.walk(annotation) if annotation is not None else ()
    return any(isinstance(node, ast.Name) and node.id == "Curvature" for node in names)


def expected_by(argument: Argument) -> str:
    *most, last = admitted(argument.annotation) or ("",)
    return f"{', '.join(most)} or {last}" if most else last


def described(value: Any) -> tuple[str, ...]:
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
