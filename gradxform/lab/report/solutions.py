"""The solution of an equation that a race has found, and its file ``solution.csv``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gradxform.lab.data.equations import burgers
from gradxform.lab.report.files import Extra, csv_of
from gradxform.lab.training.outcomes import History, RaceResult

_TIMES, _PLACES = 161, 321
_ERROR = "test_relative_error"


class Solution(NamedTuple):
    """The solution of the best net over times and places, next to the reference."""

    t: np.ndarray  #: (times,)
    x: np.ndarray  #: (places,)
    u: np.ndarray  #: the net's solution, (times, places)
    reference: np.ndarray  #: the exact solution, (times, places)


def error_of(history: History) -> float:
    """The relative error of an optimiser's solution at the end; infinite if it is not finite."""
    error = history.rows[-1][_ERROR]
    return error if np.isfinite(error) else np.inf


def best_of(result: RaceResult) -> History:
    """The history whose solution has the least error at the end."""
    return min(result.histories, key=error_of)


def solution_of(config: Any, result: RaceResult) -> Solution | None:
    """The solution of the best net; ``None`` if it is not finite, or if nothing tells it.

    Args:
      config: the experiment.
      result: its result, with final parameters or with the solution from a folder.
    """
    if isinstance(result.data, Solution):
        return result.data
    params = best_of(result).params
    if params is None:
        return None
    t, x = np.linspace(0, 1, _TIMES), np.linspace(-1, 1, _PLACES)
    points = np.stack(np.meshgrid(t, x, indexing="ij"), axis=-1).reshape(-1, 2)
    u = _values(config, params, points)
    if not np.isfinite(u).all():
        return None
    exact = burgers(points, config.task.viscosity)
    return Solution(t, x, *(values.reshape(_TIMES, _PLACES) for values in (u, exact)))


def solution_csv(found: Solution) -> str:
    """CSV text with one line per time and place."""
    grid = np.meshgrid(found.t, found.x, indexing="ij")
    columns = [values.ravel().tolist() for values in (*grid, found.u, found.reference)]
    return csv_of(
        [dict(zip(Solution._fields, row, strict=True)) for row in zip(*columns, strict=True)]
    )


def extra(config: Any, result: RaceResult) -> Extra:
    """``solution.csv``, from which ``gradxform plot`` draws ``solution.png``."""
    found = solution_of(config, result)
    return Extra() if found is None else Extra(files={"solution.csv": solution_csv(found)})


def from_rows(rows: list[Mapping[str, float]]) -> Solution | None:
    """The solution in the rows of ``solution.csv``; ``None`` unless they are a finite grid."""
    values = np.asarray([[row[name] for name in Solution._fields] for row in rows], float)
    values = values.reshape(-1, len(Solution._fields))
    t, x = np.unique(values[:, 0]), np.unique(values[:, 1])
    grid = np.stack(np.meshgrid(t, x, indexing="ij"), axis=-1).reshape(-1, 2)
    if not len(values) or not np.isfinite(values).all() or not np.array_equal(values[:, :2], grid):
        return None
    return Solution(t, x, *(values[:, i].reshape(len(t), len(x)) for i in (2, 3)))


def _values(config: Any, params: Any, points: np.ndarray) -> np.ndarray:
    """The net's solution at points (t, x)."""
    import jax
    import jax.numpy as jnp

    from gradxform.lab.tasks.physics import solution

    with jax.enable_x64(True):
        u = lambda point: solution(params, point, hidden=config.task.hidden)
        return np.asarray(jax.jit(jax.vmap(u))(jnp.asarray(points)))
