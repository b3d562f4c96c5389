"""Reads the results of a finished run back from its folder, which may come from somebody else.

Everything is checked before it is used: that the files are regular ones of a bearable size, that
the rows belong to the optimisers of the config, and that every value is one that can be drawn.
"""

import collections
import csv
import io
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradxform.lab.experiment import folders
from gradxform.lab.experiment.folders import FolderError
from gradxform.lab.experiment.grid import Member
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.load import read_config, sweep_members
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.schema import MAX_EPOCHS, Config
from gradxform.lab.training.records import is_number, is_size

if TYPE_CHECKING:
    import numpy as np

    from gradxform.lab.training.outcomes import RaceResult, SweepResult

    Result = RaceResult | SweepResult

MOST = 2**28  # bytes of a table or a summary
_LONGEST = 200  # letters of a text in a table
_COUNTS = {"epoch", "step", "epochs", "steps", "seed", "member", "evaluations"}
_SIZES = {"seconds", "gradients", "steps_per_second", "work", "compile_seconds"}
_FLAGS = {"diverged", "dropped", "solved"}
_TEXTS = {"optimizer", "status"}
_NEEDED = {
    "train_loss": ("epoch", "step", "seconds", "gradients", "cost", "train_loss"),
    "value": ("step", "value"),
    "work": ("x0", "y0", "work", "solved"),
}
_OF_MEMBER = ("epochs", "steps", "seconds", "diverged", "train_loss")


def read_run(folder: str | Path) -> "tuple[Config, Result]":
    """The config and the result of a finished run; see :func:`gradxform.lab.load_run`.

    Raises:
      FolderError: the run is not finished, or the folder holds what no run writes.
      ConfigError: its ``config.toml`` cannot be used.
      OSError: a file cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FolderError(f"{on_one_line(path)}: is not the folder of a run")
    if not folders.is_file(path / "config.toml"):
        raise FolderError(f"{on_one_line(path)}: has no config.toml, so it is not a run's folder")
    if not folders.is_file(path / "summary.json"):
        raise FolderError(
            f"{on_one_line(path)}: this run is not finished; gradxform run --resume continues it"
        )
    summary = _summary(path / "summary.json")
    of_sweep = "compared_by" in summary
    content = folders.read(path / "config.toml")
    config = read_config(content, str(path / "config.toml"), for_sweep=of_sweep)
    _check_kind(path / "summary.json", config, summary)
    return config, (_sweep if of_sweep else _race)(path, config, summary)


def _check_kind(file: Path, config: Config, summary: Mapping[str, Any]) -> None:
    """Checks that the summary belongs to the config's kind of task."""
    measure = summary.get("compared_by", summary.get("ranked_by"))
    on_data = kind_of(config).has_epochs
    good = on_data == (measure not in ("value", "work"))
    _need(good, file, f"it should measure a task of kind {config.task.kind}", measure)
    if not on_data:
        task = config.model_dump()["task"]
        name = task.get("surface") or task["model"]
        _need(summary["task"] == name, file, f"task should be {name}", summary["task"])


def _race(folder: Path, config: Config, summary: Mapping[str, Any]) -> "RaceResult":
    from gradxform.lab.training.outcomes import History, RaceResult

    file, named = folder / "metrics.csv", folder / "summary.json"
    measure = summary["ranked_by"]
    _need(measure in ("train_loss", "value"), named, "ranked_by should be a measure", measure)
    rows: dict[str, list[dict[str, Any]]] = {}
    columns, kind = None, kind_of(config)
    needed = _NEEDED[measure] + (("x0", "x1") if kind.has_movie else ())
    for row in _table(file, needed):
        columns = columns or row.keys()
        _need(row.keys() == columns, file, "its rows should be alike", list(row))
        rows.setdefault(row["optimizer"], []).append(row)
    ranking = {one["optimizer"]: one for one in summary["ranking"]}
    labels = list(config.optimizers)
    for found, where in ((rows, file), (ranking, named)):
        _need(set(found) == set(labels), where, "it should hold the config's optimisers", [*found])
    histories = [
        History(
            label,
            tuple({k: x for k, x in row.items() if k != "optimizer"} for row in rows[label]),
            ranking[label]["diverged"],
            ranking[label]["steps_per_second"],
            ranking[label]["compile_seconds"],
            None,
        )
        for label in labels
    ]
    result = RaceResult(summary["task"], measure, tuple(histories), summary.get("unit", ""))
    return result if kind.read is None else at(kind.read)(folder, summary, result)


def with_estimates(folder: Path, summary: Mapping[str, Any], result: "RaceResult") -> "RaceResult":
    """The result of a curve fit with the parameters of the best fit, by name."""
    file = folder / "summary.json"
    rows = summary.get("estimates") or []
    _need(isinstance(rows, list) and rows, file, "estimates should be a list", rows)
    for row in rows:
        good = isinstance(row, dict) and isinstance(row.get("parameter"), str)
        good = good and is_number(row.get("estimate"))
        _need(good, file, "estimates should name parameters with numbers", row)
    estimates = {row["parameter"]: float(row["estimate"]) for row in rows}
    best = summary["ranking"][0]["optimizer"]
    histories = [h._replace(params=estimates) if h.label == best else h for h in result.histories]
    return result._replace(histories=tuple(histories))


def with_solution(folder: Path, summary: Mapping[str, Any], result: "RaceResult") -> "RaceResult":
    """The result of a race on an equation with the solution, if there is a finite one."""
    from gradxform.lab.report.solutions import Solution, from_rows

    file = folder / "solution.csv"
    if not folders.is_file(file):
        return result
    found = from_rows(list(_table(file, Solution._fields)))
    _need(found is not None, file, "its lines should be a grid of finite numbers", file.name)
    return result._replace(data=found)


def _sweep(folder: Path, config: Config, summary: Mapping[str, Any]) -> "SweepResult":
    from gradxform.lab.training.outcomes import SweepResult

    file, named = folder / "members.csv", folder / "summary.json"
    measure = summary["compared_by"]
    known = ("validation_loss", "train_loss", "work")
    _need(measure in known, named, "compared_by should be a measure", measure)
    rows = list(_table(file, _NEEDED["work"] if measure == "work" else (*_OF_MEMBER, measure)))
    members = _members(config, rows, file)
    unit, (seconds, compiling) = summary.get("unit", ""), _times(summary)
    costs = _costs(folder / "costs.csv", len(members), measure != "work")
    return SweepResult(
        summary["task"], measure, unit, tuple(members), tuple(rows), costs, seconds, compiling
    )


def _members(config: Config, rows: list[dict[str, Any]], file: Path) -> tuple[Member, ...]:
    """The member of each row; it takes the number of the member out of the row.

    The config that a sweep writes may name its axes in another order than the one it was started
    with, and random points depend on the order. So the values are those of the rows.
    """
    expected = sweep_members(config)
    axes = {member.label: member.values.keys() for member in expected}
    counts = collections.Counter(member.label for member in expected)
    seen: collections.Counter[tuple[str, frozenset[tuple[str, float]]]] = collections.Counter()
    found = []
    for number, row in enumerate(rows):
        label, columns = row["optimizer"], list(row)
        names = {path: f"optimizer.{path}" for path in axes.get(label, ())}
        # only a number whose name is taken has the prefix
        names = {path: name if name in row else path for path, name in names.items()}
        good = label in axes and all(name in row for name in names.values())
        ordered = sorted(names, key=lambda path: columns.index(names[path])) if good else []
        values = {path: row[names[path]] for path in ordered}
        point = label, frozenset(values.items())
        good = row.pop("member", None) == number and good
        good = good and all(type(x) in (int, float) and math.isfinite(x) for x in values.values())
        good = good and row.get("epochs", 1) >= 1 and _metrics(row) == _metrics(rows[0])
        _need(good, file, f"line {number + 2} should be member {number} of the config's sweep", row)
        found.append(Member(label, values, row.get("seed", seen[point])))
        seen[point] += 1
    same = counts == collections.Counter(member.label for member in found)
    _need(same, file, f"it should hold {len(expected)} members", len(found))
    return tuple(found)


def _metrics(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if name.startswith(("train_", "validation_", "test_"))]


def _times(summary: Mapping[str, Any]) -> tuple[float, float]:
    return summary["seconds"], summary["compile_seconds"]


def _costs(file: Path, members: int, on_data: bool) -> "np.ndarray":
    """The training cost of every epoch, (members, epochs)."""
    import numpy as np

    if not on_data:
        return np.empty((members, 0))
    rows = list(_table(file, ("member", "epoch", "cost"))) if folders.is_file(file) else []
    epochs = max((row["epoch"] for row in rows), default=0)
    good = epochs <= MAX_EPOCHS and 8 * members * epochs <= folders.memory() / 8
    _need(good, file, "it should hold the epochs of the config", epochs)
    costs = np.full((members, epochs), np.nan)
    for row in rows:
        good = row["member"] < members and row["epoch"] >= 1
        _need(good, file, "a line should be of a member and an epoch", row)
        costs[row["member"], row["epoch"] - 1] = row["cost"]
    return costs


def _summary(file: Path) -> dict[str, Any]:
    """The checked content of ``summary.json``."""
    try:
        found = json.loads(folders.read(file, MOST))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{on_one_line(file)}: is not JSON: {on_one_line(error)}") from None
    _need(isinstance(found, dict), file, "it should be a table", found)
    _need(_is_text(found.get("task")), file, "task should be a name", found.get("task"))
    _need(_is_text(found.get("unit", "")), file, "unit should be a text", found.get("unit"))
    if "compared_by" in found:
        tables, names = [found], ("seconds", "compile_seconds")
    else:
        tables, names = found.get("ranking"), ("steps_per_second", "compile_seconds")
        _need(isinstance(tables, list), file, "ranking should be a list", tables)
        for one in tables:
            _need(isinstance(one, dict), file, "ranking should hold tables", one)
            good = isinstance(one.get("optimizer"), str) and isinstance(one.get("diverged"), bool)
            _need(good, file, "ranking should name optimisers", one)
        measure = found.get("ranked_by")
        _need(_is_text(measure), file, "ranked_by should be a measure", measure)
    for table in tables:
        for name in names:
            _need(is_size(table.get(name)), file, f"{name} should be a number", table.get(name))
    return found


def _table(file: Path, needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The checked rows of a CSV file; empty cells are left out."""
    try:
        text = folders.read(file, MOST).decode()
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for number, line in enumerate(lines, start=2):
            where = f"line {number}"
            good = None not in line and None not in line.values()
            _need(good, file, f"{where} should have a value for each column", line)
            row = {name: _value(file, name, cell) for name, cell in line.items() if cell != ""}
            lacking = [name for name in needed if name not in row]
            _need(not lacking, file, f"{where} should have {', '.join(lacking)}", list(row))
            yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise FolderError(f"{on_one_line(file)}: is not CSV: {on_one_line(error)}") from None


def _value(file: Path, name: str, cell: str) -> Any:
    """A cell as what its column holds."""
    if name in _TEXTS:
        good, value = len(cell) <= _LONGEST or name == "optimizer", cell
    elif name in _FLAGS:
        good, value = cell in ("True", "False"), cell == "True"
    elif re.fullmatch(r"-?\d{1,16}", cell, re.ASCII):
        value = int(cell)
        good = value >= 0 or name not in _COUNTS | _SIZES
    else:
        try:
            value = float(cell)
        except ValueError:
            value = None
        fits: Callable[[Any], bool] = is_size if name in _SIZES else is_number
        good = fits(value) and name not in _COUNTS
    _need(good, file, f"{reprlib.repr(name)} should be a value that a run writes", cell)
    return value


def _need(good: Any, file: Path, what: str, found: Any) -> None:
    if not good:
        said = on_one_line(f"{what}, found {reprlib.repr(found)}")
        raise FolderError(f"{on_one_line(file)}: {said}")


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and len(x) <= _LONGEST
