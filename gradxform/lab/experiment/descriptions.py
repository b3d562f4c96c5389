"""Messages about wrong keys and values, in the words of the config."""

from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic_core import ErrorDetails

from gradxform.lab.experiment.problems import PLAIN, Problem, either, suggest
from gradxform.lab.experiment.schema import Config, Table


def describe(error: ErrorDetails, schema: type[Config]) -> Problem:
    """A pydantic error in the words of the config."""
    *parents, key = error["loc"]
    path, value = ".".join(map(str, error["loc"])), error["input"]
    owner: Any = schema
    for part in parents:
        if get_origin(owner) is dict:
            owner = get_args(owner)[1]
        else:
            owner = owner.model_fields[part].annotation if part in _fields(owner) else None
            if NoneType in get_args(owner):  # an optional table
                owner = next(iter(get_args(owner)))
    match error["type"]:
        case "extra_forbidden":
            keys = _fields(owner)
            hint = suggest(str(key), keys) or f"; the keys here are {', '.join(keys)}"
            return Problem(path, f"unknown key{hint}")
        case "missing":
            example = _EXAMPLES.get(path)
            return Problem(path, f"missing{f', for instance {example}' if example else ''}")
        case "literal_error":
            annotation = owner.model_fields[key].annotation
            optional = [part for part in get_args(annotation) if get_origin(part) is Literal]
            choices = get_args(optional[0] if optional else annotation)
            hint = suggest(value, choices) if isinstance(value, str) else ""
            return Problem(path, f"should be {either(choices)}, found {value!r}{hint}")
        case "name":
            context = error.get("ctx", {})
            names, own = context["names"], "; a name of your own needs --with FILE.py"
            hint = suggest(value, names) or own if names and isinstance(value, str) else ""
            return Problem(path, f"should be {context['wanted']}, found {value!r}{hint}")
        case "string_pattern_mismatch":
            if path in ("title", "output.folder"):
                wanted = "name a folder" if path == "output.folder" else PLAIN
                return Problem(path, f"should {wanted}, found {value!r}")
            wanted = "letters, digits, '.', '_' and '-', the first a letter or digit"
            return Problem(path, f"should be made of {wanted}, found {value!r}")
        case "dict_type" | "model_type":
            return Problem(path, f"should be a table, found {value!r}")
        case "too_short":
            return Problem(path, 'needs an entry, like [optimizers.sgd] with method = "sgd"')
    expected = error["msg"].removeprefix("Input should be ").replace("integer", "whole number")
    return Problem(path, f"should be {expected}, found {value!r}")


_EXAMPLES = {
    "name": 'name = "my_race"',
    "task": '[task] with kind = "classification"',
    "task.dataset": 'dataset = "digits"',
    "task.model": 'model = "keras_mlp"',
    "task.surface": 'surface = "rosenbrock"',
    "training": "[training] with epochs = 10",
    "training.epochs": "epochs = 10",
    "training.steps": "steps = 200",
    "optimizers": '[optimizers.sgd] with method = "sgd" and learning_rate = 0.1',
}


def _fields(owner: Any) -> list[str]:
    is_table = isinstance(owner, type) and issubclass(owner, Table)
    return list(owner.model_fields) if is_table else []
