"""Figures of a race on an equation: the error by work, and the best solution."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gradxform.lab.data.equations import burgers
from gradxform.lab.experiment.schema import PhysicsConfig
from gradxform.lab.report.plots import styles
from gradxform.lab.tasks.physics import solution
from gradxform.lab.training.outcomes import History, RaceResult

_KEY = "test_relative_error"
_WORDS = {"seconds": "training time (s)", "step": "updates"}
_TIMES, _PLACES = 161, 321  # of the picture
_SLICES = (0.25, 0.5, 1.0)  # times at which the solution is drawn


def plot_errors(result: RaceResult, title: str = "") -> Figure:
    """Draws the relative error against seconds and updates, on logarithmic scales.

    A curve is the least error so far. The legend is sorted by the error at the end.

    Args:
      result: the result of a race on an equation.
      title: the title; the name of the task if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    panels = figure.subplots(1, len(_WORDS), sharey=True)
    labels = [history.label for history in result.histories]
    style_of = dict(zip(labels, styles(len(labels)), strict=True))
    for axes, (key, words) in zip(panels, _WORDS.items(), strict=True):
        for history in sorted(result.histories, key=_error):
            x = [row[key] for row in history.rows]
            y = np.fmin.accumulate([row[_KEY] for row in history.rows])
            style = style_of[history.label]
            axes.plot(x, y, style.color, linestyle=style.linestyle, label=history.label)
        axes.set(xscale="log", yscale="log", xlabel=words)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the solution")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, handlelength=4)
    figure.suptitle(title or result.name, parse_math=False)
    return figure


def plot_solution(config: PhysicsConfig, result: RaceResult, title: str = "") -> Figure:
    """Draws the solution of the best net over time and place, its error, and three of its slices.

    Args:
      config: the experiment.
      result: its result.
      title: the title; the name of the task if empty.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    best = min(result.histories, key=_error)
    t, x = np.linspace(0, 1, _TIMES), np.linspace(-1, 1, _PLACES)
    found, exact = _values(config, best, t, x)
    figure = Figure(figsize=(13.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    mesh = panels[0].pcolormesh(t, x, found.T, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
    figure.colorbar(mesh, ax=panels[0], label="u")
    error = np.abs(found - exact)
    least = max(float(np.quantile(error, 0.1)), 1e-12)
    norm = LogNorm(least, max(float(error.max()), 10 * least))
    mesh = panels[1].pcolormesh(t, x, np.maximum(error, least).T, norm=norm, rasterized=True)
    figure.colorbar(mesh, ax=panels[1], label="|error of u|")
    for axes, words in zip(panels, (f"solution of {best.label}", "its error"), strict=False):
        axes.set(xlabel="t", ylabel="x")
        axes.set_title(words, fontsize="medium", parse_math=False)
    _slices(panels[2], t, x, found, exact)
    figure.suptitle(title or result.name, parse_math=False)
    return figure


def _slices(axes: Axes, t: np.ndarray, x: np.ndarray, found: np.ndarray, exact: np.ndarray) -> None:
    for style, time in zip(styles(len(_SLICES)), _SLICES, strict=True):
        at = int(np.argmin(np.abs(t - time)))
        axes.plot(x, exact[at], color=style.color, alpha=0.3, linewidth=5)
        axes.plot(x, found[at], color=style.color, linewidth=1.2, label=f"t = {time}")
    axes.plot([], [], color="0.3", alpha=0.3, linewidth=5, label="reference")
    axes.set(xlabel="x", ylabel="u")
    axes.set_title("slices", fontsize="medium")
    axes.legend(frameon=False)


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
