"""The lab from Python: what the commands do, as functions that return results."""

import base64
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from gradxform.lab.experiment import load, toml
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.schema import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from gradxform.lab.data.sets import Dataset
    from gradxform.lab.tasks.task import Task
    from gradxform.lab.training.outcomes import RaceResult, SweepResult
    from gradxform.lab.training.race import OnRow
    from gradxform.lab.training.sweep import OnEpoch

Source = Config | str | Path | Mapping[str, Any]
"""A config: read already, a TOML file, the name of a shipped config, or its tables."""


def load_config(config: Source, *settings: str) -> Config:
    """Reads and checks an experiment.

    Args:
      config: a TOML file, the name of a shipped config, or the tables of a config.
      *settings: ``"key=value"``, as after ``--set``.

    Raises:
      ConfigError: with every problem found.
      TypeError: ``config`` is none of these, or is read already and cannot take settings.

    >>> import gradxform.lab as lab
    >>> lab.load_config("digits_race", "training.epochs=5").training.epochs
    5
    """
    return _read("load_config", config, settings)


def race(
    config: Source,
    data: "Dataset | Task | None" = None,
    on_row: "OnRow | None" = None,
    *,
    data_dir: str | Path | None = None,
) -> "RaceResult":
    """Races a config's optimisers on its task, as ``gradxform run`` does.

    ``pandas.DataFrame(result.rows)`` is a table of the result, with a row for each epoch of each
    optimiser. ``result.histories`` also holds the final parameters.

    Args:
      config: the experiment.
      data: its data set or task; if not given, the data are read.
      on_row: called with the optimiser's label and each new row of its metrics.
      data_dir: the folder with the files of the data.

    Raises:
      ConfigError: the config cannot be used, or an optimiser does not fit the task.
      DataError: the data cannot be read.
      ModelError: the model does not fit the data.
    """
    from gradxform.lab.training import race as training

    read = _read("race", config)
    return training.race(read, _data(read, data, data_dir), on_row)


def sweep(
    config: Source,
    data: "Dataset | Task | None" = None,
    on_epoch: "OnEpoch | None" = None,
    *,
    data_dir: str | Path | None = None,
) -> "SweepResult":
    """Runs the members of a config's ``[sweep]``, as ``gradxform sweep`` does.

    ``pandas.DataFrame(result.rows)`` is a table of the result, with a row for each member.

    Args:
      config: the experiment.
      data: its data set or task; if not given, the data are read.
      on_epoch: called with an optimiser's label, the epoch, and by number the rows of the members
        that trained in it.
      data_dir: the folder with the files of the data.

    Raises:
      ConfigError: the config cannot be used or has no ``[sweep]``, or an optimiser does not fit the
        task.
      DataError: the data cannot be read.
      ModelError: the model does not fit the data.
    """
    from gradxform.lab.training import sweep as training

    read = _read("sweep", config)
    return training.sweep(read, _data(read, data, data_dir), on_epoch)


class Movie(NamedTuple):
    """A movie of walks on a surface. A notebook shows it if it is the last line of a cell."""

    frames: "list[Image]"

    def save(self, file: str | Path, fps: float | None = None) -> None:
        """Writes a GIF, or an MP4 if the name ends so.

        Args:
          file: the file.
          fps: frames per second; 20 if not given, or fewer so that it lasts 5 seconds.
        """
        from gradxform.lab.report import movies

        encode = movies.mp4 if Path(file).suffix.lower() == ".mp4" else movies.gif
        Path(file).write_bytes(encode(self.frames, fps))

    def _repr_html_(self) -> str:
        from gradxform.lab.report.movies import gif

        content = base64.b64encode(gif(self.frames)).decode()
        return f'<img src="data:image/gif;base64,{content}" alt="walks on a surface">'


def movie(config: Source, on_frame: Callable[[int, int], None] | None = None) -> Movie:
    """Draws the walks of a config's optimisers on a surface, as ``gradxform movie`` does.

    Args:
      config: the experiment.
      on_frame: called with the number of frames drawn so far, and of all frames.

    Raises:
      ConfigError: the config cannot be used, or its task is not a surface.
    """
    from gradxform.lab.report import movies

    return Movie(movies.movie(_read("movie", config), on_frame))


def load_run(folder: str | Path) -> "RaceResult | SweepResult":
    """The result of a finished race or sweep, read from its folder.

    The folder does not hold the final parameters, so they are None; those of a curve fit are its
    estimates. If the run used files of
    ``--with``, import them first.

    Args:
      folder: the folder that ``gradxform run`` or ``gradxform sweep`` has written.

    Raises:
      ConfigError: its ``config.toml`` cannot be used.
      OSError: the run is not finished, the folder holds what no run writes, or a file cannot be
        read.
    """
    from gradxform.lab.report import runs

    return runs.read_run(folder)[1]


def plot(
    result: "RaceResult | SweepResult | str | Path",
    config: Source | None = None,
    *,
    size: tuple[float, float] | None = None,
    dpi: float = 150,
    log: Literal["x", "y", "both", "none"] | None = None,
) -> "dict[str, Figure]":
    """The pictures of a result by name, as ``gradxform run`` and ``sweep`` draw them.

    Args:
      result: the result of a race or a sweep, or the folder of a finished run.
      config: its experiment, for the title, the colours, and the pictures of its kind of task. A
        folder holds it.
      size: width and height in inches; a size for each picture if not given.
      dpi: pixels per inch.
      log: the axes with a logarithmic scale; those of each picture if not given. Heat maps and maps
        of starts keep their scales.

    Returns:
      Figures of Matplotlib, by names such as ``"cost"``; save one with ``figure.savefig(path)``.

    Raises:
      ConfigError: the config, or the ``config.toml`` of the folder, cannot be used.
      OSError: the folder is not one of a finished run.
      TypeError: ``result`` or another argument is of the wrong type.
      ValueError: ``dpi`` is not positive, or ``log`` is none of its choices.

    >>> import gradxform.lab as lab
    >>> config = {
    ...     "name": "walk", "task": {"kind": "surface", "surface": "saddle"},
    ...     "training": {"steps": 2}, "optimizers": {"a": {"method": "sgd", "learning_rate": 0.25}},
    ... }
    >>> lab.plot(lab.race(config), config)["cost"].get_suptitle()
    'walk'
    """
    from gradxform.lab.report import drawing, figures, runs
    from gradxform.lab.training.outcomes import RaceResult, SweepResult

    if not (isinstance(dpi, int | float) and dpi > 0):
        raise ValueError(f"plot(dpi={dpi!r}): dpi must be a positive number")
    if log is not None and log not in (scales := get_args(drawing.Log)):
        raise ValueError(f"plot(log={log!r}): log must be one of {', '.join(map(repr, scales))}")
    if not isinstance(result, str | Path | RaceResult | SweepResult):
        from gradxform.hyperparameters import shown

        raise TypeError(
            f"plot(result={shown(result)}): expected the result of a race or a sweep, or the "
            "folder of a finished run"
        )
    given = None if config is None else _read("plot", config)
    if isinstance(result, str | Path):
        given, result = runs.read_run(result)
    return dict(figures.figures_of(result, given, drawing.Look(size, dpi, log)))


def _read(caller: str, config: Source, settings: Sequence[str] = ()) -> Config:
    if isinstance(config, Mapping):
        table = copy.deepcopy(dict(config))
        problems = [problem for text in settings for problem in toml.override(table, text)]
        return load.parse_config(table, problems=problems)
    if isinstance(config, str | Path):
        return load.load_config(config, settings)
    if not isinstance(config, Config):
        from gradxform.hyperparameters import shown

        raise TypeError(
            f"{caller}(config={shown(config)}): expected a TOML file, the name of a shipped "
            "config, or a dictionary of its tables"
        )
    if settings:
        raise TypeError(
            f"{caller}(…, {settings[0]!r}): this config is read already: give the settings with "
            "the file or the tables"
        )
    return config


def _data(config: Config, data: Any, data_dir: str | Path | None) -> Any:
    source = kind_of(config).data
    if data is not None or source is None:
        return data
    return at(source)(config.task, data_dir)
