"""Which pictures belong to a result: pairs of a file's stem and the figure.

The result may come without its config, and then shows its own name and the usual colours.
"""

from collections.abc import Iterator

from matplotlib.figure import Figure

from gradxform.lab.experiment.kinds import KINDS, at, kind_of
from gradxform.lab.experiment.schema import Config, PhysicsConfig
from gradxform.lab.report.drawing import USUAL, Look
from gradxform.lab.report.heatmaps import plot_heatmaps
from gradxform.lab.report.race_plots import plot_cost, plot_work
from gradxform.lab.report.surface_plots import plot_starts
from gradxform.lab.report.sweep_plots import plot_batch_sizes, plot_sensitivity
from gradxform.lab.training.outcomes import RaceResult, SweepResult

Figures = Iterator[tuple[str, Figure]]


def figures_of(
    result: RaceResult | SweepResult, config: Config | None = None, look: Look = USUAL
) -> Figures:
    """The pictures of a result, by its config's kind of task."""
    on_surface = result.measure in ("value", "work")
    usual = KINDS["surface" if on_surface else "classification"]
    kind = usual if config is None else kind_of(config)
    place = kind.figures if isinstance(result, RaceResult) else kind.sweep_figures
    yield from at(place)(config, result, look)


def of_walks(config: Config | None, result: RaceResult, look: Look = USUAL) -> Figures:
    """The picture of a race on a surface."""
    options = {"optimizers": config and config.optimizers, "look": look}
    yield "cost", plot_cost(result, title_of(config), **options)


def of_race(config: Config | None, result: RaceResult, look: Look = USUAL) -> Figures:
    """The pictures of a race on data."""
    yield from of_walks(config, result, look)
    options = {"optimizers": config and config.optimizers, "look": look}
    yield "work", plot_work(result, title_of(config), **options)


def of_equation(config: PhysicsConfig, result: RaceResult, look: Look = USUAL) -> Figures:
    """The pictures of a race on an equation."""
    from gradxform.lab.report.physics_plots import plot_errors, plot_solution
    from gradxform.lab.report.solutions import solution_of

    yield from of_race(config, result, look)
    if "test_relative_error" not in result.histories[0].rows[-1]:  # a folder that no run wrote
        return
    title = title_of(config)
    yield "error", plot_errors(result, title, optimizers=config.optimizers, look=look)
    found = solution_of(config, result)
    if found is not None:
        yield "solution", plot_solution(found, result, title, look=look)


def of_sweep(config: Config | None, result: SweepResult, look: Look = USUAL) -> Figures:
    """The pictures of a sweep on data."""
    yield from _of_points(config, result, look)
    if config is None:
        return
    training = config.training.model_dump()
    own = training["overrides"]
    sizes = {
        label: own.get(label, {}).get("batch_size") or training["batch_size"]
        for label in config.optimizers
    }
    if len(set(sizes.values())) > 1:
        yield "batch_size", plot_batch_sizes(result, sizes, title_of(config), look=look)


def of_starts(config: Config | None, result: SweepResult, look: Look = USUAL) -> Figures:
    """The pictures of a sweep over a surface."""
    yield from _of_points(config, result, look)
    yield "starts", plot_starts(result.name, result, title_of(config), look=look)


def title_of(config: Config | None) -> str:
    """The title of a config's pictures and tables; empty without a config."""
    return (config.title or config.name) if config is not None else ""


def _of_points(config: Config | None, result: SweepResult, look: Look) -> Figures:
    axes = [list(member.values) for member in result.members]
    title, optimizers = title_of(config), config and config.optimizers
    if any(axes):
        yield "sensitivity", plot_sensitivity(result, title, optimizers=optimizers, look=look)
    if any(len(own) >= 2 for own in axes):
        yield "heatmap", plot_heatmaps(result, title, look=look)
