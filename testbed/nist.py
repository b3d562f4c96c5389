r"""The 27 nonlinear regression problems of NIST's Statistical Reference Datasets, in JAX.

Every problem has data, a model, two starts, and the least-squares solution that NIST certifies to
11 digits: the parameters, their standard deviations and the residual sum of squares. Start 1 is far
from the solution, start 2 is near it. The file ``nist.json`` holds the numbers, this module the
models. A residual is the response minus the model.

Two things differ from NIST's files. Nelson's response is stored as measured, and its residuals are
those of the logarithm, as NIST fits it. Rat43 has 11 degrees of freedom: the 9 in NIST's file
contradicts its own residual standard deviation.

References:
  National Institute of Standards and Technology, "Statistical Reference Datasets: Nonlinear
  Regression" (public domain).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Model = Callable[..., jax.Array]  #: of the parameters and the predictors


class Problem(NamedTuple):
    """One problem: find the parameters whose squared ``residuals`` have the least sum."""

    name: str
    level: str  #: NIST's level of difficulty: lower, average or higher
    residuals: Callable[[jax.Array], jax.Array]  #: response minus model, one entry per observation
    starts: tuple[tuple[float, ...], tuple[float, ...]]  #: the far start and the near one
    certified: tuple[float, ...]  #: parameters of the solution, to 11 digits
    deviations: tuple[float, ...]  #: standard deviations of the parameters, to 11 digits
    rss: float  #: residual sum of squares at the solution, to 11 digits
    freedom: int  #: degrees of freedom: observations minus parameters

    def __call__(self, x: jax.Array) -> jax.Array:
        """The residual sum of squares."""
        return jnp.sum(self.residuals(x) ** 2)


def correct_digits(problem: Problem, params: Any) -> float:
    """The digits to which the worst parameter agrees with the certified one, at most 11.

    This is NIST's log relative error: ``-log10(|params - certified| / |certified|)``. It is
    ``-inf`` where a parameter is not finite. A start counts as solved from 6 digits on.
    """
    found, certified = np.asarray(params, np.float64), np.asarray(problem.certified)
    error = np.max(np.abs(found - certified) / np.abs(certified))
    if not np.isfinite(error):
        return -math.inf
    return float(min(11.0, -np.log10(max(error, 1e-11))))


def _cubic_ratio(b: jax.Array, x: jax.Array) -> jax.Array:
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _enso(b: jax.Array, x: jax.Array) -> jax.Array:
    def wave(period: jax.Array | float, cosine: jax.Array, sine: jax.Array) -> jax.Array:
        angle = 2 * math.pi * x / period
        return cosine * jnp.cos(angle) + sine * jnp.sin(angle)

    return b[0] + wave(12, b[1], b[2]) + wave(b[3], b[4], b[5]) + wave(b[6], b[7], b[8])


def _gauss(b: jax.Array, x: jax.Array) -> jax.Array:
    first = b[2] * jnp.exp(-((x - b[3]) ** 2) / b[4] ** 2)
    second = b[5] * jnp.exp(-((x - b[6]) ** 2) / b[7] ** 2)
    return b[0] * jnp.exp(-b[1] * x) + first + second


def _lanczos(b: jax.Array, x: jax.Array) -> jax.Array:
    return sum((b[i] * jnp.exp(-b[i + 1] * x) for i in (0, 2, 4)), jnp.zeros_like(x))


def _chwirut(b: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


def _kirby(b: jax.Array, x: jax.Array) -> jax.Array:
    return (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2)


def _saturation(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - jnp.exp(-b[1] * x))


def _eckerle(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / b[1] * jnp.exp(-(((x - b[2]) / b[1]) ** 2) / 2)


def _roszman(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / math.pi


_MODELS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _saturation,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "Eckerle4": _eckerle,
    "ENSO": _enso,
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubic_ratio,
    "Kirby2": _kirby,
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1a": _saturation,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x1, x2: b[0] - b[1] * x1 * jnp.exp(-b[2] * x2),
    "Rat42": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": _roszman,
    "Thurber": _cubic_ratio,
}


def _problem(record: dict[str, Any]) -> Problem:
    name, predictors = record["name"], record["predictors"]
    measured = np.asarray(record["response"], np.float64)
    response = np.log(measured) if name == "Nelson" else measured

    def residuals(x: jax.Array) -> jax.Array:
        data = (jnp.asarray(values, x.dtype) for values in predictors)
        return jnp.asarray(response, x.dtype) - _MODELS[name](x, *data)

    far, near = record["starts"]
    return Problem(
        name,
        record["level"],
        residuals,
        (tuple(far), tuple(near)),
        tuple(record["certified"]),
        tuple(record["deviations"]),
        record["rss"],
        len(response) - len(record["certified"]),
    )


_RECORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PROBLEMS: tuple[Problem, ...] = tuple(_problem(record) for record in _RECORDS)
