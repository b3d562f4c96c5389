"""Movies of optimisers on a surface, as in the lecture, as GIF or MP4."""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.animation import AbstractMovieWriter, FFMpegWriter, PillowWriter
from matplotlib.figure import Figure
from PIL import Image

from gradxform.lab.experiment.experiment import Experiment, prepared
from gradxform.lab.experiment.load import require_surface
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.experiment.schema import Config
from gradxform.lab.report.frames import draw_walks
from gradxform.lab.tasks.surfaces import surface_of
from gradxform.lab.training.race import race

USUAL_FPS, LEAST_SECONDS = 20, 5
HOLD = 2.0  # seconds for which the last frame stays

PALETTE = 128  # colours of a GIF

_DPI = 100


def movie(
    config: Config | Experiment, on_frame: Callable[[int, int], None] | None = None
) -> list[Image.Image]:
    """The frames of a config's race on a surface.

    Args:
      config: the config, or the experiment that was prepared from it.
      on_frame: called with the number of frames drawn so far, and of all frames.

    Returns:
      The frames for :func:`gif` or :func:`mp4`. A notebook shows them with
      ``IPython.display.Image(gif(frames))``.

    Raises:
      ConfigError: the task is not a surface, an optimiser cannot be built, or the surface is not
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
    experiment = prepared(config)
    read = require_surface(experiment.config)
    histories = race(experiment).histories
    paths = {h.label: np.asarray([[row["x0"], row["x1"]] for row in h.rows]) for h in histories}
    try:
        return draw_walks(
            surface_of(read.task.surface),
            paths,
            title=read.title,
            optimizers=read.optimizers,
            on_frame=on_frame,
        )
    except ValueError as error:
        raise ConfigError(read.name, [Problem("task.start", str(error))]) from error


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
    rate = fps or usual_fps(len(frames))
    return _written(frames, rate, "movie.gif", _OfOnePalette(rate))  # pyright: ignore[reportArgumentType]


class _OfOnePalette(PillowWriter):
    """Pillow's writer with one palette for all frames, which makes a third of the file."""

    _frames: list[Image.Image]

    def finish(self) -> None:
        # the last frame has every colour; one pass of k-means keeps the greys neutral
        frames = [frame.convert("RGB") for frame in self._frames]
        palette = frames[-1].quantize(PALETTE, method=Image.Quantize.MEDIANCUT, kmeans=1)
        colours = np.reshape(palette.getpalette() or [], (-1, 3))
        colours[colours.min(axis=1) > 245] = 255  # keep the background pure white
        palette.putpalette(colours.ravel().tolist())
        images = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        ends = np.round(100 * np.arange(len(frames) + 1) / self.fps)
        stays = (10 * np.diff(ends)).astype(int).tolist()
        images[0].save(
            self.outfile, save_all=True, append_images=images[1:], duration=stays, loop=0
        )


def mp4(frames: Sequence[Image.Image], fps: float | None = None) -> bytes:
    """An MP4; its last frame stays for two seconds.

    Args:
      frames: images of the same size, with even width and height.
      fps: frames per second; :func:`usual_fps` if not given.

    Raises:
      OSError: ffmpeg is missing or fails.
    """
    rate = fps or usual_fps(len(frames))
    wanted = ["-pix_fmt", "yuv420p", "-movflags", "+faststart"]  # every player can show these
    with matplotlib.rc_context({"animation.ffmpeg_path": ffmpeg()}):
        writer = FFMpegWriter(rate, codec="libx264", extra_args=wanted)  # pyright: ignore[reportArgumentType]
        try:
            return _written(frames, rate, "movie.mp4", writer)
        except subprocess.CalledProcessError as error:
            said = str(error.stderr or "").strip().splitlines()
            why = said[-1] if said else f"status {error.returncode}"
            raise OSError(f"ffmpeg failed: {why}") from error


def ffmpeg() -> str:
    """The path of ffmpeg, which :func:`mp4` needs; the package imageio-ffmpeg brings one.

    Raises:
      FileNotFoundError: ffmpeg is missing.
    """
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ModuleNotFoundError, RuntimeError):
        raise FileNotFoundError(
            "mp4 needs ffmpeg: pip install imageio-ffmpeg, or choose the format gif"
        ) from None


def _written(
    frames: Sequence[Image.Image], rate: float, name: str, writer: AbstractMovieWriter
) -> bytes:
    """The content of the file that a writer of Matplotlib makes of the frames."""
    width, height = frames[0].size
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI)
    shown = figure.figimage(np.asarray(frames[0]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        with writer.saving(figure, str(file), _DPI):
            for frame in [*frames, *[frames[-1]] * (round(HOLD * rate) - 1)]:
                shown.set_data(np.asarray(frame))
                writer.grab_frame()
        return file.read_bytes()
