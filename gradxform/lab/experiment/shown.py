"""A config as a text to learn from and to edit: every key, explained."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gradxform.lab.experiment import keys, toml
from gradxform.lab.experiment.catalogue import find
from gradxform.lab.experiment.schema import SECTIONS, Config

_WIDTH = 100


def shown(config: Config) -> str:
    """The config as TOML with every key, its meaning, what it accepts, and its default.

    Keys and tables that the config leaves out are comments. Read again, the text is this config.
    """
    return "\n".join(_lines(config)) + "\n"


def _lines(config: Config) -> Iterator[str]:
    fields, given = type(config).model_fields, config.model_dump(exclude_none=True)
    meanings = keys.meanings(type(config))
    first = "Every key of this experiment. A key behind # is not given and has its default."
    yield from _comment(first)
    for name in SECTIONS:
        if name in fields and not _is_section(fields[name]):
            yield ""
            yield from _key(name, fields[name], meanings[name], given)
    for name in SECTIONS:
        if name in fields and name == "optimizers":
            yield from _optimizers(given[name], meanings[name])
        elif name in fields and _is_section(fields[name]):
            (table, _), *_ = keys.inner_tables(fields[name].annotation)
            yield from _table(name, table, given.get(name))


def _is_section(field: FieldInfo) -> bool:
    is_optimizers = field.annotation == dict[str, dict[str, Any]]
    return is_optimizers or next(keys.inner_tables(field.annotation), None) is not None


def _table(path: str, table: type[BaseModel], given: Mapping[str, Any] | None) -> Iterator[str]:
    """A table with its keys; if it is not given, as a comment."""
    mark, meanings = ("# " if given is None else ""), keys.meanings(table)
    values, tables = given or {}, table.model_fields.items()
    labelled = {
        key: inner for key, field in tables for inner, _ in keys.inner_tables(field.annotation)
    }
    yield ""
    yield f"{mark}[{path}]"
    free = []  # tables whose keys are up to the user
    for key, field in tables:
        if key not in labelled:
            yield from _key(key, field, meanings.get(key, ""), values, mark)
            if isinstance(values.get(key), Mapping) and field.default == {}:
                free.append(key)
    options = [key for key in values if key not in table.model_fields]  # of a registered task
    yield from (toml.assignment(key, values[key]) for key in options)
    for key in free:
        yield from toml.write(values[key], f"{path}.{key}").splitlines()
    for key, inner in labelled.items():
        for label, own in values.get(key, {}).items():
            yield from _table(f"{path}.{key}.{toml.key(label)}", inner, own)
        if not values.get(key):
            yield from _table(f"{path}.{key}.LABEL", inner, None)


def _key(
    key: str, field: FieldInfo, meaning: str, given: Mapping[str, Any], mark: str = ""
) -> Iterator[str]:
    """A key below its explanation; if it is not given, as a comment."""
    wanted = re.sub(r" that matches ``.*?``", "", keys.wanted(field))
    fallback = keys.default(field)
    yield from _comment(meaning)
    yield from _comment(f"({wanted}; {f'default {fallback}' if fallback else 'must be given'})")
    if field.default == {}:
        if not given.get(key):
            yield f"# {key} = {{}}"
    elif key in given:
        yield mark + toml.assignment(key, given[key])
    elif field.is_required() or field.default is None:
        yield f"# {key} ="
    else:
        yield f"# {toml.assignment(key, field.default)}"


def _optimizers(given: Mapping[str, Mapping[str, Any]], meaning: str) -> Iterator[str]:
    yield ""
    yield from _comment(meaning)
    for label, table in given.items():
        yield ""
        yield f"[optimizers.{toml.key(label)}]"
        yield from (toml.assignment(key, value) for key, value in table.items())
        function = find(str(table.get("method")), "method")
        others = [name for name in (function.arguments if function else ()) if name not in table]
        if others:
            yield from _comment(f"also takes {', '.join(others)}")


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text.replace("``", ""), _WIDTH - 2, break_long_words=False):
        yield f"# {line}"
