"""What the source text of gradxform says: signatures as they are written, fields, type aliases."""

import ast
import functools
import importlib
import inspect
import io
import itertools
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gradxform

PACKAGE = Path(gradxform.__file__).parent


@functools.cache
def public() -> dict[str, str]:
    """The module of every public name, in the order of ``__init__.pyi``."""
    body = ast.parse((PACKAGE / "__init__.pyi").read_text()).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@functools.cache
def summary(name: str) -> str:
    """The first sentence of a public name's docstring."""
    text = inspect.getdoc(getattr(gradxform, name)) or ""
    return " ".join(text.partition("\n\n")[0].split())


class Field(NamedTuple):
    """One field of a NamedTuple."""

    name: str
    meaning: str  #: its ``#:`` comment


class Tuple(NamedTuple):
    """A NamedTuple of a module."""

    name: str
    summary: str
    fields: list[Field]
    is_diagnostics: bool  #: whether it is what a state has in ``info``


def tuples(module: str) -> Iterator[Tuple]:
    """The public NamedTuples of a module."""
    for node in _body(module):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any(ast.unparse(base) == "NamedTuple" for base in node.bases):
            continue
        fields = [Field(*pair) for pair in meanings(module, node.body).items()]
        marked = any(ast.unparse(mark) == "diagnostics" for mark in node.decorator_list)
        yield Tuple(node.name, ast.get_docstring(node) or "", fields, marked)


def meanings(module: str, body: Sequence[ast.stmt]) -> dict[str, str]:
    """The annotated names of a body, each with its ``#:`` comment or the string below it."""
    comments = _comments(module)
    found: dict[str, str] = {}
    for node, below in itertools.zip_longest(body, body[1:]):
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while first - 1 in comments and comments[first - 1].is_alone:
            first -= 1
        lines = range(first, (node.end_lineno or first) + 1)
        words = [comments[line].text for line in lines if line in comments]
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            words.append(str(below.value.value))
        found[ast.unparse(node.target)] = " ".join(" ".join(words).split())
    return found


def class_body(module: str, name: str) -> list[ast.stmt]:
    """The statements of a class; none where the module has no such class."""
    classes = (node for node in _body(module) if isinstance(node, ast.ClassDef))
    return next((node.body for node in classes if node.name == name), [])


class _Comment(NamedTuple):
    text: str
    is_alone: bool  # on its line


@functools.cache
def _comments(module: str) -> dict[int, _Comment]:
    """The ``#:`` comments of a module, by line."""
    tokens = tokenize.generate_tokens(io.StringIO(_text(module)).readline)
    return {
        token.start[0]: _Comment(token.string[2:].strip(), token.line.lstrip().startswith("#:"))
        for token in tokens
        if token.type == tokenize.COMMENT and token.string.startswith("#:")
    }


# -- signatures


def signature(name: str) -> tuple[str, str]:
    """The arguments and the result of a public function, its types under their full names."""
    module = public()[name]
    node = next(n for n in _body(module) if isinstance(n, ast.FunctionDef) and n.name == name)
    arguments = _Qualified(module).visit(node.args)
    result = ast.unparse(_Qualified(module).visit(node.returns)) if node.returns else ""
    return f"({ast.unparse(arguments)})", result


def types() -> dict[str, set[str]]:
    """The types of ours that signatures name, each with the public functions that do."""
    found: dict[str, set[str]] = {}
    todo = [(name, "".join(signature(name))) for name in public() if is_function(name)]
    while todo:
        name, text = todo.pop()
        for target in re.findall(r"\bgradxform(?:\.\w+)+", text):
            if target.removeprefix("gradxform.") in public():
                continue
            if target not in found:
                todo.append(("", definition(target)))
            found.setdefault(target, set()).add(name)
    return {target: names - {""} for target, names in sorted(found.items())}


def is_function(name: str) -> bool:
    return inspect.isfunction(inspect.unwrap(getattr(gradxform, name)))


def definition(target: str) -> str:
    """What an alias stands for, its types under their full names; nothing for a class."""
    module, _, name = target.rpartition(".")
    value = _assigned(module).get(name)
    return ast.unparse(_Qualified(module).visit(value)) if value else ""


def comment(target: str) -> str:
    """The ``#:`` comment of an alias."""
    module, _, name = target.rpartition(".")
    return meanings(module, _body(module)).get(name, "")


class _Qualified(ast.NodeTransformer):
    """Writes types under their full names, and without what ``Annotated`` adds for checks."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.names = _imported(module)

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        for argument in ast.walk(node):
            if isinstance(argument, ast.arg) and argument.annotation:
                argument.annotation = self.visit(argument.annotation)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
            return self.visit(node.slice.elts[0])
        if ast.unparse(node.value) == "Literal":
            return ast.Subscript(ast.Name("typing.Literal"), node.slice)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        is_forward = isinstance(node.value, str)
        return self.visit(ast.parse(node.value, mode="eval").body) if is_forward else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        first, _, rest = ast.unparse(node).partition(".")
        return ast.Name(_published(f"{self.names.get(first, first)}.{rest}"))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.names:
            module, _, name = self.names[node.id].rpartition(".")
            value = _assigned(module).get(name) if module.startswith("gradxform") else None
            if value is not None and _is_choice(value):
                return _Qualified(module).visit(value)
            return ast.Name(_published(self.names[node.id]))
        value = _assigned(self.module).get(node.id)
        if value is not None and _is_choice(value):
            return self.visit(value)
        is_ours = value is not None or node.id in _classes(self.module)
        return ast.Name(_published(f"{self.module}.{node.id}")) if is_ours else node


def _is_choice(value: ast.expr) -> bool:
    return ast.unparse(value).startswith("Literal[")


def _published(target: str) -> str:
    """The name that users know, where it is a public one."""
    module, _, name = target.rpartition(".")
    return f"gradxform.{name}" if public().get(name) == module else target


def _body(module: str) -> list[ast.stmt]:
    # parsed again each time, because a transformer changes what it visits
    return ast.parse(_text(module)).body


@functools.cache
def _text(module: str) -> str:
    return Path(str(importlib.import_module(module).__file__)).read_text()


@functools.cache
def _imported(module: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in _body(module):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname or a.name.partition(".")[0]: a.asname or a.name for a in node.names}
    return {
        name: path.partition(".")[0] if name == path.partition(".")[0] else path
        for name, path in names.items()
    }


def _assigned(module: str) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in _body(module):
        if isinstance(node, ast.AnnAssign) and node.value:
            found[ast.unparse(node.target)] = node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def _classes(module: str) -> set[str]:
    return {node.name for node in _body(module) if isinstance(node, ast.ClassDef)}
