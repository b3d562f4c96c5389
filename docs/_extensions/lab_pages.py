"""The lab's config keys and commands, from its schema and its command line."""

import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from files import write
from markup import escaped, sentence, table, title
from sphinx.application import Sphinx

from gradxform.lab import cli
from gradxform.lab.experiment import catalogue, grid, keys, schema
from gradxform.lab.experiment import load as config
from gradxform.lab.experiment import methods as optimizers
from gradxform.lab.experiment.kinds import KINDS


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write_pages(app: Sphinx) -> None:
    folder = Path(app.srcdir, "reference", "generated")
    write(folder / "config.rst", _config_page())
    write(folder / "commands.rst", _commands_page())


# -- config keys


def _config_page() -> str:
    parts = [
        title("Config keys"),
        "An experiment is one TOML file. These are its tables and keys. A key without a default\n"
        "must be given. ``gradxform run`` writes the complete config into the results folder.\n",
        "A misspelt key or a value out of range is an error that names the key. On the command\n"
        "line ``--set KEY=VALUE`` changes one value, as in ``--set training.epochs=5``.\n",
    ]
    for (path, table_type), kinds in _tables().items():
        is_shared = len(kinds) == len(KINDS)
        which = "" if is_shared else f" of kind {', '.join(kinds)}"
        which = which.replace("kind", "a task of kind") if path != "task" else which
        parts.append(title(f"[{path}]{which}" if path else "Top level", "-"))
        if path == "optimizers.LABEL":
            parts.append(_optimizers_text())
            continue
        parts.append(_keys(table_type))
        if path == "task" and "model_options" in table_type.model_fields:
            parts.append(_model_options(table_type))
        if path == "sweep":
            parts.append(f"An axis is {escaped(grid._WANTED)}.\n")
    return "\n".join(parts)


def _tables() -> dict[tuple[str, Any], list[str]]:
    """The tables of a config, by path and class, with the kinds of task that have them."""
    found: dict[tuple[str, Any], list[str]] = {}

    def visit(path: str, table_type: Any, kind: str) -> None:
        kinds = found.setdefault((path, table_type), [])
        if kind not in kinds:
            kinds.append(kind)
        for key, field in table_type.model_fields.items():
            inner = f"{path}.{key}" if path else key
            for part, is_labelled in keys.inner_tables(field.annotation):
                visit(f"{inner}.LABEL" if is_labelled else inner, part, kind)
            if inner == "optimizers":
                kinds = found.setdefault(("optimizers.LABEL", dict), [])
                kinds.append(kind)

    # the roots share their keys, and are listed once
    for name, kind in KINDS.items():
        visit("", kind.schema, name)
    roots = [key for key in found if key[0] == ""]
    whole = {("", max((r[1] for r in roots), key=lambda r: len(r.model_fields))): list(KINDS)}
    rest = {key: kinds for key, kinds in found.items() if key[0]}
    order = {name: i for i, name in enumerate(schema.SECTIONS)}
    return whole | dict(sorted(rest.items(), key=lambda item: order[item[0][0].split(".")[0]]))


def _keys(table_type: Any) -> str:
    meanings = dict(keys.meanings(table_type))
    for key, field in table_type.model_fields.items():
        if next(keys.inner_tables(field.annotation), None) and not meanings.get(key):
            meanings[key] = f"see ``[{key}]`` below"
    rows = [
        (
            f"``{key}``",
            escaped(keys.wanted(field)),
            keys.default(field),
            escaped(sentence(meanings.get(key, ""))),
        )
        for key, field in table_type.model_fields.items()
    ]
    return table(("key", "value", "default", "meaning"), rows, "20 30 15 35")


def _model_options(table_type: Any) -> str:
    models = config.choices_of(table_type.model_fields["model"])
    rows = [
        (f"``{model}``", f"``{key}``", escaped(option.wanted))
        for model in models
        for key, option in config._MODEL_OPTIONS[model].items()
    ]
    return f"Keys of ``model_options``:\n\n{table(('model', 'key', 'value'), rows, '25 25 50')}"


def _optimizers_text() -> str:
    _, _, text = (inspect.getdoc(optimizers) or "").partition("\n\n")
    methods = ", ".join(
        f":py:obj:`{m.name} <{m.name}>`" for m in catalogue.methods("gradxform", "method")
    )
    return f"{text}\n\nMethods of gradxform: {methods}.\n"


# -- commands


def _commands_page() -> str:
    group = typer.main.get_command(cli.app)
    parts = [title("Commands"), _help(group)]
    for name, command in group.commands.items():
        parts += [title(f"gradxform {name}", "-"), _help(command)]
        rows = [_parameter(parameter) for parameter in command.params]
        parts.append(table(("argument or option", "default", "meaning"), rows, "32 13 55"))
    return "\n".join(parts)


def _help(command: Any) -> str:
    """A command's help; what it marks as not to be wrapped is shown as it is."""
    text = inspect.cleandoc(command.help or "").replace("\\[", "[")
    prose, _, examples = text.partition("\b\n")
    block = "\n".join(f"   {line}" for line in examples.strip("\n").splitlines())
    shown = f"\n\n.. code-block:: text\n\n{block}\n" if block else "\n"
    return escaped(prose.strip()) + shown


def _parameter(parameter: Any) -> tuple[str, str, str]:
    is_argument = parameter.param_type_name == "argument"
    names = [name.upper() if is_argument else name for name in parameter.opts]
    if not (is_argument or parameter.is_flag):
        names[0] += f" {parameter.metavar or 'VALUE'}"
    default = parameter.default
    default = default.value if isinstance(default, Enum) else default
    shown = "" if default in (None, False) else f"``{default}``"
    if is_argument and parameter.required:
        shown = "required"
    return ", ".join(f"``{name}``" for name in names), shown, escaped(parameter.help or "")
