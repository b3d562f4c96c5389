"""Reads, changes, checks and writes experiments as TOML files.

This module does not import JAX, so it reports a mistake in a config at once.
"""

import difflib
import functools
import importlib.resources
import itertools
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import PlainValidator, ValidationError
from pydantic.fields import FieldInfo

from gradxform.lab.experiment import grid, methods, own_files, toml
from gradxform.lab.experiment.descriptions import describe
from gradxform.lab.experiment.folders import MOST_TEXT
from gradxform.lab.experiment.kinds import kind_of, kinds
from gradxform.lab.experiment.own_parts import check_own_parts
from gradxform.lab.experiment.problems import CONTROL, PLAIN, ConfigError, Problem, either, suggest
from gradxform.lab.experiment.schema import (
    MAX_WIDTH,
    SECTIONS,
    Config,
    Names,
    SurfaceConfig,
    SurfaceSweep,
    Sweep,
    Training,
)

MAX_DEPTH = 32  # levels of nested tables and lists
_MOST_PROBLEMS = 100  # problems per check; finding one may take some time


class _Option(NamedTuple):
    wanted: str
    accepts: Callable[[Any], bool]


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_WIDTH


_WIDTH = _Option(f"a whole number from 1 to {MAX_WIDTH}", _is_width)
_WIDTHS = _Option(
    f"a list of whole numbers from 1 to {MAX_WIDTH}",
    lambda value: isinstance(value, list) and bool(value) and all(map(_is_width, value)),
)
_RATE = _Option(
    "a rate of at least 0 and below 1", lambda value: type(value) in (int, float) and 0 <= value < 1
)
_MODEL_OPTIONS: dict[str, dict[str, _Option]] = {
    "linear": {},
    "logistic": {},
    "keras_mlp": {"hidden": _WIDTH},
    "mlp": {"hidden": _WIDTHS, "input_dropout": _RATE, "dropout": _RATE},
    "cnn": {"channels": _WIDTHS, "hidden": _WIDTH, "input_dropout": _RATE, "dropout": _RATE},
    "autoencoder": {"widths": _WIDTHS},
    "transformer": {"width": _WIDTH, "layers": _WIDTH, "heads": _WIDTH},
}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, for_sweep: bool = True
) -> Config:
    """Reads and checks an experiment.

    Args:
      path: a TOML file (or a pipe), or the name of a shipped config.
      overrides: ``"key=value"`` settings with dotted keys, such as ``training.epochs=3``. A value
        that is not valid TOML is taken as text.
      for_sweep: see :func:`parse_config`.

    Raises:
      ConfigError: the file does not exist, is not valid TOML, or has unusable values. The error
        lists all problems at once.

    >>> load_config("keras_mnist", ["training.epochs=3"]).training.epochs
    3
    """
    file = find_config(path)
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_TEXT + 1)
    except OSError as error:
        raise ConfigError(str(file), [f"cannot be read: {error}"]) from None
    return read_config(content, str(file), overrides, for_sweep=for_sweep)


def read_config(
    content: bytes, source: str, overrides: Sequence[str] = (), *, for_sweep: bool = True
) -> Config:
    """Checks an experiment given as the content of a TOML file.

    Args:
      content: the content of the file.
      source: the name of the file in messages.
      overrides: see :func:`load_config`.
      for_sweep: see :func:`parse_config`.

    Raises:
      ConfigError: with every problem found.
    """
    if len(content) > MOST_TEXT:
        raise ConfigError(source, [f"cannot be read: more than {MOST_TEXT} bytes"])
    try:
        table = toml.parse(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(source, [f"cannot be read: {error}"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(source, [f"not valid TOML: {error}"]) from None
    problems = [problem for text in overrides for problem in toml.override(table, text)]
    return parse_config(table, source, problems, for_sweep=for_sweep)


def parse_config(
    table: Mapping[str, Any],
    source: str = "config",
    problems: Sequence[Problem | str] = (),
    *,
    for_sweep: bool = True,
) -> Config:
    """Checks an experiment given as nested tables.

    Args:
      table: the tables that ``tomllib`` reads from a config file.
      source: the name of the config in messages.
      problems: problems already found, to report with the others.
      for_sweep: whether to check ``[sweep]`` against the rest of the config. If not, only its keys
        and types are checked, because a plain run ignores it.

    Raises:
      ConfigError: with every problem found.
    """
    found = list(problems)
    deep = [key for key, value in table.items() if _is_deep(value)]
    if deep:  # too deep for the recursion of the checks
        message = f"tables or lists are nested more than {MAX_DEPTH} levels deep"
        raise ConfigError(source, [*found, *(Problem(key, message) for key in deep)])
    table = own_files.with_digests(table)
    task, known = table.get("task"), kinds()
    kind = task.get("kind") if isinstance(task, Mapping) else None
    if isinstance(task, Mapping) and not (isinstance(kind, str) and kind in known):
        hint = suggest(kind, known) if isinstance(kind, str) else ""
        given = f"found {kind!r}{hint}" if "kind" in task else "but is missing"
        found.append(Problem("task.kind", f"should be {either(known)}, {given}"))
    # if the kind is misspelt, check the rest against the nearest kind
    meant = difflib.get_close_matches(kind, known, n=1) if isinstance(kind, str) else []
    schema = known[meant[0] if meant else "classification"].schema
    config = None
    try:
        config = schema.model_validate(table)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            section, *keys = detail["loc"]
            of_kind = section in ("task", "training", "sweep") and keys
            if of_kind and (not meant or keys == ["kind"]):
                continue  # its keys depend on the kind, which is reported already
            found.append(describe(detail, schema))
    checks: list[Iterable[Problem]] = [_check_optimizers(table), _check_override_labels(table)]
    if isinstance(task, Mapping):
        checks.append(_check_model_options(task, _default_model(schema) if meant else None))
        checks.append(check_own_parts(task))
    if for_sweep:
        checks += [_check_axes(table), _check_sweep(config) if config is not None else ()]
    found += (problem for check in checks for problem in itertools.islice(check, _MOST_PROBLEMS))
    if found or config is None:
        own_files.require(table)
        raise ConfigError(source, found)
    return config


def require_surface(config: Any) -> SurfaceConfig:
    """The config, if its task is a surface.

    Raises:
      ConfigError: the task uses data.
    """
    if kind_of(config).has_movie:
        return config
    found = f"a movie needs 'surface', found {config.task.kind!r}"
    mend = "use gradxform run, or a config like valley"
    raise ConfigError(config.name, [Problem("task.kind", f"{found}: {mend}")])


def require_sweep(config: Config) -> Sweep | SurfaceSweep:
    """The ``[sweep]`` of a config.

    Raises:
      ConfigError: ``[sweep]`` is missing, or ``max_seconds`` is set.
    """
    if config.sweep is None:
        mend = "[sweep.axes] with learning_rate = {log = [1e-3, 1.0], points = 7}"
        raise ConfigError(config.name, [Problem("sweep", f"missing, for instance {mend}")])
    training = config.training
    if isinstance(training, Training):
        of = {"": training, **{f".overrides.{k}": own for k, own in training.overrides.items()}}
        timed = [f"training{path}.max_seconds" for path, own in of.items() if own.max_seconds]
        if timed:
            why = "members train together for the same number of epochs: remove max_seconds"
            raise ConfigError(config.name, [Problem(path, why) for path in timed])
    return config.sweep


def sweep_members(config: Config) -> tuple[grid.Member, ...]:
    """The runs of a config's ``[sweep]``; on a surface ``seed`` is the number of the start.

    Raises:
      ConfigError: ``[sweep]`` is missing.

    >>> config = load_config("digits_race", ["sweep.axes.momentum=[0.5, 0.9]"])
    >>> [m.values["momentum"] for m in sweep_members(config) if m.label == "nesterov"]
    [0.5, 0.9]
    """
    sweep = require_sweep(config)
    axes, overrides = _axes(sweep)
    seeds, samples = kind_of(config).runs(sweep), sweep.samples
    return grid.members(
        config.optimizers, axes, overrides, seeds=seeds, samples=samples, seed=config.seed
    )


def to_toml(config: Config) -> str:
    """The config as TOML text with all defaults; :func:`load_config` can read it."""
    table = config.model_dump(exclude_none=True)
    return toml.write({section: table[section] for section in SECTIONS if section in table})


def shipped_configs() -> dict[str, Path]:
    """The files of the shipped configs, by name."""
    return {file.stem: file for file in sorted(_config_folder().glob("*.toml"))}


def task_choices() -> dict[str, dict[str, tuple[str, ...]]]:
    """For each kind of task, the keys that have a fixed set of values.

    >>> task_choices()["surface"]
    {'surface': ('quadratic', 'rosenbrock', 'beale', 'saddle')}
    """
    choices: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, kind in kinds().items():
        fields = kind.schema.model_fields["task"].annotation.model_fields.items()
        found = {key: _choices(field) for key, field in fields if key != "kind"}
        choices[name] = {key: names for key, names in found.items() if names}
    return choices


def _choices(field: FieldInfo) -> tuple[str, ...]:
    """The names that a key accepts, if it accepts no other values."""
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    checks = (part.func for part in field.metadata if isinstance(part, PlainValidator))
    return next((check.known() for check in checks if isinstance(check, Names)), ())


def find_config(path: str | Path) -> Path:
    """The file of a path or of the name of a shipped config.

    Raises:
      ConfigError: there is no such file or config.
    """
    file, name = Path(path), str(path)
    shipped = shipped_configs()
    # a pipe is read unless its name is that of a shipped config
    is_pipe = os.path.exists(file) and not os.path.isdir(file) and name not in shipped
    if os.path.isfile(file) or is_pipe:
        return file
    if name in shipped:
        return shipped[name]
    if os.path.isdir(file):
        raise ConfigError(name, ["is a folder: name the TOML file in it"])
    hint = suggest(name.removesuffix(".toml"), shipped)
    listed = ", ".join(shipped)
    raise ConfigError(name, [f"no such file and no such shipped config{hint} (shipped: {listed})"])


@functools.cache
def _config_folder() -> Path:
    """The folder of the shipped configs: in a wheel inside the package, else next to it."""
    package = importlib.resources.files("gradxform.lab")
    installed = Path(str(package / "configs"))
    return installed if installed.is_dir() else Path(str(package)).parents[1] / "configs"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _items(outer)]
    return bool(level)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _default_model(schema: type[Config]) -> str | None:
    task: Any = schema.model_fields["task"].annotation
    field = task.model_fields.get("model")
    return None if field is None or field.is_required() else field.default


def _check_model_options(task: Mapping[str, Any], default: str | None) -> Iterator[Problem]:
    model, given = task.get("model", default), task.get("model_options")
    if not isinstance(given, Mapping) or not isinstance(model, str) or model not in _MODEL_OPTIONS:
        return
    options = _MODEL_OPTIONS[model]
    for key, value in given.items():
        path = f"task.model_options.{key}"
        if key not in options:
            hint = suggest(key, options) or f"; it has {', '.join(options) or 'none'}"
            yield Problem(path, f"unknown option of {model}{hint}")
        elif not options[key].accepts(value):
            yield Problem(path, f"should be {options[key].wanted}, found {value!r}")


def _check_optimizers(table: Mapping[str, Any]) -> Iterator[Problem]:
    entries = table.get("optimizers")
    for label, entry in entries.items() if isinstance(entries, Mapping) else ():
        if re.search(f"[{CONTROL}]", label):
            yield Problem("optimizers", f"a label should {PLAIN}, found {label!r}")
        if isinstance(entry, Mapping):
            yield from methods.check(entry, f"optimizers.{label}")


def _check_override_labels(table: Mapping[str, Any]) -> Iterator[Problem]:
    training, labels = table.get("training"), table.get("optimizers")
    overrides = training.get("overrides") if isinstance(training, Mapping) else None
    if not isinstance(overrides, Mapping) or not isinstance(labels, Mapping):
        return
    for label in overrides:
        if label not in labels:
            hint = suggest(label, labels) or f"; the labels are {', '.join(labels) or 'none'}"
            yield Problem(f"training.overrides.{label}", f"no optimiser has this label{hint}")


def _check_axes(table: Mapping[str, Any]) -> Iterator[Problem]:
    sweep, entries = table.get("sweep"), table.get("optimizers")
    if not isinstance(sweep, Mapping) or not isinstance(entries, Mapping):
        return
    tables = {label: entry for label, entry in entries.items() if isinstance(entry, Mapping)}
    given, others = sweep.get("axes"), sweep.get("overrides")
    axes, problems = grid.read_axes(given if isinstance(given, Mapping) else {}, "sweep.axes")
    overrides = {}
    for label, own in others.items() if isinstance(others, Mapping) else ():
        if isinstance(own, Mapping):
            overrides[label], found = grid.read_axes(own, f"sweep.overrides.{label}")
            problems += found
    yield from problems
    samples = sweep.get("samples")
    yield from grid.check(tables, axes, overrides, samples if isinstance(samples, int) else None)


def _check_sweep(config: Config) -> Iterator[Problem]:
    """The problems of a sweep as a whole."""
    sweep = config.sweep
    if sweep is None:
        return
    axes, overrides = _axes(sweep)
    has_axis = bool(sweep.axes) or any(sweep.overrides.values())
    kind = kind_of(config)
    runs, more = kind.runs(sweep), kind.more_runs
    total = grid.count(config.optimizers, axes, overrides, seeds=runs, samples=sweep.samples)
    if total > grid.MAX_MEMBERS:
        yield Problem("sweep", f"makes {total} runs, more than {grid.MAX_MEMBERS}")
    if sweep.samples and not has_axis:
        yield Problem("sweep.samples", "random points need an axis in [sweep.axes]")
    elif not has_axis and runs == 1:
        example = "[sweep.axes] with learning_rate = {log = [1e-3, 1.0], points = 7}"
        yield Problem("sweep", f"nothing to sweep: needs an axis, as in {example}, or {more}")
    if isinstance(sweep, Sweep) and isinstance(config.training, Training):
        overridden = (own.epochs or 1 for own in config.training.overrides.values())
        last = max([config.training.epochs, *overridden])
        if sweep.rungs and sweep.rungs[-1] >= last:
            found = f"found {sweep.rungs[-1]}"
            yield Problem("sweep.rungs", f"should be before the last epoch, {last}, {found}")


def _axes(sweep: Sweep | SurfaceSweep) -> tuple[grid.Axes, Mapping[str, grid.Axes]]:
    """The axes of all optimisers, and by label the axes of single ones."""
    overrides = {label: grid.read_axes(own, "")[0] for label, own in sweep.overrides.items()}
    return grid.read_axes(sweep.axes, "")[0], overrides
