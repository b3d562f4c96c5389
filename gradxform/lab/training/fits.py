"""Curve fits: every method minimises the same residuals from the same start."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gradxform.fitting import least_squares
from gradxform.lab.experiment import methods
from gradxform.lab.experiment.catalogue import find
from gradxform.lab.experiment.experiment import Experiment
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.tasks.curves import Curve, Points, curve_of, points_of, residuals_of
from gradxform.lab.training.outcomes import History, RaceResult, Row
from gradxform.lab.training.race import OnRow
from gradxform.lab.training.settings import collecting
from gradxform.solution import Solution

_DEFAULT = {"method": "levenberg_marquardt"}


def race_of_fits(
    experiment: Experiment, data: Points | None = None, on_row: OnRow | None = None, **_: Any
) -> RaceResult:
    """The race of a config whose task is a curve fit.

    A row holds the ``step`` and the ``value``, half the sum of the squared residuals or of their
    robust loss. The parameters of a history are the estimates by name.

    Raises:
      ConfigError: a method does not keep bounds, or fails on the residuals.
    """
    config: Any = experiment.config
    task = config.task
    points = points_of(task) if data is None else data
    curve = curve_of(task, points)
    residuals = residuals_of(curve, points)
    options = {"loss": task.loss, "loss_scale": task.loss_scale, "bounds": curve.bounds}
    options |= {"max_steps": config.training.steps, "history": config.training.steps + 1}
    problems: list[Problem | str] = []
    histories = []
    for label, table in config.optimizers.items():
        with collecting(problems, f"optimizers.{label}"):
            tx = _method(experiment, label, table, curve)
            fit = lambda tx=tx: least_squares(residuals, curve.start, tx, **options)
            histories.append(_history(label, fit, on_row))
    if problems:
        raise ConfigError(task.model, problems)
    return RaceResult(task.model, "value", tuple(histories), "half the sum of squares", points)


def _method(experiment: Experiment, label: str, table: Mapping[str, Any], curve: Curve) -> Any:
    """The method for :func:`gradxform.least_squares`; ``None`` for its own."""
    if table == _DEFAULT:
        return None
    if curve.bounds is None:
        return experiment.transformations[label]
    function = find(str(table.get("method")), "method")
    if function is None or "bounds" not in function.arguments:
        mend = "take lbfgs, trust_region or levenberg_marquardt"
        raise ValueError(f"{table.get('method', 'a chain')} keeps no bounds: {mend}")
    path = f"optimizers.{label}"
    return lambda bounds: methods.build({**table, "bounds": bounds}, path)


def _history(label: str, fit: Callable[[], Solution], on_row: OnRow | None) -> History:
    started = time.perf_counter()
    jax.block_until_ready(fit().params)
    compiled = time.perf_counter()
    solution = jax.device_get(fit())
    seconds = max(time.perf_counter() - compiled, 1e-9)
    assert solution.history is not None
    values = solution.history.value[: int(solution.history.count)]
    rows: list[Row] = [{"step": i, "value": float(value)} for i, value in enumerate(values)]
    for row in rows:
        if on_row is not None:
            on_row(label, row)
    params = {name: float(x) for name, x in solution.params.items()}
    is_lost = not np.isfinite([rows[-1]["value"], *params.values()]).all()
    rate = int(solution.steps) / seconds
    compile_seconds = max(compiled - started - seconds, 0.0)
    return History(label, tuple(rows), is_lost, rate, compile_seconds, params)
