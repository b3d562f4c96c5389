"""Movies of optimisers on a surface, as in the lecture, as GIF or MP4.

The contours are drawn once. Each frame redraws only what moves.
"""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from gradxform.lab.experiment.load import load_config, require_surface
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.experiment.schema import Config
from gradxform.lab.report.plots import Style, plot_paths, styles
from gradxform.lab.tasks.surfaces import Surface, surface_of
from gradxform.lab.training.race import race

MOST_FRAMES = 120
USUAL_FPS, LEAST_SECONDS = 20, 5
HOLD = 2.0  # seconds for which the last frame stays
PALETTE = 128  # colours of a GIF

_DPI = 100
_LONGEST_NAME = 26  # characters that fit next to a value
_SMALLEST = 1e-12  # as a fraction of the start's height; lower heights are drawn here


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


def movie(config: Config | str | Path) -> list[Image.Image]:
    """The frames of a config's race on a surface.

    Args:
      config: the experiment, its TOML file, or the name of a shipped config.

    Returns:
      The frames for :func:`gif` or :func:`mp4`. A notebook shows them with
      ``IPython.display.Image(gif(frames))``.

    Raises:
      ConfigError: the config cannot be used, its task is not a surface, or the surface is not
        finite at the start.

    >>> from gradxform.lab.experiment.load import parse_config
    >>> config = parse_config({
    ...     "name": "walk", "task": {"kind": "surface", "surface": "saddle"},
    ...     "training": {"steps": 2}, "optimizers": {"a": {"method": "sgd", "learning_rate": 0.25}},
    ... })
    >>> frames = movie(config)
    >>> len(frames), frames[0].size
    (3, (800, 480))
    """
    experiment = require_surface(config if isinstance(config, Config) else load_config(config))
    histories = race(experiment).histories
    paths = {h.label: np.asarray([[row["x0"], row["x1"]] for row in h.rows]) for h in histories}
    try:
        return draw_walks(surface_of(experiment.task.surface), paths, title=experiment.title)
    except ValueError as error:
        raise ConfigError(experiment.name, [Problem("task.start", str(error))]) from error


def draw_walks(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    *,
    title: str = "",
    most: int = MOST_FRAMES,
) -> list[Image.Image]:
    """Draws the frames of a movie: the paths on a surface and, next to them, their heights.

    A path with points that are not finite has diverged. Its trail ends in a cross where it left the
    picture, or at its last finite point. A shorter path than the others waits at its end.

    Args:
      surface: the function; the movie shows its ``bounds``.
      paths: points of shape (steps + 1, 2), by label, such as the first result of
        :func:`gradxform.lab.training.surfaces.make_walk`.
      title: the title; the name and formula of the surface if empty.
      most: the largest number of frames, see :func:`shown_steps`.

    Returns:
      The frames, 800 pixels wide.

    Raises:
      ValueError: there is no path, one has another shape, or the surface is not finite at the
        start.
    """
    if not paths:
        raise ValueError("draw_walks: paths is empty; a movie needs at least one optimiser")
    figure = Figure(figsize=(8.0, 4.8 + 0.2 * max(0, len(paths) - 9)), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08, wspace=0.04)
    canvas = FigureCanvasAgg(figure)
    rows = len(paths) + 1.5
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1), height_ratios=(max(8, rows), rows))
    left = figure.add_subplot(grid[:, 0])
    plot_paths(surface, paths, axes=left)
    shown = title or f"{surface.name}: ${surface.formula}$"
    figure.suptitle(shown, fontsize="large", parse_math=not title)

    walks, counter = _stage(surface, paths, left, *(figure.add_subplot(grid[i, 1]) for i in (0, 1)))
    above = left.lines[len(paths) :]  # the start, the minima, the heads and the marks
    moving = [*left.lines[: len(paths)], *above, counter]
    moving += [artist for walk in walks for artist in (walk.curve, walk.heads[1], walk.value)]
    figure.draw_without_rendering()  # computes the layout with complete curves
    figure.set_layout_engine("none")
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)

    steps = max(len(path) for path in paths.values()) - 1
    frames = []
    for step in shown_steps(steps, most):
        canvas.restore_region(background)
        counter.set_text(f"update {step}")
        for walk in walks:
            _move(walk, step)
        for artist in moving:
            figure.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return frames


def shown_steps(steps: int, most: int = MOST_FRAMES) -> list[int]:
    """The steps from 0 to ``steps`` that get a frame, always including the first and the last.

    If not all steps fit, the gaps between frames grow, because most happens at the start.

    Args:
      steps: number of updates.
      most: the largest number of frames, at least 2.

    >>> shown_steps(3), shown_steps(1000, most=5)
    ([0, 1, 2, 3], [0, 62, 250, 562, 1000])
    """
    if steps < most:
        return list(range(steps + 1))
    return [int(step) for step in np.unique(np.round(steps * np.linspace(0, 1, most) ** 2))]


def usual_fps(frames: int) -> float:
    """Frames per second: 20, or fewer so that the movie lasts 5 seconds.

    >>> usual_fps(120), usual_fps(30)
    (20, 6.0)
    """
    return min(USUAL_FPS, frames / LEAST_SECONDS)


def gif(frames: Sequence[Image.Image], fps: float | None = None) -> bytes:
    """A GIF that repeats for ever; its last frame stays for two seconds.

    Args:
      frames: images of the same size.
      fps: frames per second, up to 50; :func:`usual_fps` if not given. A GIF counts time in
        hundredths of a second, so some frames may last a hundredth longer than others.
    """
    # the last frame has every colour; one pass of k-means keeps the greys neutral
    palette = frames[-1].quantize(PALETTE, method=Image.Quantize.MEDIANCUT, kmeans=1)
    colours = np.reshape(palette.getpalette() or [], (-1, 3))
    colours[colours.min(axis=1) > 245] = 255  # keep the background pure white
    palette.putpalette(colours.ravel().tolist())
    images = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    rate = fps or usual_fps(len(frames))
    ends = np.round(100 * np.arange(len(frames)) / rate)
    durations = [*(10 * np.diff(ends)).astype(int).tolist(), int(1000 * HOLD)]
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return out.getvalue()


def mp4(frames: Sequence[Image.Image], fps: float | None = None) -> bytes:
    """An MP4 made by ffmpeg; its last frame stays for two seconds.

    Args:
      frames: images of the same size, with even width and height.
      fps: frames per second; :func:`usual_fps` if not given.

    Raises:
      OSError: ffmpeg is missing or fails.
    """
    rate = fps or usual_fps(len(frames))
    width, height = frames[0].size
    held = [*frames, *[frames[-1]] * round(HOLD * rate)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "movie.mp4"  # ffmpeg cannot write this format to a pipe
        given = f"-f rawvideo -pix_fmt rgb24 -video_size {width}x{height} -framerate {rate:g} -i -"
        wanted = "-pix_fmt yuv420p -movflags +faststart"  # every player can show these
        command = [ffmpeg(), "-loglevel", "error", *given.split(), *wanted.split(), str(file)]
        data = b"".join(frame.tobytes() for frame in held)
        done = subprocess.run(command, input=data, capture_output=True)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(f"ffmpeg failed: {said[-1] if said else f'status {done.returncode}'}")
        return file.read_bytes()


def ffmpeg() -> str:
    """The path of ffmpeg, which :func:`mp4` needs.

    Raises:
      FileNotFoundError: ffmpeg is not on the PATH.
    """
    found = shutil.which("ffmpeg")
    if found is None:
        raise FileNotFoundError(
            "mp4 needs ffmpeg, which is not on the PATH: install it, or choose the format gif"
        )
    return found


def _stage(
    surface: Surface, paths: Mapping[str, np.ndarray], left: Axes, curves: Axes, table: Axes
) -> tuple[list[_Walk], Text]:
    """Draws the final frame. Returns the artists of each optimiser and the step counter."""
    legend = left.get_legend()
    if legend is not None:
        legend.remove()
    left.set(title="", aspect="equal")
    left.lines[len(paths)].set_markersize(13)  # the start is a ring around the heads
    finite = [_finite(surface, path) for path in paths.values()]
    lowest = min([surface.lowest, *(float(values.min()) for _, values in finite)])
    first = max(float(values[0]) - lowest for _, values in finite)

    walks = []
    drawn = zip(styles(len(paths)), paths.items(), finite, left.lines[: len(paths)], strict=True)
    for row, (style, (label, path), (points, values), trail) in enumerate(drawn):
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
    return walks, counter


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
    options = {"markersize": 8, "markeredgecolor": "white", "zorder": 3.5}
    (head,) = axes.plot([], [], color=style.color, marker=style.marker, **options)
    return head


def _scale(axes: Axes, first: float, walks: Sequence[_Walk]) -> None:
    """Sets up the axes of heights against updates."""
    heights = np.concatenate([walk.heights for walk in walks])
    low = float(heights.min())
    axes.set_yscale("log" if low > 0 else "linear")  # on a plateau all heights are zero
    if low > 0:  # a diverging curve must not flatten the others
        axes.set_ylim(low / 3, 10 * max(first, low))
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_major_formatter("{x:g}")
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
