"""What a race leaves behind: a folder of files, and a table."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

import gradxform
from gradxform.lab.config import Config, to_toml
from gradxform.lab.train import RaceResult, Row, ranked

COLUMNS = (
    ("value", "value"),
    ("train_loss", "train\nloss"),
    ("validation_loss", "val.\nloss"),
    ("validation_accuracy", "val.\nacc."),
    ("validation_error", "val.\nerror"),
    ("test_loss", "test\nloss"),
    ("test_accuracy", "test\nacc."),
    ("test_error", "test\nerror"),
)


def new_folder(parent: str | Path, name: str) -> Path:
    """Makes a folder in ``parent``, named after ``name`` and the time, that nobody else has."""
    stem = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = Path(parent) / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("the numbers never end")


@contextlib.contextmanager
def run_folder(config: Config, out: Path | None = None) -> Iterator[Path]:
    """A folder for a run, with ``config.toml`` in it; it goes again if the run adds nothing to it.

    Args:
      config: the experiment, from whose ``config.toml`` the race can be run again.
      out: the folder to make; one of its own in ``config.output.folder`` if not given.

    Raises:
      OSError: it cannot be made, or ``out`` holds something already; the message names the option
        or the key.
    """
    parent = Path(config.output.folder) if out is None else out.parent
    named = f"output.folder: {parent}" if out is None else f"--out {out}"
    with contextlib.ExitStack() as undo:
        try:
            fresh = out is None or not out.exists()
            if out is not None and not fresh and (not out.is_dir() or any(out.iterdir())):
                raise OSError(0, "is there already; name a new folder, no run is overwritten")
            for ancestor in reversed([parent, *parent.parents]):
                if not ancestor.is_dir():
                    ancestor.mkdir(exist_ok=True)
                    undo.callback(_remove_if_empty, ancestor)
            folder = out or new_folder(parent, config.name)
            if fresh:
                if out is not None:
                    out.mkdir()
                undo.callback(_remove_if_empty, folder)
            undo.callback(_remove_lone_config, folder)
            write_atomically(folder / "config.toml", to_toml(config))
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise OSError(f"{named}: {error.strerror}{where}") from error
        yield folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
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
    """One line for each optimiser and epoch.

    >>> metrics_csv([("sgd", {"epoch": 1, "cost": 2.5})])
    'optimizer,epoch,cost\\nsgd,1,2.5\\n'
    """
    text = io.StringIO()
    columns = ["optimizer", *dict.fromkeys(key for _, row in rows for key in row)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"optimizer": label, **row} for label, row in rows)
    return text.getvalue()


def summary_json(config: Config, result: RaceResult) -> str:
    """The ranking and what it was made with; numbers that are not finite become null."""
    import jax
    import jaxlib
    import optax

    ranking = [
        {
            "rank": rank,
            "optimizer": history.label,
            "diverged": history.diverged,
            "final": {key: _finite(value) for key, value in history.rows[-1].items()},
            "steps_per_second": history.steps_per_second,
            "compile_seconds": history.compile_seconds,
        }
        for rank, history in enumerate(ranked(result), start=1)
    ]
    packages = (gradxform, jax, jaxlib, optax)
    summary = {
        "name": config.name,
        "title": config.title or config.name,
        "task": result.name,
        "seed": config.seed,
        "ranked_by": result.measure,
        "ranking": ranking,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {p.__name__: p.__version__ for p in packages},
    }
    return json.dumps(summary, indent=2, allow_nan=False) + "\n"


def ranking_table(result: RaceResult, title: str) -> Table:
    """The optimisers, best first, with the metrics at the end of their runs."""
    # as text, not as markup: a title or a label may hold brackets
    heading = Text(title, style="table.title")
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
        end = f"at {at:g}" if history.diverged else "no"
        rate = f"{history.steps_per_second:,.0f}"
        table.add_row(str(rank), Text(history.label), *values, rate, end)
    return table


def save(folder: Path, config: Config, result: RaceResult) -> None:
    """Writes ``summary.json``, ``cost.png`` and, of a task on data, ``work.png``."""
    from gradxform.lab.plots import plot_cost, plot_work

    write_atomically(folder / "summary.json", summary_json(config, result))
    plots = {"cost.png": plot_cost}
    if result.measure == "train_loss":
        plots["work.png"] = plot_work
    for name, plot in plots.items():
        figure = io.BytesIO()
        plot(result, config.title or config.name).savefig(figure, format="png", dpi=150)
        write_atomically(folder / name, figure.getvalue())


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
