"""The pictures of a run, drawn anew from its result or its folder."""

from pathlib import Path

from matplotlib.figure import Figure

from gradxform.lab.experiment.schema import Config
from gradxform.lab.report.drawing import DPI, Log, Look
from gradxform.lab.report.figures import figures_of
from gradxform.lab.report.runs import read_run
from gradxform.lab.training.outcomes import RaceResult, SweepResult


def plot(
    run: RaceResult | SweepResult | str | Path,
    config: Config | None = None,
    *,
    size: tuple[float, float] | None = None,
    dpi: float = DPI,
    log: Log | None = None,
) -> dict[str, Figure]:
    """Draws the pictures of a race or a sweep.

    Args:
      run: a result, or the folder of a finished run.
      config: the experiment of a result, for its title and the methods' colours. A folder has its
        own.
      size: width and height in inches; the usual size of each picture if not given.
      dpi: pixels per inch.
      log: the axes with a logarithmic scale; those of each picture if not given. Heat maps and maps
        of starts keep their scales.

    Returns:
      The figures by name, such as ``"cost"``; save one with ``figure.savefig(path)``. Without the
      final parameters, which a folder does not hold, there is no ``"solution"`` of an equation.

    Raises:
      FolderError: the folder is not one of a finished run.
      ConfigError: its ``config.toml`` cannot be used.

    >>> from gradxform.lab.experiment.load import parse_config
    >>> from gradxform.lab.training.race import race
    >>> config = parse_config({
    ...     "name": "walk", "task": {"kind": "surface", "surface": "saddle"},
    ...     "training": {"steps": 2}, "optimizers": {"a": {"method": "sgd", "learning_rate": 0.25}},
    ... })
    >>> plot(race(config), config)["cost"].get_suptitle()
    'walk'
    """
    if isinstance(run, str | Path):
        config, run = read_run(run)
    return dict(figures_of(run, config, Look(size, dpi, log)))
