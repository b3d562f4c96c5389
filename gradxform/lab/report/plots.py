"""Figures: training cost by epoch, loss by work, paths on a surface, and results of sweeps.

Line styles and markers distinguish the optimisers without colour. The figures do not use pyplot, so
no figure stays open and no display is needed.
"""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from gradxform.lab.tasks.surfaces import Surface, is_surface, surface_of
from gradxform.lab.training.outcomes import RaceResult, ranked

if TYPE_CHECKING:
    from gradxform.lab.training.outcomes import Point, SweepResult

# The colours of Okabe and Ito without the yellow; colour-blind readers can distinguish them. Dark
# and light colours alternate, so that neighbours also differ in grey. The numbers of colours,
# dashes and markers have no common factor, so there are many combinations.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
MARKERS = "os^Dv<>PXp*"


class Style(NamedTuple):
    """The colour, line and marker of one optimiser."""

    color: str
    linestyle: Any
    marker: str


def styles(count: int) -> list[Style]:
    """``count`` different styles."""
    cycle = zip(
        itertools.cycle(COLOURS), itertools.cycle(DASHES), itertools.cycle(MARKERS), strict=False
    )
    return [Style(*style) for style in itertools.islice(cycle, count)]


def plot_cost(result: RaceResult, title: str = "") -> Figure:
    """Draws the training cost of every optimiser against epochs, on a logarithmic scale.

    On a surface it draws the value minus the lowest value, of the surface's minima and of all
    optimisers, against updates. The legend follows the ranking and marks optimisers that diverged.

    Args:
      result: the result of a race.
      title: the title; the name of the task if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    on_surface = result.measure == "value"
    x_key, y_key = ("step", "value") if on_surface else ("epoch", "cost")
    given = [history.label for history in result.histories]
    curves = {history.label: _finite(history.rows, x_key, y_key) for history in result.histories}
    if on_surface:
        known = surface_of(result.name).lowest if is_surface(result.name) else np.inf
        lowest = min([known, *(y.min(initial=np.inf) for _, y in curves.values())])
        curves = {label: (x, np.maximum(y - lowest, 0)) for label, (x, y) in curves.items()}

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    style_of = dict(zip(given, styles(len(given)), strict=True))
    legend: list[tuple[str, Line2D]] = []
    for place, history in enumerate(ranked(result)):
        x, y = curves[history.label]
        every = max(1, len(x) // 8)
        shift = min(place * every // max(1, len(given)), len(x) - 1) if len(x) > 8 else 0
        label = history.label + (" (diverged)" if history.diverged else "")
        (line,) = axes.plot(
            x,
            np.where(y > 0, y, np.nan),  # a logarithmic scale cannot show zero
            **style_of[history.label]._asdict(),
            label=label,
            linewidth=1.5,
            markersize=5,
            markevery=(shift, every),
        )
        legend.append((label, line))
    axes.set_yscale("log")
    _limit_and_mark(axes, [y for _, y in curves.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if on_surface:
        axes.set_xlabel("updates")
        axes.set_ylabel("value − lowest value")
    else:
        axes.set_xlabel("epochs (passes over the training examples)")
        axes.set_ylabel(f"training cost ({result.unit})")
    _entitle(figure, title or result.name)
    _clear(axes)
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    _legend(axes, legend, **where, handlelength=4, frameon=False)
    return figure


def plot_work(result: RaceResult, title: str = "") -> Figure:
    """Draws the training loss or error after each epoch against updates, gradients and seconds.

    All scales are logarithmic, because minibatches make thousands of updates and large batches make
    tens. :func:`gradxform.lab.training.race.race_on_task` defines how gradients are counted. The
    legend follows the ranking.

    Args:
      result: the result of a race on data.
      title: the title; the name of the task if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    given = [history.label for history in result.histories]
    style_of = dict(zip(given, styles(len(given)), strict=True))
    has_error = any("train_error" in history.rows[-1] for history in result.histories)
    measure = "train_error" if has_error else "train_loss"
    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
    panels = figure.subplots(1, len(_WORK), sharey=True)
    legend: list[tuple[str, Line2D]] = []
    for axes, (key, words) in zip(panels, _WORK.items(), strict=True):
        legend, drawn = [], []
        for place, history in enumerate(ranked(result)):
            x, y = (np.asarray([row[k] for row in history.rows], float) for k in (key, measure))
            y = np.where(np.isfinite(y) & (y > 0), y, np.nan)  # values that the scale can show
            drawn.append(y)
            (line,) = axes.plot(
                x,
                y,
                **style_of[history.label]._asdict(),
                linewidth=1.5,
                markersize=5,
                # as a fraction of the diagonal, because points crowd on a logarithmic scale
                markevery=(0.15 * place / len(given), 0.15) if len(x) > 8 else None,
            )
            legend.append((history.label + (" (diverged)" if history.diverged else ""), line))
        if any(np.isfinite(y).any() for y in drawn):  # without points the scale has no limits
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(words)
        firsts = [y[0] for y in drawn if np.isfinite(y[0])]
        if firsts:  # a lower float32 loss is only rounding
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-7 * float(np.median(firsts))))
        _limit_and_mark(axes, drawn)
        _clear(axes)
    what = "training error (squared error per image)"
    panels[0].set_ylabel(what if has_error else f"training loss ({result.unit})")
    _entitle(figure, title or result.name)
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    _legend(panels[-1], legend, **where, handlelength=4, frameon=False)
    return figure


_WORK = {
    "step": "updates",
    "gradients": "work, in gradients\nof all training examples",
    "seconds": "training time (s)",
}


def plot_paths(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    *,
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Draws paths of optimisers over the contours of a surface.

    Args:
      surface: the function; the plot shows its ``bounds``.
      paths: points of shape (steps + 1, 2), by label, such as the first result of
        :func:`gradxform.lab.training.surfaces.make_walk`.
      title: the title; the name and formula of the surface if empty.
      axes: the axes to draw into; a new figure if not given.

    Returns:
      The figure.

    Raises:
      ValueError: a path has another shape.
    """
    for label, path in paths.items():
        if np.ndim(path) != 2 or np.shape(path)[1] != 2:
            shape = np.shape(path)
            raise ValueError(f"paths[{label!r}] should be of shape (steps + 1, 2), has {shape}")
    if axes is None:
        axes = Figure(figsize=(6.4, 5.2), layout="constrained").add_subplot()
    _contours(surface, axes)
    legend: list[tuple[str, Line2D]] = []
    for style, (label, path) in zip(styles(len(paths)), paths.items(), strict=True):
        x, y = np.asarray(path, float).T
        every = max(1, len(x) // 20)
        options = style._asdict() | {"markersize": 4, "markevery": every, "linewidth": 1.5}
        legend.append((label, axes.plot(x, y, **options, label=label)[0]))
    if paths:
        x, y = np.asarray(next(iter(paths.values())), float)[0]
        (mark,) = axes.plot(x, y, "ko", markersize=8, fillstyle="none", label="start")
        legend.append(("start", mark))
    for i, (x, y) in enumerate(surface.minima):
        label = "minimum" if i == 0 else None
        (mark,) = axes.plot(x, y, "k*", markersize=12, markerfacecolor="white", label=label)
        legend += [("minimum", mark)] if i == 0 else []
    (left, right), (bottom, top) = surface.bounds
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="$x$", ylabel="$y$")
    shown = title or f"{surface.name}: ${surface.formula}$"
    axes.set_title(shown, fontsize="medium", parse_math=not title)
    _legend(axes, legend, loc="best", fontsize="small", handlelength=3.5, framealpha=0.9)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def plot_sensitivity(result: "SweepResult", title: str = "") -> Figure:
    """Draws the result of each optimiser against its learning rate, or the first swept number.

    A curve is the mean over the seeds, and its band reaches from the smallest to the largest value.
    If other numbers are swept too, it shows the best of them. Points with a diverged member are at
    the top. Dropped points are at their value when they were dropped. Random points of several
    numbers have no curve. On a surface the plot shows the share of solved starts and the mean work.

    Args:
      result: the result of a sweep with an axis.
      title: the title; the name of the task if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import points_of

    on_surface = result.measure == "work"
    swept = [name for member in result.members for name in member.values]
    across = "learning_rate" if "learning_rate" in swept else swept[0]
    figure = Figure(figsize=(8.0, 7.2 if on_surface else 4.8), layout="constrained")
    panels = figure.subplots(2 if on_surface else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes = panels[-1]
    every = points_of(result)
    xs = np.unique([p.values[across] for own in every.values() for p in own if across in p.values])
    legend: list[tuple[str, Line2D]] = []
    drawn, any_lost = [], False
    chosen = zip(styles(len(every)), every.items(), strict=True)
    for place, (style, (label, points)) in enumerate(chosen):
        best = _best_at(points, across)
        x = np.asarray([point.values[across] for point in best])
        joined = len(best) < len(points) or all(len(p.values) == 1 for p in points)
        if not best:  # the optimiser lacks this number: draw a constant
            x, best = xs[[0, -1]], 2 * [min(points, key=_place)]
        y = np.asarray([p.mean if np.isfinite(p.mean) else np.nan for p in best])
        drawn.append(y[np.isfinite(y)])
        options: dict[str, Any] = style._asdict() | {"markersize": 5, "linewidth": 1.5}
        options |= {} if joined else {"linestyle": "none"}
        (line,) = axes.plot(x, y, **options)
        legend.append((label, line))
        if on_surface:  # starts are near and far: a band would cover everything
            shares = [100 * (1 - point.failures / len(point.rows)) for point in best]
            panels[0].plot(x, shares, **options)
        else:
            low, high = np.transpose([_range(point, result.measure) for point in best])
            band = {"color": style.color, "alpha": 0.15, "linewidth": 0 if joined else 1.5}
            (axes.fill_between if joined else axes.vlines)(x, low, high, **band)
        lost = x[np.isnan(y)]
        any_lost |= len(lost) > 0
        options |= {"linestyle": "none", "fillstyle": "none"}
        at_top = np.full(len(lost), 0.98 - 0.035 * place)
        axes.plot(lost, at_top, **options, transform=axes.get_xaxis_transform())
    if any_lost:
        (mark,) = axes.plot([], [], "o", color="0.4", fillstyle="none", markersize=5)
        legend.append((f"{'none solved' if on_surface else 'diverged'} (at the top)", mark))
    axes.set_xscale("log" if _is_logarithmic(xs) else "linear")
    values = np.concatenate(drawn)
    if len(values) and values.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(top=min(2 * axes.get_ylim()[1], 10 * float(np.median(values))))
        _limit_and_mark(axes, [])
    axes.set_xlabel(across.replace("_", " "))
    axes.set_ylabel(_MEASURES[result.measure].format(result.unit))
    if on_surface:
        panels[0].set_ylabel("starts solved (%)")
    for panel in panels:
        _clear(panel)
    _entitle(figure, title or result.name)
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    _legend(panels[0], legend, **where, handlelength=4, frameon=False)
    return figure


def plot_heatmaps(result: "SweepResult", title: str = "") -> Figure:
    """Draws the measure over two numbers, with a panel for each optimiser with two or more axes.

    A panel shows the first two axes, with the best values of the others. Dark is good. A cross
    marks a point with a diverged member, or without a solved start. A star marks the best point by
    the rule of :func:`gradxform.lab.training.outcomes.best_points`. On a surface each cell also
    shows the share of solved starts.

    Args:
      result: the result of a sweep in which an optimiser has two axes.
      title: the title; the name of the task if empty.

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
    figure, panels = _panels(len(every), columns, (4.2, 3.8))
    mesh, any_lost = None, False
    for axes, (label, points) in zip(panels, every.items(), strict=True):
        mesh = _heatmap(axes, points, norm, on_surface=result.measure == "work")
        any_lost |= any(not np.isfinite(point.mean) for point in points)
        across, up = list(points[0].values)[:2]
        if label in stars:
            best = stars[label].values
            axes.plot(*_spot(points, best[across], best[up]), **_STAR)
        axes.set(xlabel=across.replace("_", " "), ylabel=up.replace("_", " "))
        axes.set_title(_wrapped(label, 40), fontsize="medium", parse_math=False)
    assert mesh is not None
    _bar(figure, panels, mesh, _MEASURES[result.measure].format(result.unit))
    on_surface = result.measure == "work"
    best_is = "best point: most starts solved (%)" if on_surface else "best point"
    lost = "no start solved" if on_surface else "a member diverged"
    _explain(figure, {best_is: _STAR} | ({lost: _CROSS} if any_lost else {}))
    _entitle(figure, title or result.name)
    return figure


def _heatmap(axes: Axes, points: "Sequence[Point]", norm: LogNorm, on_surface: bool) -> Any:
    """Draws the means of an optimiser's points; returns the artist for the colour bar."""
    across, up = list(points[0].values)[:2]
    xs, ys = _first_two(points)
    if not _is_grid(points):
        axes.set_xscale("log" if _is_logarithmic(xs) else "linear")
        axes.set_yscale("log" if _is_logarithmic(ys) else "linear")
        x, y, mean = np.transpose([(p.values[across], p.values[up], p.mean) for p in points])
        good = np.isfinite(mean)
        axes.plot(x[~good], y[~good], **_CROSS)
        return axes.scatter(x[good], y[good], c=mean[good], norm=norm, cmap=_COLOURS)
    table = np.full((len(ys), len(xs)), np.nan)
    best: dict[tuple[int, int], Point] = {}
    for point in sorted(points, key=_place):
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
    axes.plot(*np.argwhere(np.isnan(table))[:, ::-1].T, **_CROSS)
    _name_cells(axes.xaxis, xs)
    _name_cells(axes.yaxis, ys)
    return axes.imshow(table, norm=norm, cmap=_COLOURS, origin="lower", aspect="auto")


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


def plot_batch_sizes(
    result: "SweepResult", sizes: Mapping[str, int | str], title: str = ""
) -> Figure:
    """Draws accuracy, time, updates and epochs against batch size, at the best points.

    Updates and epochs are counted until a training cost that all optimisers reach.

    Args:
      result: the result of a sweep on data.
      sizes: the batch size by label, a number or ``"full"``.
      title: the title; the name of the task if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import best_points

    order = sorted(set(sizes.values()), key=lambda size: (size == "full", size))
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    points = sorted(best_points(result), key=lambda point: order.index(sizes[point.label]))
    has = points[0].rows[0] if points else {}
    metric = next(
        (m for m in ("test_accuracy", "test_error", "test_loss") if m in has), "test_loss"
    )
    costs = [np.mean(result.costs[list(point.numbers)], axis=0) for point in points]
    target = max((float(np.nanmin(cost)) for cost in costs), default=math.nan)
    reached = [1 + int(np.argmax(cost <= target)) for cost in costs]
    panels[0].set_ylabel(metric.replace("_", " "))
    panels[1].set_ylabel("time per epoch and member (ms)")
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
    panels[0].plot(x, [np.mean(values) for values in spread], **options)
    panels[0].vlines(x, [min(v) for v in spread], [max(v) for v in spread], color="k")
    panels[1].plot(x, times, **options)
    panels[1].set_ylim(bottom=0)
    panels[2].plot(x, [e * n for e, n in zip(reached, steps, strict=True)], **options)
    panels[3].plot(x, reached, **options)
    for panel in panels[2:]:
        panel.set_yscale("log")
        _limit_and_mark(panel, [])
    for panel in panels:
        panel.set_xticks(range(len(order)), [str(size) for size in order])
        _clear(panel)
    _entitle(figure, title or result.name)
    return figure


def plot_starts(surface: str, result: "SweepResult", title: str = "") -> Figure:
    """Draws from which starts each optimiser, at its best point, reaches a minimum.

    Each dot is a solved start. A darker dot took more evaluations and curvature products. A cross
    is a start from which the optimiser did not reach a minimum.

    Args:
      surface: the name of the surface.
      result: the result of a sweep on it.
      title: the title; the name of the surface if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import points_of

    ground = surface_of(surface)
    best = [min(own, key=_place) for own in points_of(result).values()]
    work = [row["work"] for point in best for row in point.rows if row["solved"]]
    norm = LogNorm(min(work, default=1), max(max(work, default=1), 1.01 * min(work, default=1)))
    figure, panels = _panels(len(best), min(3, len(best)), (3.8, 3.5))
    dots = None
    for axes, point in zip(panels, best, strict=True):
        _contours(ground, axes)
        xs = np.asarray([(row["x0"], row["y0"]) for row in point.rows])
        good = np.asarray([row["solved"] for row in point.rows])
        size = max(2.5, min(7.0, 130 / np.sqrt(len(xs))))
        dots = axes.scatter(
            *xs[good].T,
            c=[row["work"] for row in point.rows if row["solved"]],
            s=size**2,
            norm=norm,
            cmap=_COLOURS + "_r",
            edgecolor="black",  # the lightest dots would vanish on the grey surface
            linewidth=0.5,
            zorder=3,
        )
        cross: dict[str, Any] = _CROSS | {"markersize": size}
        axes.plot(*xs[~good].T, **cross)
        for x, y in ground.minima:
            axes.plot(x, y, **_STAR)
        (left, right), (bottom, top) = ground.bounds
        axes.set(xlim=(left, right), ylim=(bottom, top))
        values = point.values.items()
        said = ", ".join(f"{path.replace('_', ' ')} {value:.3g}" for path, value in values)
        heading = f"{point.label}{f' ({said})' if said else ''}\n{good.sum()} of {len(good)} solved"
        axes.set_title(_wrapped(heading, 50), fontsize="small", parse_math=False)
    assert dots is not None
    _bar(figure, panels, dots, result.unit)
    dot = {"marker": "o", "color": "0.5", "markeredgecolor": "black", "linestyle": "none"}
    _explain(
        figure,
        {
            "solved from here (darker: more work)": dot | {"markersize": 6},
            "not solved from here": _CROSS,
            "minimum": _STAR,
        },
    )
    _entitle(figure, title or surface)
    return figure


_LETTERS = 9  # letters of a title per inch
_COLOURS = "viridis"  # its lightness rises evenly, so it also works in grey
_MEASURES = {
    "validation_loss": "validation loss ({})",
    "train_loss": "training loss ({})",
    "work": "{},\nmean over solved starts",
}


_MOST_TOLD, _BELOW = 100, -0.18  # most cells that show their share, and its offset
_CROSS: dict[str, Any] = {"marker": "x", "color": "black", "markersize": 6, "linestyle": "none"}
_STAR: dict[str, Any] = {
    "marker": "*",
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 13,
    "zorder": 4,
    "linestyle": "none",
}


def _place(point: "Point") -> tuple[float, float]:
    return (point.failures, point.mean)


def _best_at(points: "Sequence[Point]", name: str) -> "list[Point]":
    """For each value of a number the best point with that value, sorted by value."""
    best: dict[float, Point] = {}
    for point in sorted(points, key=_place):
        if name in point.values:
            best.setdefault(point.values[name], point)
    return [best[value] for value in sorted(best)]


def _range(point: "Point", measure: str) -> tuple[float, float]:
    """The smallest and largest value of a point's members; NaN if it has no mean."""
    values = [row[measure] for row in point.rows if row.get("solved", True)]
    return (min(values), max(values)) if np.isfinite(point.mean) else (np.nan, np.nan)


def _is_logarithmic(values: np.ndarray) -> bool:
    """Whether sorted values are more evenly spaced on a logarithmic than on a linear scale."""
    low, high = values[0], values[-1]
    if low <= 0 or high < 10 * low:
        return False
    if len(values) == 2:
        return True
    middle = float(np.median(values[1:-1]))
    off = abs(math.log(middle) - math.log(low * high) / 2) / math.log(high / low)
    return off < abs(middle - (low + high) / 2) / (high - low)


def _name_cells(axis: Axis, values: np.ndarray) -> None:
    """At most eight ticks with the values of the rows or columns."""
    shown = range(0, len(values), -(-len(values) // 8))
    names = [f"{values[i]:.3g}" for i in shown]
    axis.set_ticks(shown, names)
    if isinstance(axis, XAxis) and sum(map(len, names)) > 24:  # horizontal labels would touch
        for label in axis.get_ticklabels():
            label.set(rotation=45, rotation_mode="anchor", horizontalalignment="right")


def _bar(figure: Figure, panels: Sequence[Axes], drawn: Any, label: str) -> None:
    """A colour bar with few labels."""
    axis = figure.colorbar(drawn, ax=panels, label=label).ax.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _explain(figure: Figure, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend of marks below all panels."""
    lines = [Line2D([], [], **options, label=name) for name, options in marks.items()]
    columns = len(lines) if figure.get_figwidth() > 6 else 1
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)


def _entitle(figure: Figure, title: str) -> None:
    """Sets the title of a figure, wrapped to its width."""
    shown = _wrapped(title, int(_LETTERS * figure.get_figwidth()))
    figure.suptitle(shown, parse_math=False)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def _panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of a ``size`` in inches."""
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns + 1, size[1] * rows + 1), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _limit_and_mark(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Sets the limits and ticks of a logarithmic vertical axis."""
    firsts = [y[0] for y in curves if len(y) and y[0] > 0]
    if len(curves) > 1 and firsts:  # a diverging curve must not flatten the others
        axes.set_ylim(top=min(axes.get_ylim()[1], 10 * float(np.median(firsts))))
    low, high = axes.get_ylim()
    few_decades = low > 0 and high < 1e4 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few_decades else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _clear(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, entries: Sequence[tuple[str, Line2D]], **options: Any) -> None:
    """A legend that shows labels literally, including "$" and a leading "_"."""
    if not entries:
        return
    labels, lines = zip(*entries, strict=True)
    legend = axes.legend(lines, [f"entry {i}" for i in range(len(lines))], **options)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)


def _contours(surface: Surface, axes: Axes) -> None:
    import jax
    import jax.numpy as jnp

    x, y = np.meshgrid(*(np.linspace(*bound, 201) for bound in surface.bounds))
    points = jnp.asarray(np.stack([x, y], axis=-1).reshape(-1, 2), jnp.float32)
    z = np.asarray(jax.vmap(surface.fn)(points), float).reshape(x.shape)
    # contours at equal heights would crowd at the steep rim and leave the valley empty
    height = z - z.min()
    field = np.log(height + 1e-3 * np.median(height))
    axes.contourf(x, y, field, 18, cmap="Greys", alpha=0.3)
    axes.contour(x, y, field, 18, colors="0.65", linewidths=0.6, linestyles="solid")


def _finite(rows: Sequence[Mapping[str, float]], *keys: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray([row[key] for row in rows], float) for key in keys)
    kept = np.isfinite(y)
    return x[kept], y[kept]
