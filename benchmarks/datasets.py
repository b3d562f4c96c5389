"""Ten thousand small data sets fitted in one program, ours and the peers' alike.

    python -m benchmarks.datasets [--quick] [--count 10000] [--precision float64|float32]
        [--out benchmarks/results]

Each data set has 30 points of y = a exp(−k t) + c with noise, and its own a, k and c. The objective
is half the sum of the squared residuals. ``jax.jit(jax.vmap(fit))`` fits all data sets in one
program, from the same start. SciPy's ``curve_fit`` has no such form: it runs in a Python loop over
the first 200 data sets, and its time is scaled to all.

**Reference.** The parameters p* that a trust region finds in float64 from the true parameters, and
their standard errors σ by ``gx.covariance``.

**Solved.** Every parameter is within σ/100 of p*, or the sum of squares is lower there than at p*,
whatever the solver says about it. *Distance* is the largest |p − p*| / σ of a data set; the table
has its 99th percentile.

**Evaluations** are of value and gradient together, or of the residuals and their Jacobian. Of
Optimistix they are its steps; of jaxopt the larger one of its two counters, or its iterations where
it counts no evaluations. In a batch every lane runs as long as the slowest one, so the largest
number decides about the time. jaxopt's BFGS and L-BFGS have the backtracking search, which in a
batch takes a fifth of the time of their default.

**Time** is of a warm call, the median of rounds in which the solvers take turns. The ratio is the
median of the ratios within the rounds. A solver that takes over 20 s has one round.

**Tolerance.** Each solver has the tolerance that its users would write down, 1e-6 in float64 and
1e-4 in float32, of whatever it tests; *solved* tells whether that was enough. Libraries that are
not installed are left out.
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import gradxform as gx
from benchmarks.common import table, timed, turns

POINTS, NOISE, START, MAX_STEPS = 30, 0.02, (1.0, 1.0, 0.0), 1_000
LOOP, LOOPED = "SciPy curve_fit, loop", 200  #: SciPy's row, and the data sets that it fits
SLOW = 20.0  #: seconds beyond which a solver has one round only
CLOSE = 0.01  #: the largest distance from the reference that counts as solved
TOL = {"float64": 1e-6, "float32": 1e-4}


class Data(NamedTuple):
    """All data sets, in float64."""

    t: np.ndarray  #: times, the same for all
    y: np.ndarray  #: measurements, one row for each data set
    truth: np.ndarray  #: true a, k and c


class Fit(NamedTuple):
    """The fit of one data set, or of all."""

    params: Any
    evaluations: Any


Solve = Callable[[jax.Array, jax.Array], Fit]  # of times and measurements


def make_data(count: int) -> Data:
    random = np.random.default_rng(0)
    t = np.linspace(0.0, 5.0, POINTS)
    truth = random.uniform([0.5, 0.3, -0.5], [3.0, 3.0, 0.5], (count, 3))
    exact = np.stack([np.asarray(curve(p, t)) for p in truth])
    return Data(t, exact + NOISE * random.normal(size=exact.shape), truth)


def curve(p: Any, t: Any) -> Any:
    exp = np.exp if isinstance(p, np.ndarray) else jnp.exp
    return p[0] * exp(-p[1] * t) + p[2]


def residuals(p: Any, t: Any, y: Any) -> Any:
    return curve(p, t) - y


def misfit(p: Any, t: Any, y: Any) -> jax.Array:
    return 0.5 * jnp.sum(residuals(p, t, y) ** 2)


def start(t: jax.Array) -> jax.Array:
    return jnp.asarray(START, t.dtype)


# -- the solvers


def ours(make: Callable[[], optax.GradientTransformation], tol: float, squares: bool) -> Solve:
    half_squares = lambda r: 0.5 * jnp.sum(r**2)
    fn = gx.compose(half_squares, residuals) if squares else misfit

    def solve(t: jax.Array, y: jax.Array) -> Fit:
        args = {"t": t, "y": y}
        solution = gx.minimize(fn, start(t), make(), args=args, tol=tol, max_steps=MAX_STEPS)
        return Fit(solution.params, solution.evaluations)

    return solve


def optimistix(name: str, tol: float) -> Solve:
    optx = importlib.import_module("optimistix")
    is_squares = name == "LevenbergMarquardt"
    run = optx.least_squares if is_squares else optx.minimise
    fn = residuals if is_squares else misfit

    def solve(t: jax.Array, y: jax.Array) -> Fit:
        found = run(
            lambda p, args: fn(p, *args),
            getattr(optx, name)(tol, tol),
            start(t),
            (t, y),
            max_steps=MAX_STEPS,
            throw=False,
        )
        return Fit(found.value, found.stats["num_steps"])

    return solve


def jaxopt(name: str, tol: float) -> Solve:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is archived, and says so
        library = importlib.import_module("jaxopt")
    is_squares = name == "LevenbergMarquardt"
    fn = residuals if is_squares else misfit
    options = {"maxiter": MAX_STEPS, "tol": tol, "implicit_diff": False}
    options |= {} if is_squares else {"linesearch": "backtracking"}

    def solve(t: jax.Array, y: jax.Array) -> Fit:
        solver = getattr(library, name)(fn, **options)
        params, state = solver.run(start(t), t=t, y=y)
        counters = [
            getattr(state, key, state.iter_num) for key in ("num_fun_eval", "num_grad_eval")
        ]
        return Fit(params, jnp.maximum(*counters))

    return solve


def solvers(tol: float) -> dict[str, Solve]:
    found = {
        "gx.bfgs": ours(gx.bfgs, tol, squares=False),
        "gx.lbfgs": ours(gx.lbfgs, tol, squares=False),
        "gx.trust_region, Gauss–Newton": ours(
            lambda: gx.trust_region(curvature=gx.gauss_newton()), tol, squares=True
        ),
    }
    for library, make in (("optimistix", optimistix), ("jaxopt", jaxopt)):
        if importlib.util.find_spec(library) is not None:
            title = "Optimistix" if library == "optimistix" else library
            for name in ("BFGS", "LBFGS", "LevenbergMarquardt"):
                found[f"{title} {name}"] = make(name, tol)
    return found


def scipy_loop(data: Data) -> Fit:
    """``curve_fit`` on the first data sets, one after the other."""
    params, evaluations = [], []
    for y in data.y[:LOOPED]:
        try:
            found = scipy.optimize.curve_fit(
                lambda t, *p: curve(np.asarray(p), t), data.t, y, p0=START, full_output=True
            )
            params.append(found[0])
            evaluations.append(found[2]["nfev"])
        except RuntimeError:  # it did not converge
            params.append(np.full(3, np.nan))
            evaluations.append(0)
    return Fit(np.stack(params), np.asarray(evaluations))


# -- the comparison


def reference(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The best parameters and their standard errors, in float64."""
    tx = gx.trust_region(curvature=gx.gauss_newton())
    fn = gx.compose(lambda r: 0.5 * jnp.sum(r**2), residuals)

    def fit(t: jax.Array, y: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
        best = gx.minimize(fn, truth, tx, args={"t": t, "y": y}, tol=1e-10).params
        return best, jnp.sqrt(jnp.diag(gx.covariance(residuals, best, args=(t, y))))

    with jax.enable_x64(True):
        fit_all = jax.jit(jax.vmap(fit, (None, 0, 0)))
        best, errors = fit_all(*(jnp.asarray(x) for x in data))
    return np.asarray(best), np.asarray(errors)


def quality(found: Fit, data: Data, best: np.ndarray, errors: np.ndarray) -> list[str]:
    """Solved, distance and evaluations of a solver."""
    params, count = np.asarray(found.params, float), len(found.params)
    distance = np.max(np.abs(params - best[:count]) / errors[:count], axis=1)
    distance = np.where(np.isfinite(distance), distance, np.inf)

    def squares(p: np.ndarray) -> np.ndarray:
        model = p[:, :1] * np.exp(-p[:, 1:2] * data.t) + p[:, 2:]
        return np.sum((model - data.y[:count]) ** 2, axis=1)

    with np.errstate(over="ignore", invalid="ignore"):
        solved = (distance <= CLOSE) | (squares(params) < squares(best[:count]))
    return [
        f"{np.mean(solved):.2%}",
        f"{np.quantile(distance, 0.99, method='higher'):.1e}",
        f"{np.mean(found.evaluations):.1f}",
        f"{np.max(found.evaluations)}",
    ]


def taken_turns(
    calls: dict[str, Callable[[], Fit]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """The seconds of each call in each round, and of the first call in the same round.

    A call that takes longer than ``SLOW`` seconds has one round only.
    """
    first, *_ = calls
    slow = {name for name, call in calls.items() if timed(call)[0] > SLOW}
    found: dict[str, list[tuple[float, float]]] = {}
    for names, count in ((calls.keys() - slow, rounds), (slow | {first}, 1)):
        times = turns({name: calls[name] for name in calls if name in names}, count, warm_up=0)
        pairs = {name: list(zip(some, times[first], strict=True)) for name, some in times.items()}
        found = pairs | found
    return {name: found[name] for name in calls}


def compare(data: Data, precision: str, rounds: int) -> str:
    """The table of all solvers."""
    best, errors = reference(data)
    with jax.enable_x64(precision == "float64"):
        t, y = (jnp.asarray(x, precision) for x in (data.t, data.y))
        calls: dict[str, Callable[[], Fit]] = {}
        compiling: dict[str, float] = {}
        for name, solve in solvers(TOL[precision]).items():
            fit_all = jax.jit(jax.vmap(solve, (None, 0)))
            compiling[name], compiled = timed(lambda f=fit_all: f.lower(t, y).compile())
            calls[name] = lambda f=compiled: f(t, y)
        calls[LOOP] = lambda: scipy_loop(data)
        times = taken_turns(calls, rounds)
        found = {name: jax.tree.map(np.asarray, call()) for name, call in calls.items()}

    def row(name: str) -> list[str]:
        scale = max(1.0, len(data.y) / LOOPED) if name == LOOP else 1.0
        seconds = [scale * own for own, _ in times[name]]
        ratios = [scale * own / first for own, first in times[name]]
        return [
            name,
            *quality(found[name], data, best, errors),
            f"{compiling[name]:.1f}" if name in compiling else "",
            f"{1e3 * statistics.median(seconds):.0f}",
            f"{statistics.median(ratios):.2f}",
        ]

    head = ["solver", "solved", "distance, 99 %", "evaluations: mean", "max"]
    return table([*head, "compile s", "ms", "of gx.bfgs"], map(row, calls))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="many small fits in one program")
    parser.add_argument("--quick", action="store_true", help="few data sets, to see that it works")
    parser.add_argument("--count", type=int, default=10_000, help="data sets")
    parser.add_argument("--precision", choices=tuple(TOL), default="float64")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    count, rounds = (200, 1) if options.quick else (options.count, 7)
    rows = compare(make_data(count), options.precision, rounds)
    text = (
        f"# {count:,} data sets in one program, {options.precision}\n\n"
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}. What the "
        f"columns mean is told at the head of `benchmarks/datasets.py`.\n\n{rows}\n"
    )
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"datasets_{options.precision}.md"
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
