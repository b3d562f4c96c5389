"""Figures of a race on an equation: the error by time and updates, and the best solution."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gradxform.lab.data.equations import burgers
from gradxform.lab.experiment.grid import Table
from gradxform.lab.experiment.schema import PhysicsConfig
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
from gradxform.lab.report.style import in_words, styles, styles_of
from gradxform.lab.tasks.physics import solution
from gradxform.lab.training.outcomes import History, RaceResult

_KEY = "test_relative_error"
_WORDS = {"seconds": "training time (s),\nwithout compilation", "step": "updates"}
_TIMES, _PLACES = 161, 321  # of the picture
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
        for place, history in enumerate(sorted(result.histories, key=_error)):
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
    config: PhysicsConfig, result: RaceResult, title: str = "", *, look: Look = USUAL
) -> Figure:
    """Draws the solution of the best net over time and place, its error, and three of its slices.

    Args:
      config: the experiment.
      result: its result.
      title: the title; the name of the task if empty.
      look: size and dots per inch.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    best = min(result.histories, key=_error)
    t, x = np.linspace(0, 1, _TIMES), np.linspace(-1, 1, _PLACES)
    found, exact = _values(config, best, t, x)
    figure = new_figure(13.0, 3.8, look)
    panels = figure.subplots(1, 3)
    mesh = panels[0].pcolormesh(t, x, found.T, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
    figure.colorbar(mesh, ax=panels[0], label="u")
    error = np.abs(found - exact)
    least = max(float(np.quantile(error, 0.1)), 1e-12)
    norm = LogNorm(least, max(float(error.max()), 10 * least))
    shown = np.maximum(error, least).T
    mesh = panels[1].pcolormesh(t, x, shown, cmap=HEAT, norm=norm, rasterized=True)
    figure.colorbar(mesh, ax=panels[1], label="|error of u|")
    words = (f"solution of {in_words(best.label)}", "its error")
    for axes, heading in zip(panels, words, strict=False):
        axes.set(xlabel="time t", ylabel="place x")
        entitle_panel(axes, heading, 3.4)
    _slices(panels[2], t, x, found, exact)
    entitle(figure, title or result.name)
    return figure


def _slices(axes: Axes, t: np.ndarray, x: np.ndarray, found: np.ndarray, exact: np.ndarray) -> None:
    legend: list[tuple[str, Artist]] = []
    for style, time in zip(styles(len(_SLICES)), _SLICES, strict=True):
        at = int(np.argmin(np.abs(t - time)))
        axes.plot(x, exact[at], color="0.75", linewidth=5)
        look = {"color": style.color, "linestyle": style.linestyle, "linewidth": 1.5}
        (line,) = axes.plot(x, found[at], **look)
        legend.append((f"net at t = {time}", line))
    (line,) = axes.plot([], [], color="0.75", linewidth=5)
    legend.append(("reference", line))
    axes.set(xlabel="place x", ylabel="u")
    entitle_panel(axes, "slices", 3.4)
    legend_of(axes, legend, loc="best", frameon=False, fontsize="small", handlelength=3)


def _error(history: History) -> float:
    error = history.rows[-1][_KEY]
    return error if np.isfinite(error) else np.inf


def _values(
    config: PhysicsConfig, history: History, t: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The net's solution and the reference, of shape (times, places)."""
    points = np.stack(np.meshgrid(t, x, indexing="ij"), axis=-1).reshape(-1, 2)
    with jax.enable_x64(True):
        u = lambda point: solution(history.params, point, hidden=config.task.hidden)
        found = np.asarray(jax.jit(jax.vmap(u))(jnp.asarray(points)))
    exact = burgers(points, config.task.viscosity)
    return found.reshape(len(t), len(x)), exact.reshape(len(t), len(x))
