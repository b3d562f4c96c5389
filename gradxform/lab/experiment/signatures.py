"""Reads the signatures of functions from their source text.

A config is checked against the real signatures of Optax and gradxform. Importing these packages
would import JAX, which is slow. Reading their source reports a misspelt argument at once. The
standard library reads signatures of imported functions only, so the syntax tree is read here.
"""

import ast
import functools
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Argument(NamedTuple):
    """One argument of a function that a caller may name."""

    annotation: ast.expr | None
    required: bool


class Signature(NamedTuple):
    """A function of a package."""

    name: str  #: name with its package, like ``optax.adamw``
    arguments: dict[str, Argument]
    variadic: bool  #: whether it takes ``*args``
    returns: str  #: last word of the return annotation, "" without one
    summary: str  #: first line of the docstring, without markup


def public_names(package: str) -> tuple[str, ...]:
    """The sorted public names that ``package/__init__.py`` or its stub binds.

    >>> {"adam", "sgd", "linear_decay"} <= set(public_names("gradxform"))
    True
    """
    names = {name for name, _ in _bindings(package) if not name.startswith("_")}
    return tuple(sorted(names))


@functools.cache
def signature(module: str, name: str) -> Signature | None:
    """The signature of ``module.name``, followed through imports.

    Args:
      module: dotted name of an installed module.
      name: a name that the module defines, imports or assigns.

    Returns:
      The signature, or ``None`` if the name is not a function defined by ``def``.

    >>> list(signature("gradxform", "momentum").arguments)
    ['learning_rate', 'momentum']
    """
    node = dict(_bindings(module)).get(name)
    if isinstance(node, ast.FunctionDef):
        return _read(f"{module}.{name}", node)
    if isinstance(node, str) and node != f"{module}.{name}":  # not a submodule of the package
        owner, _, attribute = node.rpartition(".")
        found = signature(owner, attribute) if _file(owner) else None
        return found and found._replace(name=f"{module}.{name}")
    return None


@functools.cache
def ranges() -> dict[str, ast.expr]:
    """The types of numbers with a range in gradxform's signatures, by name.

    >>> ast.unparse(ranges()["Fraction"])
    'Annotated[Scalar, Interval(0, 1)]'
    """
    file = _file("gradxform.hyperparameters")
    body = ast.parse(file.read_bytes()).body if file else []
    aliases = [node for node in body if isinstance(node, ast.AnnAssign) and node.value]
    return {ast.unparse(node.target): node.value for node in aliases if node.value}


def interval(annotation: ast.expr | None) -> tuple[float, float] | None:
    """The range ``[low, high)`` of numbers that an annotation of gradxform accepts.

    >>> interval(signature("gradxform", "adam").arguments["learning_rate"].annotation)
    (0, inf)
    """
    match annotation:
        case ast.Name(id=name) if name in ranges():
            return interval(ranges()[name])
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return interval(left) or interval(right)
        case ast.Subscript(
            slice=ast.Tuple(elts=[_, ast.Call(func=ast.Name("Interval"), args=ends), *_])
        ):
            low, *high = map(ast.literal_eval, ends)
            return low, high[0] if high else math.inf
    return None


def _read(name: str, node: ast.FunctionDef) -> Signature:
    args = node.args
    positional = args.posonlyargs + args.args
    optional = {id(a) for a in positional[len(positional) - len(args.defaults) :]}
    optional |= {id(a) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d}
    arguments = {
        a.arg: Argument(a.annotation, id(a) not in optional) for a in args.args + args.kwonlyargs
    }
    returns = ast.unparse(node.returns).rpartition(".")[2] if node.returns else ""
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    summary = re.sub(r":\w+:`([^`]*)`", r"\1", summary).replace("``", "")
    return Signature(name, arguments, args.vararg is not None, returns, summary)


@functools.cache
def _bindings(module: str) -> tuple[tuple[str, ast.FunctionDef | str], ...]:
    """The names of ``module``: its functions, and the sources of the names that it re-exports."""
    file = _file(module)
    found: dict[str, ast.FunctionDef | str] = {}
    for node in _statements(ast.parse(file.read_bytes()).body if file else []):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node.value).partition(".")
            source = found.get(first)
            if isinstance(source, str) or not rest:
                source = source if isinstance(source, str) else f"{module}.{first}"
                target = f"{source}.{rest}" if rest else source
                found |= {t.id: target for t in node.targets if isinstance(t, ast.Name)}
    return tuple(found.items())


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, including those in ``if`` blocks such as ``if TYPE_CHECKING``."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements(node.body)


@functools.cache
def _file(module: str) -> Path | None:
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)  # for a submodule find_spec would import the package
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*parts)
    candidates = (path / "__init__.pyi", path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)
