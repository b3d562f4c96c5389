"""Checks what a config's ``[task]`` says about data, models and tasks of the user's own."""

from collections.abc import Iterator, Mapping
from typing import Any

from gradxform.lab.experiment import registry
from gradxform.lab.experiment.methods import check_arguments
from gradxform.lab.experiment.problems import Problem, suggest
from gradxform.lab.experiment.signatures import Signature, signature

_LABELLED = "classification", "regression"
_OF_FILE = "target", "inputs"
_OF_OWN = "standardise", "test_split", "split_seed"


def check_own_parts(task: Mapping[str, Any]) -> Iterator[Problem]:
    """Checks the options of registered functions, and that data come from one place.

    Args:
      task: the table ``[task]``.
    """
    kind, model = task.get("kind"), registry.find("model", task.get("model"))
    own = registry.find("task", kind)
    if own is not None:
        options = {key: value for key, value in task.items() if key != "kind"}
        yield from check_arguments(own.signature, options, "task")
        return
    if kind == "curve_fit":
        yield from _check_fit(task)
        return
    if model is not None:
        yield from _check_options(model, task, "model_options")
    if kind in _LABELLED:
        yield from _check_source(task)


def _check_source(task: Mapping[str, Any]) -> Iterator[Problem]:
    dataset = registry.find("dataset", task.get("dataset"))
    if "file" in task and "dataset" in task:
        yield Problem("task.file", "give either file or dataset")
    elif "file" not in task and "dataset" not in task:
        example = 'file = "data.csv" with target = "COLUMN"'
        ours = 'dataset = "digits", or ' if task.get("kind") == "classification" else ""
        yield Problem("task.dataset", f"missing, for instance {ours}{example}")
    elif "file" in task and "target" not in task:
        yield Problem("task.target", 'missing: the column to predict, for instance target = "y"')
    if dataset is not None:
        yield from _check_options(dataset, task, "dataset_options")
    elif "dataset_options" in task:
        yield Problem("task.dataset_options", "are for a registered data set")
    if "file" not in task:
        for key in (key for key in _OF_FILE if key in task):
            yield Problem(f"task.{key}", "is for data from a file")
        for key in (key for key in _OF_OWN if key in task and dataset is None):
            yield Problem(f"task.{key}", "is for data from a file or a registered data set")


def _check_fit(task: Mapping[str, Any]) -> Iterator[Problem]:
    if ("file" in task) == ("data" in task):
        example = 'file = "data.csv", or data = {x = [...], y = [...]}'
        yield Problem("task.file", f"give either {example}")
    curve = curve_signature(task.get("model"))
    start, bounds = (task.get(key, {}) for key in ("start", "bounds"))
    if curve is None or not isinstance(start, Mapping) or not isinstance(bounds, Mapping):
        return
    for key, table in (("start", start), ("bounds", bounds)):
        for name in table.keys() - curve.arguments.keys():
            names = ", ".join(curve.arguments)
            hint = suggest(name, curve.arguments) or f"; it has {names}"
            yield Problem(f"task.{key}.{name}", f"{curve.name} has no such parameter{hint}")
    for name, argument in curve.arguments.items():
        if argument.required and name not in start:
            yield Problem(f"task.start.{name}", f"missing: {curve.name} has no start value for it")
        match bounds.get(name), start.get(name):
            case [int() | float() as low, int() | float() as high] as box, int() | float() as value:
                if not low <= value <= high:
                    message = f"lies outside of task.bounds.{name}, {box}"
                    yield Problem(f"task.start.{name}", message)


def curve_signature(name: object) -> Signature | None:
    """The parameters of a curve, ours or a registered one, as arguments of a signature."""
    own = registry.find("curve", name)
    if own is not None:
        return own.signature
    if name not in registry.OURS["curve"]:
        return None
    found = signature("gradxform.lab.tasks.curves", str(name))
    if found is None:
        return None
    arguments = {key: x for key, x in found.arguments.items() if key != "x"}
    return found._replace(name=str(name), arguments=arguments)


def _check_options(entry: registry.Entry, task: Mapping[str, Any], key: str) -> Iterator[Problem]:
    given = task.get(key, {})
    if isinstance(given, Mapping):
        yield from check_arguments(entry.signature, given, f"task.{key}")
