"""The keys of a config in words: what each means, what it accepts, and its default.

The comments and the bounds in :mod:`gradxform.lab.experiment.schema` are the only source. Code is
between double backticks.
"""

import ast
import functools
import inspect
import io
import itertools
import re
import textwrap
import tokenize
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, TypeGuard, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, PlainValidator, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from gradxform.lab.experiment.schema import Classification, SurfaceTask


@functools.cache
def meanings(table: type[BaseModel]) -> dict[str, str]:
    """What the keys of a table mean: the comments of its fields, inherited ones included.

    >>> from gradxform.lab.experiment.schema import Checkpoint
    >>> meanings(Checkpoint)["keep"]
    'how many of the latest to keep'
    """
    owners = [owner for owner in reversed(table.__mro__) if _is_ours(owner)]
    found = {key: text for owner in owners for key, text in _comments(owner).items()}
    # the tables of a task share keys, and one comment may serve them all
    for other in (Classification, SurfaceTask) if "kind" in found else ():
        found |= {k: text for k, text in _comments(other).items() if found.get(k) == ""}
    return found


def inner_tables(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """The tables in a type, and whether each is below a label of the user's choice."""
    if inspect.isclass(annotation) and _is_ours(annotation):
        yield annotation, False
    elif get_origin(annotation) is dict:
        yield from ((part, True) for part, _ in inner_tables(get_args(annotation)[1]))
    else:
        for part in get_args(annotation):
            if part is not NoneType:
                yield from inner_tables(part)


def wanted(field: FieldInfo) -> str:
    """What a key accepts.

    >>> from gradxform.lab.experiment.schema import Sweep
    >>> wanted(Sweep.model_fields["keep"])
    'a number, greater than 0, below 1'
    """
    for part in field.metadata:
        if isinstance(part, PlainValidator):
            return _complaint(part.func)
    words = ", or ".join(dict.fromkeys(_words(field.annotation)))
    bounds = ", ".join(text for part in field.metadata for text in _bound(part))
    pattern = next((p.pattern for p in field.metadata if isinstance(p, StringConstraints)), None)
    if pattern:
        words += f" that matches ``{pattern}``"
    return f"{words}, {bounds}" if bounds else words


def default(field: FieldInfo) -> str:
    """The default of a key; nothing if it must be given."""
    value = field.default
    if field.is_required():
        return ""
    if value is None:
        return "none"
    if isinstance(value, BaseModel) or value in ({}, ()):
        return "empty"
    return f'``"{value}"``' if isinstance(value, str) else f"``{value}``"


def _is_ours(owner: type) -> TypeGuard[type[BaseModel]]:
    return issubclass(owner, BaseModel) and owner is not BaseModel


@functools.cache
def _comments(owner: type[BaseModel]) -> dict[str, str]:
    """The annotated names of a class, each with its ``#:`` comment or the string below it."""
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except (OSError, TypeError):  # a class that was made without a file
        return {}
    words_at = {
        token.start[0]: token.string[2:].strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.string.startswith("#:")
    }
    (node,) = ast.parse(source).body
    body = node.body if isinstance(node, ast.ClassDef) else []
    found: dict[str, str] = {}
    for field, below in itertools.zip_longest(body, body[1:]):
        if isinstance(field, ast.AnnAssign):
            lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
            words = [words_at[line] for line in lines if line in words_at]
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                words.append(str(below.value.value))
            # what the lab has is not in the reference of the library
            text = re.sub(r":\w+:`([^`]+)`", r"``\1``", " ".join(words))
            found[ast.unparse(field.target)] = " ".join(text.split())
    return found


def _complaint(check: Any) -> str:
    """What a validator says that it wants."""
    try:
        check(object())
    except PydanticCustomError as error:
        return error.message()
    raise TypeError(f"{check} accepts anything")


def _words(annotation: Any) -> Iterator[str]:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if annotation in names:
        yield names[annotation]
    elif get_origin(annotation) is Annotated:
        base, *notes = get_args(annotation)
        yield ", ".join([*_words(base), *(text for note in notes for text in _bound(note))])
    elif get_origin(annotation) is Literal:
        yield " or ".join(f'``"{choice}"``' for choice in get_args(annotation))
    elif get_origin(annotation) is dict or next(inner_tables(annotation), None):
        yield "a table"
    elif annotation is not NoneType:
        for part in get_args(annotation):
            if part is not Ellipsis:
                yield from _words(part)


def _bound(part: Any) -> Iterator[str]:
    match part:
        case Ge(ge=least):
            yield f"at least {least}"
        case Gt(gt=low):
            yield f"greater than {low}"
        case Le(le=most):
            yield f"at most {most}"
        case Lt(lt=high):
            yield f"below {high}"
        case MinLen(min_length=count):
            yield f"with at least {count} entry"
        case FieldInfo():
            for inner in part.metadata:
                yield from _bound(inner)
