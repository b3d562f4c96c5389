r"""The problems of Moré, Garbow and Hillstrom in boxes: minimise f(x) for lower ≤ x ≤ upper.

``GAY`` holds the boxes that Gay published for 31 of the 35 problems; he gives none for problems 28
to 31. The bounds here are those that the test sets of Ceres Solver, PyOPUS and TOMLAB cite from his
paper; they agree where they overlap, except in two of the bounds that are changed below.
``random_box`` draws a box for any of the 35 problems that excludes the unconstrained minimiser.

The published boxes are changed in three places. Problem 11 divides by x₁, so the lower bound of x₁
is 1e-16 in place of 0. Problem 19 has the upper bound 10 for x₁₁, because the published 0 leaves
x₁₁ no room. Problems 32 to 34 have bounds for n = 5, and those of the last variable are repeated
for n = 10.

The file ``boxes.json`` holds what takes long to compute: an unconstrained minimiser of each problem
and the minima in the boxes. The minima are the best values of many runs of SciPy's L-BFGS-B, TNC,
trust-constr and trust-region reflective methods in float64 with tight tolerances, refined by
Newton's method in the variables that are not at a bound.

References:
  Gay, "A trust-region approach to linearly constrained optimization", in Griffiths (ed.), Numerical
  Analysis, Lecture Notes in Mathematics 1066:72, Springer (1984).
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from testbed import problems
from testbed.problems import PROBLEMS, Problem

Outcome = Literal["global", "listed", "elsewhere", "failed"]


class Box(NamedTuple):
    """One problem with bounds on its variables; a bound may be infinite."""

    problem: Problem
    name: str  #: "Gay", or "random" and the seed
    lower: np.ndarray
    upper: np.ndarray
    minima: tuple[float, ...]  #: local minima in the box, the lowest first; empty if not computed

    def project(self, x: Any) -> np.ndarray:
        """The point of the box that is nearest to ``x``, in the precision of ``x``."""
        x = np.asarray(x)
        x = x.astype(float) if np.issubdtype(x.dtype, np.integer) else x
        return np.clip(x, self.lower.astype(x.dtype), self.upper.astype(x.dtype))


def starts(box: Box) -> Iterator[tuple[int, np.ndarray]]:
    """The factor and the start, for 1, 10 and 100 times the standard start, moved into the box."""
    for factor, x in problems.starts(box.problem):
        yield factor, box.project(x)


def usable_starts(box: Box) -> list[tuple[int, np.ndarray]]:
    """Those of ``starts`` from which a method has something to do.

    Left out are starts at the lowest stored minimum, starts where the value or the gradient is not
    finite, and starts where a step along the negative gradient does not leave the place.
    """

    def usable(x: np.ndarray) -> bool:
        value, grad, _ = derivatives(box.problem)(x)
        finite = math.isfinite(value) and bool(np.all(np.isfinite(grad)))
        solved = value - box.minima[0] <= 1e-12 * max(1.0, abs(box.minima[0]))
        return finite and not solved and bool(np.any(box.project(x - grad) != x))

    return [(factor, x) for factor, x in starts(box) if usable(x)]


_STORED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

_Bounds = tuple[tuple[float, ...], tuple[float, ...]]
_ROSENBROCK: _Bounds = ((-50, 0), (0.5, 100))
_POWELL: _Bounds = ((0.1, -20, -1, -1), (100, 20, 1, 50))


def _repeated(bounds: _Bounds, times: int) -> _Bounds:
    return bounds[0] * times, bounds[1] * times


#: of each problem's number: the lower bounds, then the upper ones
_PUBLISHED: dict[int, _Bounds] = {
    1: _ROSENBROCK,
    2: ((0, -30), (20, -0.9)),
    3: ((0, 1), (1, 9)),
    4: ((0, 3e-5), (1e6, 100)),
    5: ((0.6, 0.5), (10, 100)),
    6: ((0.26, 0), (10, 20)),
    7: ((-100, -1, -1), (0.8, 1, 1)),
    8: ((0.1, 0, 0), (50, 100, 50)),
    9: ((0.398, 1, -0.5), (4.2, 2, 0.1)),
    10: ((0.006, 0, 0), (2, 3e5, 3e4)),
    11: ((1e-16, 0, 0), (10, 10, 10)),
    12: ((0, 5, 0), (2, 9.5, 20)),
    13: _POWELL,
    14: ((-100, -100, -100, -100), (0, 10, 100, 100)),
    15: ((0, -1, 0.13, 0.12), (10, 12, 13, 12)),
    16: ((-10, 0, -100, -20), (100, 15, 0, 0.2)),
    17: ((0, 0, -50, 0, 0), (50, 1.9, -0.1, 10, 10)),
    18: ((0, 0, 0, 1, 0, 0), (2, 8, 1, 7, 5, 5)),
    19: (
        (1, 0.5, 0, 0.6, 0, 0, 0, 0, 0, 0, 0),
        (150, 100, 100, 100, 100, 500, 500, 500, 100, 10, 10),
    ),
    20: ((-1e-5, 0, 0, 0, 0, -3, 0, -3, 0), (1e-5, 0.9, 0.1, 1, 1, 0, 4, 0, 2)),
    21: _repeated(_ROSENBROCK, 5),
    22: _repeated(_POWELL, 3),
    23: ((0, 1, 0, 0, 0, 1, 0, 0, 0, 1), (100,) * 10),
    24: ((-10, 0.1, 0, 0.05, 0, -10, 0, 0.2, 0, 0), (50,) * 9 + (0.5,)),
    25: ((0,) * 10, (10, 20, 30, 40, 50, 60, 70, 80, 90, 0.5)),
    26: (tuple(range(0, 100, 10)), tuple(range(10, 110, 10))),
    27: ((0, 1) + (0,) * 8, (100, 100, 0.9) + (100,) * 7),
    32: ((-0.5,) + (-2,) * 9, (100,) * 10),
    33: ((-0.9,) + (-2,) * 9, (100,) * 10),
    34: ((0, -0.4, 0.3) + (0,) * 7, (100,) * 10),
    35: ((0, 0, 0.1) + (0,) * 5, (0.04, 0.2, 0.3) + (1,) * 5),
}


def _box(problem: Problem, name: str, lower: Any, upper: Any) -> Box:
    minima = tuple(_STORED["minima"].get(f"{problem.number} {name}", ()))
    return Box(problem, name, np.asarray(lower, float), np.asarray(upper, float), minima)


GAY: tuple[Box, ...] = tuple(
    _box(problem, "Gay", *_PUBLISHED[problem.number])
    for problem in PROBLEMS
    if problem.number in _PUBLISHED
)


def minimizer(problem: Problem) -> np.ndarray:
    """A global minimiser without bounds; problems 12, 27, 33 and 34, among others, have several."""
    return np.asarray(_STORED["minimizers"][str(problem.number)], float)


def random_box(problem: Problem, seed: int) -> Box:
    """A box that excludes the unconstrained minimiser x*; the same one for the same seed.

    In some coordinates, at least one, a bound separates x* from the box. There the box holds the
    standard start (two times of three), or it lies on the far side of x*. Everywhere else it holds
    both. The box is about as wide as |x*| + |start|. A bound is infinite one time in four, but no
    bound has the other sign than x* and the start where these have the same: many of the problems
    have poles beyond.
    """
    rng = np.random.default_rng((problem.number, seed))
    best, start = minimizer(problem), np.asarray(problem.start, float)
    n = len(best)
    scale = np.abs(best) + np.abs(start)
    scale = np.where(scale > 0, scale, 1)

    cut = rng.random(n) < 0.3
    cut[rng.integers(n)] = True
    sign = rng.choice([-1.0, 1.0], n)
    aside = np.where(best == 0, sign, best * 2**sign)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.where(best * start > 0, best**2 / start, 2 * best - start)
    inside = np.where(cut & (rng.random(n) < 1 / 3), beyond, start)
    inside = np.where(cut & (np.abs(inside - best) <= 1e-3 * scale), aside, inside)

    low, high = np.minimum(best, inside), np.maximum(best, inside)
    lower = np.where(low > 0, low * rng.uniform(0.2, 0.9, n), low - scale * rng.random(n))
    upper = np.where(high < 0, high * rng.uniform(0.2, 0.9, n), high + scale * rng.random(n))
    lower = np.where((low <= 0) & (rng.random(n) < 0.25), -np.inf, lower)
    upper = np.where((high >= 0) & (rng.random(n) < 0.25), np.inf, upper)

    edge = best + (inside - best) * rng.uniform(0.1, 0.8, n)
    lower = np.where(cut & (inside > best), edge, lower)
    upper = np.where(cut & (inside < best), edge, upper)
    return _box(problem, f"random {seed}", lower, upper)


def judge(box: Box, x: Any, tau: float = 1e-8) -> tuple[float, Outcome]:
    """The value at ``x`` in float64, and which minimum that is.

    With f* the lowest minimum and f₀ the value at the standard start moved into the box, ``x`` is
    the global minimum if f(x) − f* ≤ τ max(|f*|, min(1, f₀ − f*)). It is *listed* within that
    distance of another stored minimum, relative to its own value. It is *elsewhere* if no step
    within the box promises more descent to second order than that distance: a local minimum that
    the file does not list, or a plateau. Everything else is *failed*, as is a point outside the
    box.
    """
    point = box.project(x)
    slack = 4 * float(jnp.finfo(point.dtype).eps) * np.abs(point)
    if not (np.all(np.isfinite(x)) and np.all(np.abs(x - point) <= slack)):
        return math.nan, "failed"
    start = box.project(np.asarray(box.problem.start, float))
    point = box.project(np.asarray(point, float))
    value, grad, hessian = derivatives(box.problem)(point)
    lowest = box.minima[0]
    floor = min(1.0, float(derivatives(box.problem)(start)[0]) - lowest)
    within = tau * max(abs(lowest), floor)
    if value - lowest <= within:
        return value, "global"
    if any(abs(value - m) <= tau * max(m, floor) for m in box.minima[1:]):
        return value, "listed"
    promised, curvature = promise(box, point, grad, hessian, within / len(point))
    flat = curvature >= -1e-8 and promised <= max(within, tau * value)
    return value, "elsewhere" if flat else "failed"


def promise(
    box: Box, x: np.ndarray, grad: np.ndarray, hessian: np.ndarray, negligible: float
) -> tuple[float, float]:
    """The descent that the second-order model promises at ``x``, and its lowest curvature.

    Variables whose bound leaves room for less than a ``negligible`` descent to first order count as
    fixed. The curvature is that in the other variables, relative to the largest in absolute value.
    """
    if not (np.all(np.isfinite(grad)) and np.all(np.isfinite(hessian))):
        return math.inf, -math.inf
    room = np.where(grad > 0, x - box.lower, box.upper - x)
    most = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        free = (np.abs(grad) * np.minimum(room, most) > negligible) | (grad == 0)
    if not np.any(free):
        return 0.0, 0.0
    block = hessian[np.ix_(free, free)]
    largest = max(float(np.max(np.abs(block))), float(np.finfo(np.float64).tiny))
    curvature, axes = np.linalg.eigh(block / largest)
    floored = np.maximum(np.abs(curvature), 1e-14 * np.max(np.abs(curvature), initial=0.0))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        terms = np.square(axes.T @ grad[free]) / (2 * floored * largest)
    terms = np.where(axes.T @ grad[free] == 0, 0.0, terms)
    return float(np.sum(terms)), float(np.min(curvature))


@functools.cache
def derivatives(
    problem: Problem,
) -> Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]:
    """Value, gradient and Hessian of the objective in float64, whatever JAX is set to."""

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(problem)(x)
        return value, grad, jax.hessian(problem)(x)

    with jax.enable_x64(True):
        compiled = jax.jit(both).lower(np.asarray(problem.start, np.float64)).compile()

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        with jax.enable_x64(True):
            value, grad, hessian = compiled(np.asarray(x, np.float64))
        return float(value), np.asarray(grad), np.asarray(hessian)

    return evaluate
