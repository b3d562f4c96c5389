"""What a race leaves behind: a folder of files, and a table."""

import csv
import datetime
import io
import itertools
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import gradxform
from gradxform.lab.config import Config, to_toml
from gradxform.lab.train import RaceResult, Row, ranked

COLUMNS = (
    ("value", "value"),
    ("train_loss", "train\nloss"),
    ("validation_loss", "val.\nloss"),
    ("validation_accuracy", "val.\nacc."),
    ("test_loss", "test\nloss"),
    ("test_accuracy", "test\nacc."),
)


def new_folder(parent: str | Path, name: str) -> Path:
    """A folder in ``parent`` that does not exist yet, named after ``name`` and the time."""
    stem = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    endings = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    return next(f for end in endings if not (f := Path(parent) / (stem + end)).exists())


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
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
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
        table.add_row(str(rank), history.label, *values, rate, end)
    return table


def save(folder: Path, config: Config, result: RaceResult) -> None:
    """Writes ``summary.json`` and ``cost.png``."""
    from gradxform.lab.plots import plot_cost

    write_atomically(folder / "summary.json", summary_json(config, result))
    figure = io.BytesIO()
    plot_cost(result, config.title or config.name).savefig(figure, format="png", dpi=150)
    write_atomically(folder / "cost.png", figure.getvalue())


def begin(folder: Path, config: Config) -> None:
    """Makes the folder and writes ``config.toml``, from which the race can be run again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.toml", to_toml(config))


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else None


def _shown(key: str, value: float) -> str:
    return f"{value:.4f}" if key.endswith("accuracy") else f"{value:.3g}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
