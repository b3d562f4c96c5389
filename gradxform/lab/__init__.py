"""The lab around the methods: races, sweeps and movies of optimisers, from Python.

The functions do what the commands of ``gradxform`` do, and return the results. The decorators
register your own data sets, models, tasks, surfaces, curves, methods and loggers. Names are
imported at their first use, so importing the lab is quick and does not import JAX.

>>> import gradxform.lab as lab
>>> result = lab.race({
...     "name": "walk", "task": {"kind": "surface", "surface": "saddle", "start": [1.0, 0.5]},
...     "training": {"steps": 2}, "optimizers": {"SGD": {"method": "sgd", "learning_rate": 0.25}},
... })
>>> result.rows[-1]["value"]
-0.03125
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gradxform.lab.experiment.registry import (
    curve,
    dataset,
    logger,
    method,
    model,
    surface,
    task,
)

if TYPE_CHECKING:
    from gradxform.lab.api import Movie, load_config, load_run, movie, plot, race, sweep
    from gradxform.lab.experiment.problems import ConfigError
    from gradxform.lab.tasks.task import Batch, Task
    from gradxform.lab.training.outcomes import RaceResult, SweepResult

__all__ = [
    "Batch",
    "ConfigError",
    "Movie",
    "RaceResult",
    "SweepResult",
    "Task",
    "curve",
    "dataset",
    "load_config",
    "load_run",
    "logger",
    "method",
    "model",
    "movie",
    "plot",
    "race",
    "surface",
    "sweep",
    "task",
]

_MODULES = {
    **dict.fromkeys(("load_config", "load_run", "movie", "plot", "race", "sweep", "Movie"), "api"),
    "ConfigError": "experiment.problems",
    **dict.fromkeys(("Batch", "Task"), "tasks.task"),
    **dict.fromkeys(("RaceResult", "SweepResult"), "training.outcomes"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        package = sys.modules[__name__]  # so that Python can suggest the nearest name
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=package
        )
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
