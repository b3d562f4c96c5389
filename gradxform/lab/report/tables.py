"""The table that a command prints at the end."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from gradxform.lab.experiment.messages import plain
from gradxform.lab.training.outcomes import RaceResult, ranked

if TYPE_CHECKING:
    from gradxform.lab.training.outcomes import Point, SweepResult

COLUMNS = (
    ("value", "value"),
    ("train_loss", "train\nloss"),
    ("validation_loss", "val.\nloss"),
    ("validation_accuracy", "val.\nacc."),
    ("validation_error", "val.\nerror"),
    ("validation_rmse", "val.\nrmse"),
    ("test_loss", "test\nloss"),
    ("test_accuracy", "test\nacc."),
    ("test_error", "test\nerror"),
    ("test_rmse", "test\nrmse"),
    ("test_relative_error", "relative\nerror"),
)
SURFACE_COLUMNS = (("work", "work"), ("steps", "updates"), ("value", "value"))


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
    from gradxform.lab.training.outcomes import best_points, points_of

    table = Table(
        title=Text(plain(title), style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    every, best = points_of(result), best_points(result)
    on_surface = result.is_on_surface
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


def _shown(key: str, value: float) -> str:
    return f"{value:.4f}" if key.endswith("accuracy") else f"{value:.3g}"
