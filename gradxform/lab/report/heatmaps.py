"""The figure of a sweep over two numbers: a heat map for each optimiser."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gradxform.lab.report.drawing import (
    CROSS,
    HEAT,
    STAR,
    USUAL,
    Look,
    bar,
    entitle,
    entitle_panel,
    explain,
    is_logarithmic,
    panels_of,
)
from gradxform.lab.report.style import in_words
from gradxform.lab.report.sweep_plots import MEASURES, place_of

if TYPE_CHECKING:
    from gradxform.lab.training.outcomes import Point, SweepResult

_MOST_TOLD, _BELOW = 100, -0.18  # most cells that show their share, and its offset


def plot_heatmaps(result: "SweepResult", title: str = "", *, look: Look = USUAL) -> Figure:
    """Draws the measure over two numbers, with a panel for each optimiser with two or more axes.

    A panel shows the first two axes, with the best values of the others. Dark is good. A cross
    marks a point with a diverged member, or without a solved start. A star marks the best point by
    the rule of :func:`gradxform.lab.training.outcomes.best_points`. On a surface each cell also
    shows the share of solved starts.

    Args:
      result: the result of a sweep in which an optimiser has two axes.
      title: the title; the name of the task if empty.
      look: size and dots per inch.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import best_points, points_of

    every = {k: own for k, own in points_of(result).items() if len(own[0].values) >= 2}
    stars = {point.label: point for point in best_points(result)}
    means = np.asarray([p.mean for own in every.values() for p in own])
    means = means[np.isfinite(means) & (means > 0)]
    low, high = (means.min(), means.max()) if len(means) else (0.1, 1.0)
    norm = LogNorm(
        low, max(1.01 * low, min(high, 30 * float(np.median(means)) if len(means) else 1))
    )
    columns = min(3, len(every))
    figure, panels = panels_of(len(every), columns, (4.2, 3.8), look)
    mesh, any_lost = None, False
    for axes, (label, points) in zip(panels, every.items(), strict=True):
        mesh = _heatmap(axes, points, norm, on_surface=result.measure == "work")
        any_lost |= any(not np.isfinite(point.mean) for point in points)
        across, up = list(points[0].values)[:2]
        if label in stars:
            best = stars[label].values
            axes.plot(*_spot(points, best[across], best[up]), **STAR)
        axes.set(xlabel=across.replace("_", " "), ylabel=up.replace("_", " "))
        entitle_panel(axes, in_words(label), 3.6)
    assert mesh is not None
    bar(figure, panels, mesh, MEASURES[result.measure].format(result.unit))
    on_surface = result.measure == "work"
    best_is = "best point: most starts solved (% in its cell)" if on_surface else "best point"
    lost = "no start solved" if on_surface else "a member diverged"
    explain(figure, {best_is: STAR} | ({lost: CROSS} if any_lost else {}))
    entitle(figure, title or result.name)
    return figure


def _heatmap(axes: Axes, points: "Sequence[Point]", norm: LogNorm, on_surface: bool) -> Any:
    """Draws the means of an optimiser's points; returns the artist for the colour bar."""
    across, up = list(points[0].values)[:2]
    xs, ys = _first_two(points)
    if not _is_grid(points):
        axes.set_xscale("log" if is_logarithmic(xs) else "linear")
        axes.set_yscale("log" if is_logarithmic(ys) else "linear")
        x, y, mean = np.transpose([(p.values[across], p.values[up], p.mean) for p in points])
        good = np.isfinite(mean)
        axes.plot(x[~good], y[~good], **CROSS)
        return axes.scatter(x[good], y[good], c=mean[good], norm=norm, cmap=HEAT)
    table = np.full((len(ys), len(xs)), np.nan)
    best: dict[tuple[int, int], Point] = {}
    for point in sorted(points, key=place_of):
        best.setdefault(_spot(points, point.values[across], point.values[up]), point)
    for (column, row), point in best.items():
        if not np.isfinite(point.mean):
            continue
        table[row, column] = point.mean
        if on_surface and table.size <= _MOST_TOLD:
            share = 100 * (1 - point.failures / len(point.rows))
            color = "black" if norm(point.mean) > 0.6 else "white"
            options: dict[str, Any] = {"ha": "center", "va": "top", "color": color}
            axes.text(column, row + _BELOW, f"{share:.0f} %", fontsize="x-small", **options)
    axes.plot(*np.argwhere(np.isnan(table))[:, ::-1].T, **CROSS)
    _name_cells(axes.xaxis, xs)
    _name_cells(axes.yaxis, ys)
    return axes.imshow(table, norm=norm, cmap=HEAT, origin="lower", aspect="auto")


def _first_two(points: "Sequence[Point]") -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of the first two numbers of the points."""
    across, up = list(points[0].values)[:2]
    xs, ys = (np.unique([p.values[name] for p in points]) for name in (across, up))
    return xs, ys


def _is_grid(points: "Sequence[Point]") -> bool:
    xs, ys = _first_two(points)
    return len(xs) * len(ys) <= len(points)


def _spot(points: "Sequence[Point]", x: float, y: float) -> tuple[Any, Any]:
    """The position of a point in the plot; on a grid its column and row."""
    if not _is_grid(points):
        return x, y
    xs, ys = _first_two(points)
    return int(np.searchsorted(xs, x)), int(np.searchsorted(ys, y))


def _name_cells(axis: Axis, values: np.ndarray) -> None:
    """At most eight ticks with the values of the rows or columns."""
    shown = range(0, len(values), -(-len(values) // 8))
    names = [f"{values[i]:.3g}" for i in shown]
    axis.set_ticks(shown, names)
    if isinstance(axis, XAxis) and sum(map(len, names)) > 24:  # horizontal labels would touch
        for label in axis.get_ticklabels():
            label.set(rotation=45, rotation_mode="anchor", horizontalalignment="right")
