"""Figures of a race: training cost by epoch, and loss by work."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradxform.lab.experiment.grid import Table
from gradxform.lab.report.drawing import (
    USUAL,
    Look,
    clear,
    entitle,
    finite,
    legend_beside,
    limit_and_mark,
    markers_at,
    new_figure,
    set_scales,
)
from gradxform.lab.report.style import in_words, styles_of
from gradxform.lab.tasks.surfaces import is_surface, surface_of
from gradxform.lab.training.outcomes import History, RaceResult, ranked

_WORK = {
    "step": "updates",
    "gradients": "work, in gradients\nof all training examples",
    "seconds": "training time (s),\nwithout compilation",
}


def plot_cost(
    result: RaceResult,
    title: str = "",
    *,
    optimizers: Mapping[str, Table] | None = None,
    look: Look = USUAL,
) -> Figure:
    """Draws the training cost of every optimiser against epochs, on a logarithmic scale.

    On a surface it draws the value minus the lowest value, of the surface's minima and of all
    optimisers, against updates. The legend follows the ranking and marks optimisers that diverged.

    Args:
      result: the result of a race.
      title: the title; the name of the task if empty.
      optimizers: the config's tables by label, for the methods' colours and markers.
      look: size, dots per inch and scales.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    on_surface = result.measure == "value"
    x_key, y_key = ("step", "value") if on_surface else ("epoch", "cost")
    given = [history.label for history in result.histories]
    curves = {history.label: finite(history.rows, x_key, y_key) for history in result.histories}
    if on_surface:
        known = surface_of(result.name).lowest if is_surface(result.name) else np.inf
        lowest = min([known, *(y.min(initial=np.inf) for _, y in curves.values())])
        curves = {label: (x, np.maximum(y - lowest, 0)) for label, (x, y) in curves.items()}

    figure = new_figure(8.0, 4.8, look)
    axes = figure.add_subplot()
    style_of = styles_of(given, optimizers)
    legend: list[tuple[str, Artist]] = []
    for place, history in enumerate(ranked(result)):
        x, y = curves[history.label]
        (line,) = axes.plot(
            x,
            np.where(y > 0, y, np.nan),  # a logarithmic scale cannot show zero
            **style_of[history.label]._asdict(),
            label=history.label,
            linewidth=1.5,
            markersize=5,
            markevery=markers_at(x, place, len(given), log=look.is_log("x", False)),
        )
        legend.append((_name(history), line))
    set_scales(axes, look, x=False, y=True)
    limit_and_mark(axes, [y for _, y in curves.values()])
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if on_surface:
        axes.set_xlabel("updates")
        axes.set_ylabel("value − lowest value")
    else:
        axes.set_xlabel("epochs (passes over the training examples)")
        axes.set_ylabel(with_unit("training cost", result.unit))
    entitle(figure, title or result.name)
    clear(axes)
    legend_beside(axes, legend, look)
    return figure


def plot_work(
    result: RaceResult,
    title: str = "",
    *,
    optimizers: Mapping[str, Table] | None = None,
    look: Look = USUAL,
) -> Figure:
    """Draws the training loss or error after each epoch against updates, gradients and seconds.

    All scales are logarithmic, because minibatches make thousands of updates and large batches make
    tens. :func:`gradxform.lab.training.race.race_on_task` defines how gradients are counted. Where
    every update is the same share of work, the panel of the updates would show the panel of the
    work again, and is left out. The legend follows the ranking.

    Args:
      result: the result of a race on data.
      title: the title; the name of the task if empty.
      optimizers: the config's tables by label, for the methods' colours and markers.
      look: size, dots per inch and scales.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    style_of = styles_of([history.label for history in result.histories], optimizers)
    has_error = any("train_error" in history.rows[-1] for history in result.histories)
    measure = "train_error" if has_error else "train_loss"
    shown = [key for key in _WORK if key != "step" or not _is_work(result.histories)]
    figure = new_figure(3.2 * len(shown) + 2.4, 4.8, look)
    panels = figure.subplots(1, len(shown), sharey=True)
    legend: list[tuple[str, Artist]] = []
    for axes, key in zip(panels, shown, strict=True):
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
                markevery=markers_at(x, place, len(style_of), log=look.is_log("x", True)),
            )
            legend.append((_name(history), line))
        _limit(axes, drawn, look)
        axes.set_xlabel(_WORK[key])
        clear(axes)
    what = "training error (squared error per image)"
    panels[0].set_ylabel(what if has_error else with_unit("training loss", result.unit))
    entitle(figure, title or result.name)
    legend_beside(panels[-1], legend, look)
    return figure


def with_unit(words: str, unit: str) -> str:
    """``"words (unit)"``, or the words alone where the unit is not known."""
    return f"{words} ({unit})" if unit else words


def _limit(axes: Axes, drawn: Sequence[np.ndarray], look: Look) -> None:
    set_scales(axes, look, x=True, y=True)
    firsts = [y[0] for y in drawn if np.isfinite(y[0])]
    if firsts and axes.get_yscale() == "log":  # a lower float32 loss is only rounding
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-7 * float(np.median(firsts))))
    limit_and_mark(axes, drawn)


def _is_work(histories: Sequence[History]) -> bool:
    """Whether updates and gradients are proportional, with one factor for all optimisers."""
    rows = [(row["step"], row["gradients"]) for history in histories for row in history.rows]
    steps, gradients = np.asarray(rows, float).T
    shares = gradients / np.where(steps > 0, steps, np.nan)
    return bool(np.allclose(shares, shares[0], rtol=1e-3))


def _name(history: History) -> str:
    return in_words(history.label) + (" (diverged)" if history.diverged else "")
