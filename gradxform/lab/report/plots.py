"""The pictures of a run: which ones there are for a result, and how they are drawn anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.figure import Figure

from gradxform.lab.experiment.schema import Config, PhysicsConfig, SurfaceConfig
from gradxform.lab.report.drawing import DPI, USUAL, Look
from gradxform.lab.report.heatmaps import plot_heatmaps
from gradxform.lab.report.race_plots import plot_cost, plot_work
from gradxform.lab.report.runs import read_run
from gradxform.lab.report.surface_plots import plot_starts
from gradxform.lab.report.sweep_plots import plot_batch_sizes, plot_sensitivity
from gradxform.lab.training.race import RaceResult

if TYPE_CHECKING:
    from gradxform.lab.training.sweep import SweepResult


def plot(
    run: "RaceResult | SweepResult | str | Path",
    config: Config | None = None,
    *,
    size: tuple[float, float] | None = None,
    dpi: float = DPI,
    log: Literal["x", "y", "both", "none"] | None = None,
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
    return dict(pictures(run, config, Look(size, dpi, log)))


def pictures(
    result: "RaceResult | SweepResult", config: Config | None = None, look: Look = USUAL
) -> Iterator[tuple[str, Figure]]:
    """The name and the figure of each picture that belongs to a result."""
    draw = _of_race if isinstance(result, RaceResult) else _of_sweep
    return draw(result, config, look)  # pyright: ignore[reportArgumentType]


def _of_race(result: RaceResult, config: Config | None, look: Look) -> Iterator[tuple[str, Figure]]:
    from gradxform.lab.report.physics_plots import plot_errors, plot_solution

    title = title_of(config)
    optimizers = config.optimizers if config else None
    yield "cost", plot_cost(result, title, optimizers=optimizers, look=look)
    if result.measure == "train_loss":
        yield "work", plot_work(result, title, optimizers=optimizers, look=look)
    if "test_relative_error" in result.histories[0].rows[-1]:
        yield "error", plot_errors(result, title, optimizers=optimizers, look=look)
    if isinstance(config, PhysicsConfig) and result.histories[0].params is not None:
        yield "solution", plot_solution(config, result, title, look=look)


def _of_sweep(
    result: "SweepResult", config: Config | None, look: Look
) -> Iterator[tuple[str, Figure]]:
    title = title_of(config)
    optimizers = config.optimizers if config else None
    axes = [member.values for member in result.members]
    if any(axes):
        yield "sensitivity", plot_sensitivity(result, title, optimizers=optimizers, look=look)
    if any(len(own) >= 2 for own in axes):
        yield "heatmap", plot_heatmaps(result, title, look=look)
    if result.measure == "work":
        yield "starts", plot_starts(result.name, result, title, look=look)
    elif config is not None and not isinstance(config, SurfaceConfig):
        common, overrides = config.training.batch_size, config.training.overrides
        sizes = {
            label: (own.batch_size if (own := overrides.get(label)) else None) or common
            for label in config.optimizers
        }
        if len(set(sizes.values())) > 1:
            yield "batch_size", plot_batch_sizes(result, sizes, title, look=look)


def title_of(config: Config | None) -> str:
    """The title of an experiment's pictures; empty without a config."""
    return (config.title or config.name) if config else ""
