"""The files of a result: rows as CSV, a summary as JSON, the best points as TOML, pictures."""

import csv
import io
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradxform
from gradxform.lab.experiment.grid import substitute
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.load import to_toml
from gradxform.lab.experiment.schema import Config, Training
from gradxform.lab.report.folder import write_atomically
from gradxform.lab.training.outcomes import RaceResult, Row, ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from gradxform.lab.training.outcomes import Point, SweepResult


class Extra(NamedTuple):
    """What the report of a kind of task holds besides the ranking."""

    tables: "Sequence[Table]" = ()  #: printed below the ranking
    files: Mapping[str, str] = {}  #: texts by the name of their file
    summary: Mapping[str, Any] = {}  #: entries of ``summary.json``


def metrics_csv(rows: Sequence[tuple[str, Row]]) -> str:
    """CSV text with one line per optimiser and epoch.

    >>> metrics_csv([("sgd", {"epoch": 1, "cost": 2.5})])
    'optimizer,epoch,cost\\nsgd,1,2.5\\n'
    """
    return csv_of([{"optimizer": label, **row} for label, row in rows])


def members_csv(rows: Mapping[int, dict[str, Any]]) -> str:
    """CSV text with one line per member of a sweep, sorted by number.

    >>> members_csv({3: {"optimizer": "sgd", "learning_rate": 0.1}})
    'member,optimizer,learning_rate\\n3,sgd,0.1\\n'
    """
    return csv_of([{"member": number, **row} for number, row in sorted(rows.items())])


def costs_csv(result: "SweepResult") -> str:
    """CSV text with one line per member and epoch: the member's number, the epoch, the cost."""
    lines = (
        f"{number},{epoch},{cost}\n"
        for number, costs in enumerate(result.costs.tolist())
        for epoch, cost in enumerate(costs, start=1)
        if math.isfinite(cost)
    )
    return "".join(["member,epoch,cost\n", *lines])


def summary_json(config: Config, result: RaceResult, more: Mapping[str, Any]) -> str:
    """The ranking, the device and the versions as JSON; numbers that are not finite become null.

    Args:
      config: the config of the race.
      result: its result.
      more: other entries.
    """
    ranking = [
        {
            "rank": rank,
            "optimizer": history.label,
            "diverged": history.diverged,
            "final": _finite_row(history.rows[-1]),
            "steps_per_second": history.steps_per_second,
            "compile_seconds": history.compile_seconds,
        }
        for rank, history in enumerate(ranked(result), start=1)
    ]
    found = {"ranked_by": result.measure, "unit": result.unit, "ranking": ranking}
    return _summary(config, result.name, {**found, **more})


def sweep_summary_json(config: Config, result: "SweepResult") -> str:
    """The best point of each optimiser, the device and the versions as JSON."""
    from gradxform.lab.training.outcomes import best_points, points_of

    every = points_of(result)
    best = [
        {
            "rank": rank,
            "optimizer": point.label,
            "hyperparameters": point.values,
            f"mean_{result.measure}": point.mean,
            "points": len(every[point.label]),
            "members": [_finite_row(row) for row in point.rows],
        }
        for rank, point in enumerate(best_points(result), start=1)
    ]
    found = {
        "compared_by": result.measure,
        "unit": result.unit,
        "best": best,
        "members": len(result.members),
        "failures": sum(point.failures for points in every.values() for point in points),
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
    }
    return _summary(config, result.name, found)


def best_toml(config: Config, points: Iterable["Point"]) -> str:
    """The config of a race between these points; optimisers without a point are left out."""
    best = {point.label: point.values for point in points}
    training = config.training
    if isinstance(training, Training):
        kept = {label: x for label, x in training.overrides.items() if label in best}
        training = training.model_copy(update={"overrides": kept})
    entries = config.optimizers.items()
    chosen = {label: substitute(x, best[label]) for label, x in entries if label in best}
    update = {"optimizers": chosen, "training": training, "sweep": None}
    return to_toml(config.model_copy(update=update))


def save_sweep(folder: Path, config: Config, result: "SweepResult") -> None:
    """Writes all files of a sweep except ``members.csv``."""
    from gradxform.lab.training.outcomes import best_points

    best = best_points(result)
    if best:
        write_atomically(folder / "best.toml", best_toml(config, best))
    if result.costs.size:
        write_atomically(folder / "costs.csv", costs_csv(result))
    for stem, figure in at(kind_of(config).sweep_figures)(config, result):
        save_figure(folder / f"{stem}.png", figure)
    write_atomically(folder / "summary.json", sweep_summary_json(config, result))


def save(folder: Path, config: Config, result: RaceResult) -> Extra:
    """Writes ``summary.json``, and the pictures and files that belong to the kind of task.

    Returns:
      What the report holds besides the ranking.
    """
    kind = kind_of(config)
    for stem, figure in at(kind.figures)(config, result):
        save_figure(folder / f"{stem}.png", figure)
    extra = Extra() if kind.extra is None else at(kind.extra)(config, result)
    for name, text in extra.files.items():
        write_atomically(folder / name, text)
    # written last: a folder with this file is a finished run
    write_atomically(folder / "summary.json", summary_json(config, result, extra.summary))
    return extra


def save_figure(path: Path, figure: "Figure") -> None:
    """Writes a figure in the format of the path's ending, the same bytes each time."""
    from matplotlib import rc_context

    form = path.suffix.removeprefix(".")
    # without the date of today
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "gradxform"}):  # otherwise its names are random
        figure.savefig(content, format=form, metadata=dates.get(form))
    write_atomically(path, content.getvalue())


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV text of rows that may have different columns; empty without rows."""
    if not rows:
        return ""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def made_with() -> dict[str, Any]:
    """The device and the package versions, on which the numbers depend."""
    import jax
    import jaxlib
    import optax

    packages = (gradxform, jax, jaxlib, optax)
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {p.__name__: p.__version__ for p in packages},
    }


def _summary(config: Config, task: str, found: Mapping[str, Any]) -> str:
    """JSON text of the results, the device and the versions."""
    summary = {
        "name": config.name,
        "title": config.title or config.name,
        "task": task,
        "seed": config.seed,
        **found,
        **made_with(),
    }
    return json.dumps(summary, indent=2, allow_nan=False) + "\n"


def _finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _finite(x) if isinstance(x, float) else x for k, x in row.items()}


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else None
