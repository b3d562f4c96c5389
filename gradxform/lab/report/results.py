"""Writes the results of a race or a sweep: a folder of files and a table."""

import contextlib
import csv
import datetime
import io
import itertools
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

import gradxform
from gradxform.lab.experiment.grid import substitute
from gradxform.lab.experiment.load import to_toml
from gradxform.lab.experiment.messages import plain
from gradxform.lab.experiment.schema import Config, SurfaceConfig
from gradxform.lab.training.race import RaceResult, Row, ranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradxform.lab.training.sweep import Point, SweepResult

COLUMNS = (
    ("value", "value"),
    ("train_loss", "train\nloss"),
    ("validation_loss", "val.\nloss"),
    ("validation_accuracy", "val.\nacc."),
    ("validation_error", "val.\nerror"),
    ("test_loss", "test\nloss"),
    ("test_accuracy", "test\nacc."),
    ("test_error", "test\nerror"),
    ("test_relative_error", "relative\nerror"),
)


_TAKEN = "is there already; name a new folder, no run is overwritten"
SURFACE_COLUMNS = (("work", "work"), ("steps", "updates"), ("value", "value"))


def new_folder(parent: str | Path, name: str) -> Path:
    """Makes a new folder in ``parent``, named after ``name`` and the time."""
    stem = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = Path(parent) / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("the numbers never end")


@contextlib.contextmanager
def run_folder(config: Config, out: Path | None = None) -> Iterator[Path]:
    """Makes a folder for a run and writes ``config.toml`` into it.

    If the run writes nothing else, the folder is removed again.

    Args:
      config: the experiment. ``gradxform run config.toml`` repeats it.
      out: the folder to make; if not given, a new folder in ``config.output.folder``.

    Raises:
      OSError: the folder cannot be made, or ``out`` is not empty. The message names the option or
        the key.
    """
    parent = Path(config.output.folder) if out is None else out.parent
    named = f"output.folder: {parent}" if out is None else f"--out {out}"
    with contextlib.ExitStack() as undo:
        try:
            fresh = out is None or not out.exists()
            if out is not None and not fresh and (not out.is_dir() or any(out.iterdir())):
                raise OSError(0, _TAKEN)
            for ancestor in reversed([parent, *parent.parents]):
                if not ancestor.is_dir():
                    ancestor.mkdir(exist_ok=True)
                    undo.callback(_remove_if_empty, ancestor)
            folder = out or new_folder(parent, config.name)
            if fresh:
                if out is not None:
                    out.mkdir()
                undo.callback(_remove_if_empty, folder)
            try:
                (folder / "config.toml").open("x").close()
            except FileExistsError:  # another run started at the same time
                raise OSError(0, _TAKEN) from None
            undo.callback(_remove_lone_config, folder)
            write_atomically(folder / "config.toml", to_toml(config))
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise OSError(f"{named}: {error.strerror}{where}") from error
        yield folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(data)
            f.close()
            os.chmod(f.name, 0o666 & ~_umask())
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def metrics_csv(rows: Sequence[tuple[str, Row]]) -> str:
    """CSV text with one line per optimiser and epoch.

    >>> metrics_csv([("sgd", {"epoch": 1, "cost": 2.5})])
    'optimizer,epoch,cost\\nsgd,1,2.5\\n'
    """
    return _csv([{"optimizer": label, **row} for label, row in rows])


def members_csv(rows: Mapping[int, dict[str, Any]]) -> str:
    """CSV text with one line per member of a sweep, sorted by number.

    >>> members_csv({3: {"optimizer": "sgd", "learning_rate": 0.1}})
    'member,optimizer,learning_rate\\n3,sgd,0.1\\n'
    """
    return _csv([{"member": number, **row} for number, row in sorted(rows.items())])


def costs_csv(result: "SweepResult") -> str:
    """CSV text with one line per member and epoch: the member's number, the epoch, the cost."""
    lines = (
        f"{number},{epoch},{cost}\n"
        for number, costs in enumerate(result.costs.tolist())
        for epoch, cost in enumerate(costs, start=1)
        if math.isfinite(cost)
    )
    return "".join(["member,epoch,cost\n", *lines])


def summary_json(config: Config, result: RaceResult) -> str:
    """The ranking, the device and the versions as JSON; numbers that are not finite become null."""
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
    return _summary(config, result.name, found)


def sweep_summary_json(config: Config, result: "SweepResult") -> str:
    """The best point of each optimiser, the device and the versions as JSON."""
    from gradxform.lab.training.sweep import best_points, points_of

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
    if not isinstance(config, SurfaceConfig):
        kept = {label: x for label, x in config.training.overrides.items() if label in best}
        training = config.training.model_copy(update={"overrides": kept})
    entries = config.optimizers.items()
    chosen = {label: substitute(x, best[label]) for label, x in entries if label in best}
    update = {"optimizers": chosen, "training": training, "sweep": None}
    return to_toml(config.model_copy(update=update))


def ranking_table(result: RaceResult, title: str) -> Table:
    """The optimisers, best first, with the metrics at the end of their runs."""
    # as text, not as markup: titles and labels may contain brackets
    heading = Text(plain(title), style="table.title")
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    rows = [history.rows[-1] for history in result.histories]
    columns = [(key, heading) for key, heading in COLUMNS if any(key in row for row in rows)]
    table.add_column("#", justify="right")
    table.add_column("optimiser", overflow="fold")
    for _, heading in columns:
        table.add_column(heading, justify="right")
    table.add_column("steps/s", justify="right")
    table.add_column("diverged")
    for rank, history in enumerate(ranked(result), start=1):
        values = (_shown(key, history.rows[-1].get(key, math.nan)) for key, _ in columns)
        at = history.rows[-1].get("epoch", history.rows[-1].get("step"))
        lost = not all(math.isfinite(x) for x in history.rows[-1].values())
        end = (f"at {at:g}" if lost else "yes") if history.diverged else "no"
        rate = f"{history.steps_per_second:,.0f}"
        table.add_row(str(rank), Text(plain(history.label)), *values, rate, end)
    return table


def best_table(result: "SweepResult", title: str) -> Table:
    """The best point of each optimiser, best first, with the means over its members.

    For the measure it also shows the smallest and the largest value.
    """
    from gradxform.lab.training.sweep import best_points, points_of

    table = Table(
        title=Text(plain(title), style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    every, best = points_of(result), best_points(result)
    on_surface = result.measure == "work"
    columns = dict(SURFACE_COLUMNS if on_surface else COLUMNS[1:])
    shown = [key for key in columns if any(key in point.rows[0] for point in best)]
    table.add_column("#", justify="right")
    table.add_column("optimiser", overflow="fold")
    table.add_column("best point", overflow="fold")
    for key in shown:
        table.add_column(columns[key], justify="right")
    table.add_column("not\nsolved" if on_surface else "diverged\nof all", justify="right")
    without = [label for label in every if label not in [point.label for point in best]]
    for rank, point in enumerate(best, start=1):
        values = "\n".join(f"{path} {value:.4g}" for path, value in point.values.items())
        cells = (_mean(key, point, with_range=key == result.measure) for key in shown)
        row = (str(rank), Text(plain(point.label)), Text(plain(values)), *cells)
        table.add_row(*row, _failed([point] if on_surface else every[point.label]))
    for label in without:
        row = ("", Text(plain(label)), "none", *[""] * len(shown))
        table.add_row(*row, _failed(every[label]))
    return table


def save_sweep(folder: Path, config: Config, result: "SweepResult") -> None:
    """Writes all files of a sweep except ``members.csv``."""
    from gradxform.lab.report.plots import pictures
    from gradxform.lab.training.sweep import best_points

    best = best_points(result)
    if best:
        write_atomically(folder / "best.toml", best_toml(config, best))
    if result.costs.size:
        write_atomically(folder / "costs.csv", costs_csv(result))
    for name, figure in pictures(result, config):
        save_figure(folder / f"{name}.png", figure)
    write_atomically(folder / "summary.json", sweep_summary_json(config, result))


def save(folder: Path, config: Config, result: RaceResult) -> None:
    """Writes ``summary.json`` and the pictures that belong to the kind of task."""
    from gradxform.lab.report.plots import pictures

    for name, figure in pictures(result, config):
        save_figure(folder / f"{name}.png", figure)
    # written last: a folder with this file is a finished run
    write_atomically(folder / "summary.json", summary_json(config, result))


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


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
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


def _mean(key: str, point: "Point", with_range: bool) -> str:
    """The mean over the members that did not fail, as text."""
    rows = [row for row in point.rows if row.get("solved", True) and key in row]
    values = [row[key] for row in rows]
    if not values:
        return "none"
    mean = _shown(key, sum(values) / len(values))
    if not with_range or len(values) == 1:
        return mean
    return f"{mean}\n{_shown(key, min(values))}–{_shown(key, max(values))}"


def _failed(points: Sequence["Point"]) -> str:
    members = sum(len(point.rows) for point in points)
    return f"{sum(point.failures for point in points)} of {members}"


def _finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _finite(x) if isinstance(x, float) else x for k, x in row.items()}


def _remove_lone_config(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if [file.name for file in folder.iterdir()] == ["config.toml"]:
            (folder / "config.toml").unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else None


def _shown(key: str, value: float) -> str:
    return f"{value:.4f}" if key.endswith("accuracy") else f"{value:.3g}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
