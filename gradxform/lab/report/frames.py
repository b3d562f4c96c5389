"""The frames of a movie: walks on a surface and, next to them, their heights.

The panel of the surface is drawn for each frame, because the movie zooms in. In the other panels
only the moving parts are drawn again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from PIL import Image

from gradxform.lab.experiment.grid import Table
from gradxform.lab.report.drawing import shrink, wrapped
from gradxform.lab.report.style import Style, in_words, styles_of
from gradxform.lab.report.surface_plots import contours_of, plot_paths
from gradxform.lab.report.zoom import last_move, shown_steps, windows
from gradxform.lab.tasks.surfaces import Surface

MOST_FRAMES = 120

_DPI = 100
_LONGEST_NAME = 26  # characters that fit next to a value
_SMALLEST = 1e-12  # as a fraction of the start's height; lower heights are drawn here
_WIDEST = "\N{MINUS SIGN}0.00"  # the widest label of a tick in a zoomed panel


class _Walk(NamedTuple):
    """One optimiser's walk, and the artists that show it."""

    points: np.ndarray  #: (steps + 1, 2), finite
    values: np.ndarray  #: (steps + 1,), finite
    heights: np.ndarray  #: heights above the lowest value, as drawn
    diverged: bool  #: whether it diverged after the last point
    lost: np.ndarray  #: position of the mark if it diverged
    trail: Line2D
    curve: Line2D
    heads: tuple[Line2D, Line2D]  #: markers at the ends of trail and curve
    mark: Line2D
    value: Text


def draw_walks(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    *,
    title: str = "",
    most: int = MOST_FRAMES,
    optimizers: Mapping[str, Table] | None = None,
    on_frame: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draws the frames of a movie: the paths on a surface and, next to them, their heights.

    The movie zooms in on the part of the surface where the optimisers still walk, at most fifty
    times. It ends when nothing moves any more. A path with points that are not finite has diverged.
    Its trail ends in a cross where it left the picture, or at its last finite point. A shorter path
    than the others waits at its end.

    Args:
      surface: the function; the movie begins with its ``bounds``.
      paths: points of shape (steps + 1, 2), by label, such as the first result of
        :func:`gradxform.lab.training.surfaces.make_walk`.
      title: the title; the name and formula of the surface if empty.
      most: the largest number of frames, see :func:`gradxform.lab.report.zoom.shown_steps`.
      optimizers: the config's tables by label, for the methods' colours and markers.
      on_frame: called with the number of frames drawn so far, and of all frames.

    Returns:
      The frames, 800 pixels wide.

    Raises:
      ValueError: there is no path, one has another shape, or the surface is not finite at the
        start.
    """
    if not paths:
        raise ValueError("draw_walks: paths is empty; a movie needs at least one optimiser")
    stage = _staged(surface, paths, title, optimizers)
    end = last_move([(walk.points, walk.heights, walk.diverged) for walk in stage.walks], surface)
    stage.curves.set_xlim(0, 1.04 * max(1, end))  # with room for the markers at the ends
    steps = shown_steps(end, most)
    found = windows([walk.points for walk in stage.walks], surface, steps)
    stage.canvas.draw()
    background = stage.canvas.copy_from_bbox(stage.figure.bbox)
    last = max(len(path) for path in paths.values()) - 1
    frames = []
    for step, window in zip(steps, found, strict=True):
        stage.canvas.restore_region(background)
        _show(stage, step, window, f", then still until {last}" if step == end < last else "")
        for artist in stage.moving:
            stage.figure.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(stage.canvas.buffer_rgba())).convert("RGB"))
        if on_frame is not None:
            on_frame(len(frames), len(steps))
    return frames


class _Stage(NamedTuple):
    """The figure of a movie, and what changes in it from frame to frame."""

    figure: Figure
    canvas: FigureCanvasAgg
    left: Axes
    curves: Axes
    walks: list[_Walk]
    counter: Text
    zoom: Text
    bounds: tuple[tuple[float, float], ...]
    draw_contours: Callable[[Axes, np.ndarray], None]
    moving: list[Axes | Line2D | Text]


def _staged(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    title: str,
    optimizers: Mapping[str, Table] | None,
) -> _Stage:
    """Draws the last frame, computes the layout, and marks what moves."""
    figure = Figure(figsize=(8.0, 4.8 + 0.2 * max(0, len(paths) - 9)), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08, wspace=0.04)
    canvas = FigureCanvasAgg(figure)
    rows = len(paths) + 1.5
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1), height_ratios=(max(8, rows), rows))
    left = figure.add_subplot(grid[:, 0])
    plot_paths(surface, paths, axes=left, optimizers=optimizers)
    for contours in list(left.collections):
        contours.remove()
    if title:
        heading = figure.suptitle(wrapped(title, 80), fontsize="large", parse_math=False)
    else:
        heading = figure.suptitle(f"{surface.name}: ${surface.formula}$", fontsize="large")
    shrink([heading], 0.97 * figure.get_figwidth() * _DPI)

    curves, table = (figure.add_subplot(grid[i, 1]) for i in (0, 1))
    walks, counter, zoom = _stage(surface, paths, styles_of(paths, optimizers), left, curves, table)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    left.yaxis.set_major_formatter(lambda value, position: _WIDEST)
    figure.draw_without_rendering()  # computes the layout with complete curves and wide labels
    figure.set_layout_engine("none")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    moving: list[Axes | Line2D | Text] = [left]
    moving += [artist for walk in walks for artist in (walk.curve, walk.heads[1], walk.value)]
    for artist in moving:
        artist.set_animated(True)
    ground = surface.bounds, contours_of(surface)
    return _Stage(figure, canvas, left, curves, walks, counter, zoom, *ground, moving)


def _show(stage: _Stage, step: int, window: np.ndarray, more: str) -> None:
    """Changes everything that moves to a step."""
    (left, right), (bottom, top) = window
    stage.draw_contours(stage.left, window)
    stage.left.set(xlim=(left, right), ylim=(bottom, top))
    scale = (stage.bounds[0][1] - stage.bounds[0][0]) / (right - left)
    stage.zoom.set_text(f"{scale:.2g} times enlarged" if scale > 1.05 else "")
    stage.counter.set_text(f"update {step}{more}")
    for walk in stage.walks:
        _move(walk, step)


def _stage(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    style_of: Mapping[str, Style],
    left: Axes,
    curves: Axes,
    table: Axes,
) -> tuple[list[_Walk], Text, Text]:
    """Draws the final frame. Returns each optimiser's artists, the counter and the scale."""
    legend = left.get_legend()
    if legend is not None:
        legend.remove()
    left.set(title="", aspect="equal")
    left.lines[len(paths)].set_markersize(13)  # the start is a ring around the heads
    finite = [_finite(surface, path) for path in paths.values()]
    lowest = min([surface.lowest, *(float(values.min()) for _, values in finite)])
    first = max(float(values[0]) - lowest for _, values in finite)

    walks = []
    drawn = zip(paths.items(), finite, left.lines[: len(paths)], strict=True)
    for row, ((label, path), (points, values), trail) in enumerate(drawn):
        style = style_of[label]
        heights = np.maximum(values - lowest, _SMALLEST * first)
        every = max(1, len(points) // 10)
        options = style._asdict() | {"markersize": 4, "markevery": every, "linewidth": 1.5}
        (curve,) = curves.plot(heights, **options)
        cross = {"marker": "X", "markersize": 11, "color": style.color, "markeredgecolor": "white"}
        walk = _Walk(
            points=points,
            values=values,
            heights=heights,
            diverged=len(points) < len(path),
            lost=_lost(points, surface.bounds),
            trail=trail,
            curve=curve,
            heads=(_head(left, style), _head(curves, style)),
            mark=left.plot([], [], **cross, zorder=4)[0],
            value=_row(table, row, label, style),
        )
        walks.append(walk)
    _scale(curves, first, walks)
    _key(table, len(paths))
    counter = left.text(1, 1.02, "", transform=left.transAxes, ha="right", va="bottom")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.8}
    zoom = left.text(0.02, 0.03, "", transform=left.transAxes, fontsize="small", bbox=behind)
    return walks, counter, zoom


def _move(walk: _Walk, step: int) -> None:
    """Moves an optimiser's artists to a step."""
    last = len(walk.points) - 1
    at = min(step, last)
    lost = walk.diverged and step > last
    walk.trail.set_data(*walk.points[: at + 1].T)
    walk.curve.set_data(np.arange(at + 1), walk.heights[: at + 1])
    walk.heads[0].set_data(*walk.points[at : at + 1].T)
    walk.heads[1].set_data([at], walk.heights[at : at + 1])
    walk.mark.set_data(*walk.lost[:, None] if lost else ([], []))
    for head in walk.heads:
        head.set_visible(not lost)
    said = f"diverged at {last + 1}" if lost else f"{walk.values[at]:.2g}"
    walk.value.set_text(said.replace("-", "\N{MINUS SIGN}"))


def _finite(surface: Surface, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points and values before the first one that is not finite."""
    values = np.asarray(jax.vmap(surface.fn)(jnp.asarray(path, jnp.float32)), float)
    points = np.asarray(path, float)
    good = np.isfinite(values) & np.isfinite(points).all(axis=1)
    if not good[0]:
        raise ValueError(f"{surface.name} is not finite at the start {tuple(points[0].tolist())}")
    end = len(good) if good.all() else int(np.argmin(good))
    return points[:end], values[:end]


def _lost(points: np.ndarray, bounds: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The last point, or the place where the path finally left the picture."""
    low, high = np.transpose(bounds)
    inside = np.flatnonzero(np.all((low <= points) & (points <= high), axis=1))
    last = inside[-1] if len(inside) else 0
    if last == len(points) - 1:
        return points[last]
    step = points[last + 1] - points[last]
    room = np.where(step > 0, high, low) - points[last]
    part = min(r / s for r, s in zip(room, step, strict=True) if s != 0)
    return np.clip(points[last] + part * step, low, high)


def _head(axes: Axes, style: Style) -> Line2D:
    full = style.fillstyle == "full"
    options = {"markersize": 8, "zorder": 3.5, "color": style.color, "marker": style.marker}
    options |= {"markeredgecolor": "white" if full else style.color}
    options |= {} if full else {"markerfacecolor": "white", "markeredgewidth": 2}
    return axes.plot([], [], **options)[0]


def _scale(axes: Axes, first: float, walks: Sequence[_Walk]) -> None:
    """Sets up the axes of heights against updates."""
    heights = np.concatenate([walk.heights for walk in walks])
    low = float(heights.min())
    axes.set_yscale("log" if low > 0 else "linear")  # on a plateau all heights are zero
    if low > 0:  # a diverging curve must not flatten the others
        axes.set_ylim(low / 3, 10 * max(first, low))
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("updates")
    axes.set_title("value − lowest value", loc="left", fontsize="medium")
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _row(table: Axes, row: int, label: str, style: Style) -> Text:
    """Draws a row of the legend: style and name. Returns the text for the current value."""
    options = style._asdict() | {"markersize": 6, "markevery": [1], "linewidth": 1.5}
    table.plot([0, 0.07, 0.14], [row] * 3, **options)
    label = in_words(label)
    long = len(label) > _LONGEST_NAME
    name = label[: _LONGEST_NAME - 1] + "…" if long else label
    table.text(0.18, row, name, verticalalignment="center", parse_math=False)
    return table.text(1, row, "", verticalalignment="center", horizontalalignment="right")


def _key(table: Axes, row: int) -> None:
    """Draws the last row of the legend: start and minimum."""
    table.plot([0.07], [row + 0.2], "ko", markersize=8, fillstyle="none")
    table.plot([0.55], [row + 0.2], "k*", markersize=12, markerfacecolor="white")
    for x, name in ((0.18, "start"), (0.63, "minimum")):
        table.text(x, row + 0.2, name, verticalalignment="center")
    table.set(xlim=(-0.02, 1), ylim=(row + 0.8, -0.6))
    table.set_axis_off()
