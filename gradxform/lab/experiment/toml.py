"""Reads and writes TOML text, and applies ``key=value`` settings.

``tomllib`` reads. The writer is our own, because a config should look as a person writes it:
tomli-w has no comments, puts a schedule into its own table, and gives each number of a list a line.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from gradxform.lab.experiment.problems import Problem

# The tokens of TOML that are needed to find the keys. A lone quote is always an error.
_WORDS = re.compile(
    r'''
    (?P<quoted> \#[^\n]*
        | """(?>[^"\\]+|\\.|"{1,2}(?!"))*+"{3,5}
        | \'\'\'(?>[^']+|'{1,2}(?!'))*+'{3,5} )
    | (?P<part> "(?>[^"\\\n]+|\\[^\n])*+" | '[^'\n]*' | [A-Za-z0-9_-]+ | [ \t]+ )
    | (?P<dot> \. )
    | (?P<error> ["'] )
    | (?P<other> [^"'\#.A-Za-z0-9_ \t-]+ )
    ''',
    re.VERBOSE | re.DOTALL,
)
_MOST_PARTS = 1000  # parts of a dotted key; tomllib takes quadratic time to read one


def parse(text: str) -> dict[str, Any]:
    """Parses a text with ``tomllib``.

    Raises:
      TOMLDecodeError: for every error of ``tomllib``, and for text that takes hours to read.
    """
    if _has_long_key(text):
        raise tomllib.TOMLDecodeError(f"a dotted key of more than {_MOST_PARTS} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise tomllib.TOMLDecodeError("lists or tables are nested too deep") from None
    except ValueError:  # Python limits the digits of an integer
        raise tomllib.TOMLDecodeError("a whole number has too many digits") from None


def override(table: dict[str, Any], text: str) -> Iterator[Problem]:
    """Applies one ``key=value`` to ``table``, in place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        yield Problem("--set", f"should be text in UTF-8, found {text!r}")
        return
    key, equals, value = text.partition("=")
    key = key.strip()
    try:
        keys = _key_path(key)
    except tomllib.TOMLDecodeError:
        keys = []
    if not equals or not keys:
        yield Problem("--set", f"should be key=value with a dotted key, found {text!r}")
        return
    target: Any = table
    for depth, part in enumerate(keys[:-1], start=1):
        if meant := _other_case(target, part):
            yield Problem(f"--set {key}", f"there is no {part!r}, did you mean {meant!r}?")
            return
        target = target.setdefault(part, {}) if isinstance(target, dict) else _item(target, part)
        if not isinstance(target, dict | list):
            where = ".".join(keys[:depth])
            yield Problem(f"--set {key}", f"{where} is not a table in this config")
            return
    if isinstance(target, dict):
        target[keys[-1]] = _value(value)
    elif _item(target, keys[-1]) is not None:
        target[int(keys[-1])] = _value(value)
    else:
        yield Problem(f"--set {key}", f"{'.'.join(keys[:-1])} has no item {keys[-1]!r}")


def _other_case(table: Any, key: str) -> str | None:
    """A key of the table that differs from ``key`` in capitals alone."""
    if not isinstance(table, dict) or key in table:
        return None
    return next((k for k in table if k.casefold() == key.casefold()), None)


def write(table: Mapping[str, Any], path: str = "") -> str:
    """A table as TOML text; ``path`` is its place in the config."""
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    # an argument that is a table, like a schedule, is easier to read inline; and random points of a
    # sweep depend on the order of its axes
    if path.startswith(("optimizers.", "sweep.axes", "sweep.overrides.")):
        values, tables = dict(table), {}
    lines = [f"{assignment(name, value)}\n" for name, value in values.items()]
    if path and (lines or not tables):
        lines.insert(0, f"\n[{path}]\n")
    for name, value in tables.items():
        lines.append(write(value, f"{path}.{key(name)}".lstrip(".")))
    return "".join(lines)


def assignment(name: str, value: Any) -> str:
    """A key with its value on one line.

    >>> print(assignment("rate", {"schedule": "linear_decay", "a b": 0.5}))
    rate = {schedule = "linear_decay", "a b" = 0.5}
    """
    return f"{key(name)} = {_written(value)}"


def key(name: str) -> str:
    """A key, in quotes if it needs them."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _written(name)


def _has_long_key(text: str) -> bool:
    parts = 0
    for word in _WORDS.finditer(text):
        match word.lastgroup:
            case "dot":
                parts += 1
                if parts >= _MOST_PARTS:
                    return True
            case "error":
                return False
            case "quoted" | "other":
                parts = 0
    return False


def _key_path(key: str) -> list[str]:
    table, path = parse(f"{key} = 0"), []
    while isinstance(table, dict):
        if len(table) != 1:
            return []
        ((part, table),) = table.items()
        path.append(part)
    return path


def _item(items: list[Any], index: str) -> Any:
    return items[int(index)] if index in map(str, range(len(items))) else None


def _value(text: str) -> Any:
    try:
        parsed = parse(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return parsed["value"] if parsed.keys() == {"value"} else text


def _written(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():  # JSON and TOML have the same escapes, except for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            items = (assignment(name, item) for name, item in value.items())
            return f"{{{', '.join(items)}}}"
        case list() | tuple():
            return f"[{', '.join(map(_written, value))}]"
        case _:
            return str(value)
