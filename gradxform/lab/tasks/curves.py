"""Curves to fit to measured points, and the points."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.lab.data.formats import DataError, Split
from gradxform.lab.data.tables import Columns, column_of, numbers, read_columns
from gradxform.lab.experiment import registry
from gradxform.lab.tasks.models import ModelError


def line(x: jax.Array, intercept: float = 0.0, slope: float = 1.0) -> jax.Array:
    """A straight line: intercept + slope x."""
    return intercept + slope * x


def power(x: jax.Array, factor: float = 1.0, exponent: float = 1.0) -> jax.Array:
    """A power law: factor x^exponent."""
    return factor * x**exponent


def exponential(
    x: jax.Array, height: float = 1.0, rate: float = -1.0, offset: float = 0.0
) -> jax.Array:
    """Exponential growth or decay: offset + height exp(rate x)."""
    return offset + height * jnp.exp(rate * x)


def saturation(x: jax.Array, limit: float = 1.0, rate: float = 1.0) -> jax.Array:
    """A rise to a limit: limit (1 − exp(−rate x))."""
    return -limit * jnp.expm1(-rate * x)


def logistic(x: jax.Array, limit: float = 1.0, rate: float = 1.0, middle: float = 0.0) -> jax.Array:
    """Logistic growth: limit / (1 + exp(−rate (x − middle)))."""
    return limit * jax.nn.sigmoid(rate * (x - middle))


def gaussian(
    x: jax.Array, height: float = 1.0, centre: float = 0.0, width: float = 1.0
) -> jax.Array:
    """A bell: height exp(−(x − centre)² / 2 width²)."""
    return height * jnp.exp(-0.5 * jnp.square((x - centre) / width))


CURVES: dict[str, Callable[..., jax.Array]] = {
    curve.__name__: curve for curve in (line, power, exponential, saturation, logistic, gaussian)
}


class Points(NamedTuple):
    """Measured points, in float64."""

    train: Split  #: x of shape (n,) or (n, columns), and y of shape (n,)
    sigma: np.ndarray | None  #: standard deviations of y, of shape (n,)
    test: None = None


class Curve(NamedTuple):
    """A curve with its parameters."""

    name: str
    fn: Callable[..., jax.Array]  #: (x=points, **parameters) -> values
    start: dict[str, float]
    bounds: tuple[dict[str, float], dict[str, float]] | None  #: low and high by parameter


def points_of(task: Any, data_dir: str | Path | None = None) -> Points:
    """The points of a config's ``[task]`` of kind curve_fit.

    Raises:
      DataError: a column does not exist, or a value is missing, is not a number or is not positive.
    """
    if task.file is not None:
        columns = read_columns(task.file, data_dir)
    else:
        lengths = {len(values) for values in task.data.values()}
        if len(lengths) != 1:
            raise DataError("task.data: the columns should have equally many numbers")
        columns = Columns("task.data", {k: np.asarray(v) for k, v in task.data.items()}, ())

    def column(name: str, key: str) -> np.ndarray:
        return numbers(columns, column_of(columns, name, key), key)

    x = np.stack([column(name, "x") for name in task.x], axis=1)
    y = column(task.y, "y")
    sigma = np.ones(len(y)) if task.sigma is None else column(task.sigma, "sigma")
    if task.sigma is not None and not np.all(sigma > 0):
        row = int(np.argmin(sigma > 0))
        raise DataError(f"{columns.at(row, task.sigma)}: a standard deviation should be above 0")
    points = Split(x[:, 0] if len(task.x) == 1 else x, y)
    return Points(points, None if task.sigma is None else sigma)


def curve_of(task: Any, points: Points) -> Curve:
    """The curve of a config's ``[task]``, after a trial at its start.

    Raises:
      ModelError: the curve fails, which the error says in its words; or its values at the start are
        not finite, or it has as many parameters as there are points.
    """
    entry = registry.find("curve", task.model)
    fn = CURVES[task.model] if entry is None else entry.make
    parameters = registry.parameters_of(fn)
    names = [name for name in parameters if name != "x"]
    start = {name: float(task.start.get(name, parameters[name].default)) for name in names}
    size = len(points.train.y)
    if size <= len(names):
        mend = "give more points, or fewer parameters"
        raise ModelError(f"curve {task.model}: {len(names)} parameters of {size} points: {mend}")
    try:
        values = jnp.asarray(fn(x=jnp.asarray(points.train.x), **start))
    except Exception as error:  # what a user's function raises is unknown
        raise ModelError(f"curve {task.model}: {registry.in_own_words(error, fn)}") from error
    if values.shape != (size,):
        raise ModelError(
            f"curve {task.model}: should return one value for each of {size} points, found the "
            f"shape {values.shape}"
        )
    if not jnp.isfinite(values).all():
        at = ", ".join(f"{name} = {value:g}" for name, value in start.items())
        raise ModelError(f"curve {task.model}: not finite at the start, {at}: change task.start")
    bounds = None
    if task.bounds:
        sides = ({n: task.bounds.get(n, (-np.inf, np.inf))[i] for n in names} for i in (0, 1))
        bounds = next(sides), next(sides)
    return Curve(task.model, fn, start, bounds)


def residuals_of(curve: Curve, points: Points) -> Callable[[dict[str, Any]], jax.Array]:
    """(curve − y) / σ at the points, as a function of the parameters."""
    x, y = map(jnp.asarray, points.train)
    scale = 1.0 if points.sigma is None else 1 / jnp.asarray(points.sigma)

    def residuals(params: dict[str, Any]) -> jax.Array:
        return (curve.fn(x=x, **params) - y) * scale

    return residuals
