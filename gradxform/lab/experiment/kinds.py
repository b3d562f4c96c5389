"""The kinds of task: one row says everything that differs between them.

Each row names the functions that a kind needs, as ``module:function``. They are imported at their
first use, so this module imports no JAX.
"""

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from gradxform.lab.experiment import registry
from gradxform.lab.experiment.schema import (
    AutoencoderConfig,
    ClassificationConfig,
    Config,
    CurveFitConfig,
    LanguageConfig,
    OwnConfig,
    PhysicsConfig,
    RegressionConfig,
    SurfaceConfig,
)

Place: TypeAlias = str | Callable[..., Any]
"""A function, or ``module:function`` to import it from."""


def _epochs(config: Any, label: str) -> int:
    """The epochs of an optimiser, unless it ends early."""
    own = config.training.overrides.get(label)
    return (own.epochs if own is not None else None) or config.training.epochs


def _points(config: Any, label: str) -> int:
    """The points of a walk, with its start."""
    return config.training.steps + 1


def _seeds(sweep: Any) -> int:
    return sweep.seeds


def _starts(sweep: Any) -> int:
    starts = sweep.starts or [()]
    return starts["points"] ** 2 if isinstance(starts, Mapping) else len(starts)


class Kind(NamedTuple):
    """A kind of task. The defaults are those of a net that is trained on data, epoch by epoch."""

    schema: type[Any]  #: the class of its configs
    data: Place | None = "gradxform.lab.data.sets:data_of"
    """(``config.task``, folder of the files) -> its data set; ``None`` if it needs no data"""
    task: Place | None = "gradxform.lab.tasks.task:task_of"
    """(``config.task``, data set) -> the :class:`gradxform.lab.tasks.task.Task`"""
    race: Place = "gradxform.lab.training.race:race_on_data"
    """(experiment, data, ``on_row``, **options) -> result; the options are the others of
    :func:`gradxform.lab.training.race.race`"""
    sweep: Place | None = "gradxform.lab.training.sweep:sweep_on_data"
    """(config, data, ``on_epoch``, **options) -> result; the options are the others of
    :func:`gradxform.lab.training.sweep.sweep`; ``None`` if there is no sweep"""
    figures: Place = "gradxform.lab.report.figures:of_race"
    """(config, result of a race) -> pairs of a file's stem and its figure"""
    sweep_figures: Place = "gradxform.lab.report.figures:of_sweep"
    """(config, result of a sweep) -> pairs of a file's stem and its figure"""
    extra: Place | None = None
    """(config, result of a race) -> a :class:`gradxform.lab.report.files.Extra`: what the report of
    this kind holds besides"""
    read: Place | None = None
    """(folder, summary, result with a folder's rows) -> the result with what ``extra`` wrote"""
    is_float64: bool = False  #: whether it computes in float64
    has_movie: bool = False  #: whether ``gradxform movie`` can draw it
    has_epochs: bool = True  #: whether it trains epoch by epoch, so that it can have checkpoints
    rows: Callable[[Any, str], int] = _epochs
    """(config, label) -> the number of rows of an optimiser that does not end early"""
    runs: Callable[[Any], int] = _seeds  #: ``config.sweep`` -> the runs of each point of a sweep
    more_runs: str = "seeds = 4"  #: the key of ``[sweep]`` that asks for several runs of a point


KINDS: dict[str, Kind] = {
    "classification": Kind(ClassificationConfig, data="gradxform.lab.data.own:data_of"),
    "regression": Kind(RegressionConfig, data="gradxform.lab.data.own:data_of"),
    "autoencoder": Kind(AutoencoderConfig),
    "language": Kind(LanguageConfig),
    "physics": Kind(
        PhysicsConfig,
        task="gradxform.lab.tasks.physics:task_of",
        figures="gradxform.lab.report.figures:of_equation",
        extra="gradxform.lab.report.solutions:extra",
        read="gradxform.lab.report.runs:with_solution",
        is_float64=True,
    ),
    "curve_fit": Kind(
        CurveFitConfig,
        data="gradxform.lab.tasks.curves:points_of",
        task=None,
        race="gradxform.lab.training.fits:race_of_fits",
        sweep=None,
        figures="gradxform.lab.report.fits:figures",
        extra="gradxform.lab.report.fits:extra",
        read="gradxform.lab.report.runs:with_estimates",
        is_float64=True,
        has_epochs=False,
        rows=_points,
    ),
    "surface": Kind(
        SurfaceConfig,
        data=None,
        task=None,
        race="gradxform.lab.training.surfaces:race_down_surface",
        sweep="gradxform.lab.training.surfaces:sweep_over_surface",
        figures="gradxform.lab.report.figures:of_walks",
        sweep_figures="gradxform.lab.report.figures:of_starts",
        has_movie=True,
        has_epochs=False,
        rows=_points,
        runs=_starts,
        more_runs="starts = {points = 21}",
    ),
}


_OWN = Kind(
    OwnConfig, data="gradxform.lab.tasks.own:made_by_user", task="gradxform.lab.tasks.own:as_it_is"
)


def kinds() -> dict[str, Kind]:
    """Our kinds of task, and those that users registered."""
    return KINDS | dict.fromkeys(registry.named("task"), _OWN)


def kind_of(config: Config) -> Kind:
    """The row of a config's kind of task."""
    return KINDS.get(config.task.kind, _OWN)


def at(place: Place) -> Callable[..., Any]:
    """The function at a place.

    >>> at("gradxform.lab.experiment.kinds:at") is at
    True
    """
    return pkgutil.resolve_name(place) if isinstance(place, str) else place
