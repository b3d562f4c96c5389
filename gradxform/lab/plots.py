"""Figures: training cost against epochs, loss against work, and paths on a surface.

Line styles and markers tell the optimisers apart without colour. Figures are made without pyplot:
nothing is left open, and no display is needed.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from gradxform.lab.surfaces import Surface
from gradxform.lab.train import RaceResult, ranked

# Okabe and Ito's colours, which colour-blind readers tell apart, less the yellow; dark and light
# ones take turns, so that neighbours differ in grey as well. Numbers of colours, dashes and markers
# without a common factor make the combinations last.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
MARKERS = "os^Dv<>PXp*"


class Style(NamedTuple):
    """How one optimiser is drawn."""

    color: str
    linestyle: Any
    marker: str


def styles(count: int) -> list[Style]:
    """``count`` styles, no two alike."""
    cycle = zip(
        itertools.cycle(COLOURS), itertools.cycle(DASHES), itertools.cycle(MARKERS), strict=False
    )
    return [Style(*style) for style in itertools.islice(cycle, count)]


def plot_cost(result: RaceResult, title: str = "") -> Figure:
    """Training cost of every optimiser, on a logarithmic scale, against epochs.

    On a surface it is the height above the lowest value reached by any of them, against updates.
    The legend is in the order of the ranking, and names those that diverged.

    Args:
      result: of a race.
      title: over the plot; the name of the task if empty.

    Returns:
      The figure; save it by ``figure.savefig(path)``.
    """
    on_surface = result.measure == "value"
    x_key, y_key = ("step", "value") if on_surface else ("epoch", "cost")
    given = [history.label for history in result.histories]
    curves = {history.label: _finite(history.rows, x_key, y_key) for history in result.histories}
    if on_surface:
        lowest = min(y.min(initial=np.inf) for _, y in curves.values())
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
            np.where(y > 0, y, np.nan),  # a zero has no place on a logarithmic scale
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
        axes.set_ylabel("value above the lowest reached")
    else:
        axes.set_xlabel("epochs (passes over the training examples)")
        axes.set_ylabel(f"training cost ({result.unit})")
    figure.suptitle(title or result.name, parse_math=False)
    _clear(axes)
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    _legend(axes, legend, **where, handlelength=4, frameon=False)
    return figure


def plot_work(result: RaceResult, title: str = "") -> Figure:
    """Training loss after each epoch, or error, against updates, gradients and seconds.

    All scales are logarithmic: minibatches make thousands of updates where large batches make tens.
    What a gradient is, is told at :func:`gradxform.lab.train.race_on_task`. The legend is in the
    order of the ranking.

    Args:
      result: of a race on data.
      title: over the plot; the name of the task if empty.

    Returns:
      The figure; save it by ``figure.savefig(path)``.
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
            y = np.where(np.isfinite(y) & (y > 0), y, np.nan)  # what has a place on the scale
            drawn.append(y)
            (line,) = axes.plot(
                x,
                y,
                **style_of[history.label]._asdict(),
                linewidth=1.5,
                markersize=5,
                # in parts of the diagonal, as points crowd on a logarithmic scale
                markevery=(0.15 * place / len(given), 0.15) if len(x) > 8 else None,
            )
            legend.append((history.label + (" (diverged)" if history.diverged else ""), line))
        if any(np.isfinite(y).any() for y in drawn):  # without a point the scale has no limits
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(words)
        firsts = [y[0] for y in drawn if np.isfinite(y[0])]
        if firsts:  # below this a float32 loss is rounding
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-7 * float(np.median(firsts))))
        _limit_and_mark(axes, drawn)
        _clear(axes)
    what = "training error (squared error per image)"
    panels[0].set_ylabel(what if has_error else f"training loss ({result.unit})")
    figure.suptitle(title or result.name, parse_math=False)
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    _legend(panels[-1], legend, **where, handlelength=4, frameon=False)
    return figure


_WORK = {
    "step": "updates",
    "gradients": "gradients of all training examples,\nor as much work",
    "seconds": "seconds of training",
}


def plot_paths(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    *,
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """Paths of optimisers over the contours of a surface.

    Args:
      surface: the function; its ``bounds`` are drawn.
      paths: points of shape (steps + 1, 2), by label, such as the first result of
        :func:`gradxform.lab.train.make_walk`.
      title: over the plot; the surface's name and formula if empty.
      axes: where to draw; a figure of its own if not given.

    Returns:
      The figure.

    Raises:
      ValueError: a path of another shape.
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


def _limit_and_mark(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Limits and ticks of a logarithmic scale of values."""
    firsts = [y[0] for y in curves if len(y) and y[0] > 0]
    if len(curves) > 1 and firsts:  # one that ran away must not flatten the others
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
    """A legend of texts as they are: "$" and a leading "_" mean nothing in a user's label."""
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
    # equal steps of height would crowd at the steep rim and leave the valley empty
    height = z - z.min()
    field = np.log(height + 1e-3 * np.median(height))
    axes.contourf(x, y, field, 18, cmap="Greys", alpha=0.3)
    axes.contour(x, y, field, 18, colors="0.65", linewidths=0.6, linestyles="solid")


def _finite(rows: Sequence[Mapping[str, float]], *keys: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray([row[key] for row in rows], float) for key in keys)
    kept = np.isfinite(y)
    return x[kept], y[kept]
