"""Figures of a sweep: the result by learning rate, and by batch size."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradxform.lab.experiment.grid import Table
from gradxform.lab.report.drawing import (
    USUAL,
    Look,
    band_entry,
    clear,
    entitle,
    is_logarithmic,
    legend_beside,
    limit_and_mark,
    mark_entry,
    new_figure,
    set_scales,
)
from gradxform.lab.report.style import Style, in_words, styles_of

if TYPE_CHECKING:
    from gradxform.lab.training.outcomes import Point, SweepResult

MEASURES = {
    "validation_loss": "validation loss ({})",
    "train_loss": "training loss ({})",
    "work": "{},\nmean over solved starts",
}


def plot_sensitivity(
    result: "SweepResult",
    title: str = "",
    *,
    optimizers: Mapping[str, Table] | None = None,
    look: Look = USUAL,
) -> Figure:
    """Draws the result of each optimiser against its learning rate, or the first swept number.

    A curve is the mean over the seeds, and its band reaches from the smallest to the largest value.
    If other numbers are swept too, it shows the best of them. Points with a diverged member are at
    the top. Dropped points are at their value when they were dropped. Random points of several
    numbers have no curve. On a surface the plot shows the share of solved starts and the mean work.

    Args:
      result: the result of a sweep with an axis.
      title: the title; the name of the task if empty.
      optimizers: the config's tables by label, for the methods' colours and markers.
      look: size, dots per inch and scales.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import points_of

    every = points_of(result)
    swept = [name for member in result.members for name in member.values]
    across = "learning_rate" if "learning_rate" in swept else swept[0]
    xs = np.unique([p.values[across] for own in every.values() for p in own if across in p.values])
    # where every start is solved a panel of the shares would say nothing
    failures = result.measure == "work" and any(p.failures for own in every.values() for p in own)
    figure = new_figure(8.0, 7.2 if failures else 4.8, look)
    panels = figure.subplots(2 if failures else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    style_of = styles_of(every, optimizers)
    legend: list[tuple[str, Artist]] = []
    drawn: list[np.ndarray] = []
    marks: dict[str, tuple[str, Artist]] = {}
    for place, (label, points) in enumerate(every.items()):
        line, y = _curve(panels, result.measure, points, across, xs, style_of[label], place, marks)
        legend.append((in_words(label), line))
        drawn.append(y)
    axes = panels[-1]
    values = np.concatenate(drawn)
    set_scales(axes, look, x=is_logarithmic(xs), y=bool(len(values) and values.min() > 0))
    if axes.get_yscale() == "log" and len(values):
        axes.set_ylim(top=min(2 * axes.get_ylim()[1], 10 * float(np.median(values))))
        limit_and_mark(axes, [])
    axes.set_xlabel(across.replace("_", " "))
    axes.set_ylabel(MEASURES[result.measure].format(result.unit))
    if failures:
        panels[0].set_ylabel("starts solved (%)")
    for panel in panels:
        clear(panel)
    entitle(figure, title or result.name)
    legend_beside(panels[0], [*legend, *marks.values()], look)
    return figure


def _curve(
    panels: Sequence[Axes],
    measure: str,
    points: "Sequence[Point]",
    across: str,
    xs: np.ndarray,
    style: Style,
    place: int,
    marks: dict[str, tuple[str, Artist]],
) -> tuple[Artist, np.ndarray]:
    """Draws an optimiser's curve. Returns its line and its finite values.

    It adds to ``marks`` the entries that explain what else it has drawn.
    """
    axes, on_surface = panels[-1], measure == "work"
    best = best_at(points, across)
    x = np.asarray([point.values[across] for point in best])
    joined = len(best) < len(points) or all(len(p.values) == 1 for p in points)
    if not best:  # the optimiser lacks this number: draw a constant
        x, best = xs[[0, -1]], 2 * [min(points, key=place_of)]
        marks["level"] = mark_entry(f"level: no {across.replace('_', ' ')}", color="0.4")
    y = np.asarray([p.mean if np.isfinite(p.mean) else np.nan for p in best])
    options: dict[str, Any] = style._asdict() | {"markersize": 5, "linewidth": 1.5}
    options |= {} if joined else {"linestyle": "none"}
    (line,) = axes.plot(x, y, **options)
    if on_surface and len(panels) > 1:
        shares = [100 * (1 - point.failures / len(point.rows)) for point in best]
        panels[0].plot(x, shares, **options)
    if not on_surface and any(len(point.rows) > 1 for point in best):
        low, high = np.transpose([_range(point, measure) for point in best])
        band = {"color": style.color, "alpha": 0.15, "linewidth": 0 if joined else 1.5}
        (axes.fill_between if joined else axes.vlines)(x, low, high, **band)
        marks["band"] = band_entry("band: from the best to the worst seed")
    lost = x[np.isnan(y)]
    at_top = np.full(len(lost), 0.98 - 0.035 * place)
    options |= {"linestyle": "none", "fillstyle": "none"}
    axes.plot(lost, at_top, **options, transform=axes.get_xaxis_transform())
    if len(lost):
        look = {"marker": "o", "color": "0.4", "fillstyle": "none", "linestyle": "none"}
        words = "none solved" if on_surface else "diverged"
        marks["lost"] = mark_entry(f"{words} (at the top)", **look, markersize=5)
    return line, y[np.isfinite(y)]


def plot_batch_sizes(
    result: "SweepResult", sizes: Mapping[str, int | str], title: str = "", *, look: Look = USUAL
) -> Figure:
    """Draws accuracy, time, updates and epochs against batch size, at the best points.

    Updates and epochs are counted until a training cost that all optimisers reach.

    Args:
      result: the result of a sweep on data.
      sizes: the batch size by label, a number or ``"full"``.
      title: the title; the name of the task if empty.
      look: size and dots per inch.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import best_points

    order = sorted(set(sizes.values()), key=lambda size: (size == "full", size))
    figure = new_figure(8.4, 6.4, look)
    panels = figure.subplots(2, 2, sharex=True).ravel()
    points = sorted(best_points(result), key=lambda point: order.index(sizes[point.label]))
    has = points[0].rows[0] if points else {}
    metrics = ("test_accuracy", "test_error", "test_loss", result.measure)
    metric = next((m for m in metrics if m in has), result.measure)
    costs = [np.mean(result.costs[list(point.numbers)], axis=0) for point in points]
    target = max((float(np.nanmin(cost)) for cost in costs), default=math.nan)
    reached = [1 + int(np.argmax(cost <= target)) for cost in costs]
    panels[0].set_ylabel(metric.replace("_", " "))
    panels[1].set_ylabel("time of an epoch of a run (ms),\nwithout compilation")
    panels[2].set_ylabel(f"updates until a training cost of {target:.3g}")
    panels[3].set_ylabel(f"epochs until a training cost of {target:.3g}")
    for panel in panels[2:]:
        panel.set_xlabel("batch size")
    x = [order.index(sizes[point.label]) for point in points]
    is_curve = len(set(x)) == len(x)
    options = {"color": "k", "marker": "o", "linestyle": "-" if is_curve else "none"}
    steps = [point.rows[0]["steps"] / point.rows[0]["epochs"] for point in points]
    spread = [[row[metric] for row in point.rows] for point in points]
    times = [1e3 * point.rows[0]["seconds"] / point.rows[0]["epochs"] for point in points]
    panels[0].plot(x, [np.mean(values) for values in spread], **options, label="mean of the seeds")
    if any(len(values) > 1 for values in spread):
        ends = [min(v) for v in spread], [max(v) for v in spread]
        panels[0].vlines(x, *ends, color="k", label="from the worst to the best seed")
        panels[0].legend(frameon=False, fontsize="small")
    panels[1].plot(x, times, **options)
    panels[1].set_ylim(bottom=0)
    panels[2].plot(x, [e * n for e, n in zip(reached, steps, strict=True)], **options)
    panels[3].plot(x, reached, **options)
    for panel in panels[2:]:
        panel.set_yscale("log")
        limit_and_mark(panel, [])
    for panel in panels:
        panel.set_xticks(range(len(order)), [str(size) for size in order])
        clear(panel)
    entitle(figure, title or result.name)
    return figure


def place_of(point: "Point") -> tuple[float, float]:
    """The order of points: fewer failures first, then the lower mean."""
    return (point.failures, point.mean)


def best_at(points: "Sequence[Point]", name: str) -> "list[Point]":
    """For each value of a number the best point with that value, sorted by value."""
    best: dict[float, Point] = {}
    for point in sorted(points, key=place_of):
        if name in point.values:
            best.setdefault(point.values[name], point)
    return [best[value] for value in sorted(best)]


def _range(point: "Point", measure: str) -> tuple[float, float]:
    """The smallest and largest value of a point's members; NaN if it has no mean."""
    values = [row[measure] for row in point.rows if row.get("solved", True)]
    return (min(values), max(values)) if np.isfinite(point.mean) else (np.nan, np.nan)
