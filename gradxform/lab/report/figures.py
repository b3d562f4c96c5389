"""Which pictures belong to a result: pairs of a file's stem and the figure."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from gradxform.lab.experiment.schema import Config, PhysicsConfig, SurfaceConfig
from gradxform.lab.report import plots
from gradxform.lab.training.outcomes import RaceResult, SweepResult

Figures = Iterator[tuple[str, Figure]]


def of_walks(config: Config, result: RaceResult) -> Figures:
    """The picture of a race on a surface."""
    yield "cost", plots.plot_cost(result, title_of(config))


def of_race(config: Config, result: RaceResult) -> Figures:
    """The pictures of a race on data."""
    yield "cost", plots.plot_cost(result, title_of(config))
    yield "work", plots.plot_work(result, title_of(config))


def of_equation(config: PhysicsConfig, result: RaceResult) -> Figures:
    """The pictures of a race on an equation."""
    from gradxform.lab.report import physics_plots

    yield from of_race(config, result)
    yield "error", physics_plots.plot_errors(result, title_of(config))
    yield "solution", physics_plots.plot_solution(config, result, title_of(config))


def of_sweep(config: Config, result: SweepResult) -> Figures:
    """The pictures of a sweep on data."""
    yield from _of_points(config, result)
    training = config.training.model_dump()
    own = training["overrides"]
    sizes = {
        label: own.get(label, {}).get("batch_size") or training["batch_size"]
        for label in config.optimizers
    }
    if len(set(sizes.values())) > 1:
        yield "batch_size", plots.plot_batch_sizes(result, sizes, title_of(config))


def of_starts(config: SurfaceConfig, result: SweepResult) -> Figures:
    """The pictures of a sweep over a surface."""
    yield from _of_points(config, result)
    yield "starts", plots.plot_starts(config.task.surface, result, title_of(config))


def title_of(config: Config) -> str:
    """The title of a config's pictures and tables."""
    return config.title or config.name


def _of_points(config: Config, result: SweepResult) -> Figures:
    axes = [list(member.values) for member in result.members]
    if any(axes):
        yield "sensitivity", plots.plot_sensitivity(result, title_of(config))
    if any(len(own) >= 2 for own in axes):
        yield "heatmap", plots.plot_heatmaps(result, title_of(config))
