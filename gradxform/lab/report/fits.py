"""The report of a curve fit: estimates with their errors, and the fit with its band."""

import csv
import io
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from gradxform.covariances import covariance
from gradxform.lab.experiment.messages import plain
from gradxform.lab.report.drawing import USUAL, Look, clear, entitle, new_figure
from gradxform.lab.report.figures import of_walks, title_of
from gradxform.lab.report.files import Extra
from gradxform.lab.tasks.curves import Curve, Points, curve_of, points_of, residuals_of
from gradxform.lab.training.outcomes import RaceResult, ranked
from gradxform.squares import sum_of_squares

_PLACES = 300  # points of the drawn curve
_AT_BOUND = 1e-10  # as a part of the parameter's size


class Fit(NamedTuple):
    """The best fit of a race."""

    curve: Curve
    points: Points
    estimates: dict[str, float]
    errors: dict[str, float]
    """standard errors: 0 for a parameter at its bound, NaN if the data do not determine all"""
    covariance: np.ndarray  #: in the order of the parameters; zeros for those at a bound
    scale: float  #: standard deviation of the residuals, in units of sigma if there is one
    freedom: int  #: number of points minus number of free parameters


def fit_of(config: Any, result: RaceResult) -> Fit:
    """The best fit of a race, with standard errors.

    The covariance is s² (JᵀJ)⁻¹, see :func:`gradxform.covariance`. With a robust loss each residual
    has the weight that it has at the end. A parameter at a bound counts as known.

    Args:
      config: the config of the race.
      result: its result.
    """
    points = points_of(config.task) if result.data is None else result.data
    curve = curve_of(config.task, points)
    found = ranked(result)[0].params
    estimates = {name: float(found.get(name, np.nan)) for name in curve.start}
    names = list(estimates)
    free = [name for name in names if not _is_at_bound(curve, name, estimates[name])]
    residuals = residuals_of(curve, points)
    loss = sum_of_squares(residuals, loss=config.task.loss, loss_scale=config.task.loss_scale)
    at_end = residuals(estimates)
    slope = jax.grad(lambda r: loss.loss(r, loss_scale=config.task.loss_scale))(at_end)
    weights = jnp.where(at_end == 0, 1.0, slope / jnp.where(at_end == 0, 1.0, at_end))

    def weighted(flat: jax.Array) -> jax.Array:
        given = dict(zip(free, flat, strict=True))
        return jnp.sqrt(weights) * residuals(estimates | given)

    full = np.zeros((len(names), len(names)))
    where = [names.index(name) for name in free]
    if free:
        flat = jnp.asarray([estimates[name] for name in free])
        full[np.ix_(where, where)] = np.asarray(covariance(weighted, flat))
    freedom = len(points.train.y) - len(free)
    scale = math.sqrt(float(jnp.sum(weights * at_end**2)) / freedom)
    errors = dict(zip(names, np.sqrt(np.diag(full)).tolist(), strict=True))
    return Fit(curve, points, estimates, errors, full, scale, freedom)


def extra(config: Any, result: RaceResult) -> Extra:
    """The table of the estimates, ``estimates.csv``, and what ``summary.json`` holds of them."""
    fit = fit_of(config, result)
    table = Table(title="Estimates", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("parameter", "estimate", "standard error"):
        table.add_column(name, justify="left" if name == "parameter" else "right")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("parameter", "estimate", "standard_error"))
    rows = []
    for name, value in fit.estimates.items():
        error = fit.errors[name]
        at_bound = _is_at_bound(fit.curve, name, value)
        said = "at its bound" if at_bound else f"± {error:.4g}" if error == error else "unknown"
        table.add_row(Text(plain(name)), f"{value:.8g}", said)
        writer.writerow((name, value, "" if at_bound else error))
        known = None if at_bound or error != error else error
        rows.append({"parameter": name, "estimate": value, "standard_error": known})
    summary = {"estimates": rows, "residual_standard_deviation": fit.scale}
    summary["freedom"] = fit.freedom
    return Extra((table,), {"estimates.csv": text.getvalue()}, summary)


def figures(config: Any, result: RaceResult, look: Look = USUAL) -> Iterator[tuple[str, Figure]]:
    """The pictures of a fit: the values by update, and for a curve of one variable the fit."""
    yield from of_walks(config, result, look)
    if len(config.task.x) == 1:
        yield "fit", plot_fit(fit_of(config, result), config, look)


def plot_fit(fit: Fit, config: Any, look: Look = USUAL) -> Figure:
    """Draws the points, the fit, and the band of the curve; below, the residuals.

    Args:
      fit: the fit.
      config: the config of the race.
      look: size and dots per inch.
    """
    from scipy.stats import t  # comes with scikit-learn

    x, y = fit.points.train
    inside = np.linspace(x.min(), x.max(), _PLACES)
    flat = jnp.asarray(list(fit.estimates.values()))

    def curve(flat: jax.Array, x: Any) -> jax.Array:
        return fit.curve.fn(x=jnp.asarray(x), **dict(zip(fit.estimates, flat, strict=True)))

    slopes = np.asarray(jax.jacfwd(curve)(flat, inside))
    values = np.asarray(curve(flat, inside))
    quantile = float(t.ppf(0.5 + config.task.level / 2, fit.freedom))
    half = quantile * np.sqrt(np.einsum("ij,jk,ik->i", slopes, fit.covariance, slopes))
    figure = new_figure(7.2, 5.4, look)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    words = f"{100 * config.task.level:g} % band of the curve"
    sigma = fit.points.sigma
    for axes, shift, middle in ((top, 0, values), (bottom, np.asarray(curve(flat, x)), 0 * values)):
        axes.fill_between(inside, middle - half, middle + half, color="0.82", label=words)
        axes.plot(inside, middle, color="C0", label="fit")
        axes.errorbar(x, y - shift, sigma, fmt="o", color="0.15", markersize=4, label="data")
        clear(axes)
    top.set_ylabel(config.task.y)
    bottom.set(xlabel=config.task.x[0], ylabel="residual")
    top.legend(frameon=False)
    entitle(figure, title_of(config))
    return figure


def _is_at_bound(curve: Curve, name: str, value: float) -> bool:
    if curve.bounds is None:
        return False
    near = _AT_BOUND * max(abs(value), 1e-300)
    return any(abs(value - side[name]) <= near for side in curve.bounds)
