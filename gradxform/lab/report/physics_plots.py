"""Figures of a race on an equation: the error by time and updates, and the best solution."""

from collections.abc import Mapping

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gradxform.lab.experiment.grid import Table
from gradxform.lab.report.drawing import (
    HEAT,
    USUAL,
    Look,
    clear,
    entitle,
    entitle_panel,
    legend_beside,
    legend_of,
    limit_and_mark,
    markers_at,
    new_figure,
    set_scales,
)
from gradxform.lab.report.solutions import Solution, best_of, error_of
from gradxform.lab.report.style import BLACK, BLUE, DASHES, WINE, in_words, styles_of
from gradxform.lab.training.outcomes import RaceResult

_KEY = "test_relative_error"
_WORDS = {"seconds": "training time (s),\nwithout compilation", "step": "updates"}
_SLICES = (0.25, 0.5, 1.0)  # times at which the solution is drawn


def plot_errors(
    result: RaceResult,
    title: str = "",
    *,
    optimizers: Mapping[str, Table] | None = None,
    look: Look = USUAL,
) -> Figure:
    """Draws the relative error against seconds and updates, on logarithmic scales.

    A curve is the least error so far. The legend is sorted by the error at the end.

    Args:
      result: the result of a race on an equation.
      title: the title; the name of the task if empty.
      optimizers: the config's tables by label, for the methods' colours and markers.
      look: size, dots per inch and scales.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    figure = new_figure(9.6, 4.4, look)
    panels = figure.subplots(1, len(_WORDS), sharey=True)
    style_of = styles_of([history.label for history in result.histories], optimizers)
    legend: list[tuple[str, Artist]] = []
    for axes, (key, words) in zip(panels, _WORDS.items(), strict=True):
        legend, drawn = [], []
        for place, history in enumerate(sorted(result.histories, key=error_of)):
            x = np.asarray([row[key] for row in history.rows], float)
            y = np.fmin.accumulate([row[_KEY] for row in history.rows])
            drawn.append(y)
            (line,) = axes.plot(
                x,
                y,
                **style_of[history.label]._asdict(),
                linewidth=1.5,
                markersize=5,
                markevery=markers_at(x, place, len(style_of), log=look.is_log("x", True)),
            )
            lost = " (diverged)" if history.diverged else ""
            legend.append((in_words(history.label) + lost, line))
        set_scales(axes, look, x=True, y=True)
        limit_and_mark(axes, drawn)
        axes.set_xlabel(words)
        clear(axes)
    panels[0].set_ylabel("relative error of the solution,\nleast so far")
    entitle(figure, title or result.name)
    legend_beside(panels[-1], legend, look)
    return figure


def plot_solution(
    found: Solution, result: RaceResult, title: str = "", *, look: Look = USUAL
) -> Figure:
    """Draws the solution of the best net over time and place, its error, and three of its slices.

    Args:
      found: the solution.
      result: the result of the race that has found it.
      title: the title; the name of the task if empty.
      look: size and dots per inch.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    t, x, u, exact = found
    figure = new_figure(11.0, 3.6, look)
    panels = figure.subplots(1, 3)
    # the usual red and blue would look the same in grey
    mesh = panels[0].pcolormesh(t, x, u.T, cmap=HEAT, vmin=-1, vmax=1, rasterized=True)
    figure.colorbar(mesh, ax=panels[0], label="u")
    error = np.abs(u - exact)
    least = max(float(np.quantile(error, 0.1)), 1e-12)
    norm = LogNorm(least, max(float(error.max()), 10 * least))
    shown = np.maximum(error, least).T
    mesh = panels[1].pcolormesh(t, x, shown, cmap=HEAT, norm=norm, rasterized=True)
    figure.colorbar(mesh, ax=panels[1], label="|error of u|")
    words = (f"solution of {in_words(best_of(result).label)}", "its error")
    for axes, heading in zip(panels, words, strict=False):
        axes.set(xlabel="time t", ylabel="place x")
        entitle_panel(axes, heading, 3.4)
    _slices(panels[2], found)
    entitle(figure, title or result.name)
    return figure


def _slices(axes: Axes, found: Solution) -> None:
    t, x, u, exact = found
    legend: list[tuple[str, Artist]] = []
    for color, dash, time in zip((BLACK, BLUE, WINE), DASHES, _SLICES, strict=False):
        at = int(np.argmin(np.abs(t - time)))
        axes.plot(x, exact[at], color="0.75", linewidth=5)
        look = {"color": color, "linestyle": dash, "linewidth": 1.5}
        (line,) = axes.plot(x, u[at], **look)
        legend.append((f"t = {time:g}", line))
    (line,) = axes.plot([], [], color="0.75", linewidth=5)
    legend.append(("reference", line))
    axes.set(xlabel="place x", ylabel="u")
    entitle_panel(axes, "slices of the solution", 3.4)
    # the solution is negative there
    legend_of(axes, legend, loc="upper right", frameon=False, fontsize="small", handlelength=3)
