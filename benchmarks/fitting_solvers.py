"""The solvers that ``benchmarks/fitting.py`` compares, all called in the same way.

A solver is compiled once for each function of residuals. Its start, its bounds and the data of the
residuals are inputs of the compiled program, so one program serves all starts, boxes and problems
that differ only in these.
"""

import collections
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import gradxform as gx
from benchmarks.solvers import MAX_EVALUATIONS, MAX_ITERATIONS, Answer

Residuals = Callable[..., jax.Array]  #: of the parameters and of data
Objective = Callable[..., jax.Array]
_TIGHT = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
_TRF_ENDS = {0: "max_nfev", 1: "gtol", 2: "ftol", 3: "xtol", 4: "ftol and xtol"}


class Inputs(NamedTuple):
    """What a compiled solver starts from, or the shapes of that."""

    x: Any
    bounds: tuple[Any, ...] = ()  #: the lower and the upper ones, or ()
    data: tuple[Any, ...] = ()  #: further arguments of the residuals


class Prepared(NamedTuple):
    """A compiled solver: ``read(run(inputs, **options))``; ``run`` alone is timed."""

    run: Callable[..., Any]
    read: Callable[[Any], Answer]


class Family(NamedTuple):
    """Solvers that share what is compiled."""

    prepare: Callable[[Residuals, Inputs], Prepared]  #: the inputs have shapes alone
    variants: Mapping[str, Mapping[str, Any]]  #: for each solver's name the options of its runs


def squares(residuals: Residuals) -> Objective:
    """The sum of the squared residuals."""
    return lambda x, *data: jnp.sum(residuals(x, *data) ** 2)


def _compiled(solve: Callable[..., Any], *like: Any) -> Any:
    return jax.jit(solve).lower(*like).compile()


def ours(fit: Callable[..., gx.Solution]) -> Callable[..., Prepared]:
    """``fit`` takes residuals and a start, and the options of :func:`gradxform.minimize`."""

    def prepare(residuals: Residuals, like: Inputs) -> Prepared:
        def solve(inputs: Inputs) -> gx.Solution:
            options: dict[str, Any] = {"bounds": inputs.bounds} if inputs.bounds else {}
            options |= {"args": inputs.data, "max_steps": MAX_EVALUATIONS - 1}
            return fit(residuals, inputs.x, **options)._replace(loop=None)

        def read(solution: gx.Solution) -> Answer:
            ended = gx.Status(int(solution.status)).name
            return Answer(np.asarray(solution.params), int(solution.evaluations), 0, ended)

        return Prepared(_compiled(solve, like), read)

    return prepare


def _read_scipy(ended: Callable[[Any], str]) -> Callable[[Any], Answer]:
    def read(found: tuple[Any, int]) -> Answer:
        result, evaluations = found
        return Answer(result.x, evaluations, 0, ended(result))

    return read


def scipy_squares(residuals: Residuals, like: Inputs) -> Prepared:
    """``scipy.optimize.least_squares``; it counts the points at which it asks for residuals."""
    values, jacobian = (
        _compiled(fn, like.x, *like.data) for fn in (residuals, jax.jacfwd(residuals))
    )

    def run(inputs: Inputs, **options: Any) -> tuple[Any, int]:
        count = collections.Counter[str]()

        def fun(x: np.ndarray) -> np.ndarray:
            count["evaluations"] += 1
            return np.asarray(values(x, *inputs.data))

        options |= {"bounds": inputs.bounds} if inputs.bounds else {}
        slope: Any = lambda x: np.asarray(jacobian(x, *inputs.data))
        result = scipy.optimize.least_squares(
            fun, inputs.x, slope, max_nfev=MAX_EVALUATIONS, **options
        )
        return result, count["evaluations"]

    return Prepared(run, _read_scipy(lambda result: _TRF_ENDS.get(result.status, "error")))


def scipy_minimize(residuals: Residuals, like: Inputs) -> Prepared:
    """``scipy.optimize.minimize`` within bounds, with the exact gradient."""
    value_and_grad = _compiled(jax.value_and_grad(squares(residuals)), like.x, *like.data)

    def run(inputs: Inputs, method: str, **options: Any) -> tuple[Any, int]:
        count = collections.Counter[str]()

        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            count["evaluations"] += 1
            value, grad = value_and_grad(x, *inputs.data)
            return float(value), np.asarray(grad)

        box = np.stack(inputs.bounds, axis=1)
        result = scipy.optimize.minimize(
            fun, inputs.x, jac=True, method=method, bounds=box, options=options
        )
        return result, count["evaluations"]

    return Prepared(run, _read_scipy(lambda r: "success" if r.success else "no success"))


def optimistix_squares(residuals: Residuals, like: Inputs) -> Prepared:
    optx = importlib.import_module("optimistix")

    def solve(x: jax.Array, tol: jax.Array) -> Any:
        method = optx.LevenbergMarquardt(tol, tol)
        found = optx.least_squares(
            lambda x, _: residuals(x), method, x, max_steps=MAX_EVALUATIONS, throw=False
        )
        return found.value, found.stats["num_steps"], found.result == optx.RESULTS.successful

    compiled = _compiled(solve, like.x, jax.ShapeDtypeStruct((), like.x.dtype))

    def run(inputs: Inputs, tol: float) -> Any:
        return compiled(inputs.x, np.asarray(tol, inputs.x.dtype))

    def read(found: Any) -> Answer:
        params, steps, is_success = found
        ended = "success" if is_success else "no success"
        return Answer(np.asarray(params), int(steps), 0, ended)

    return Prepared(run, read)


def jaxopt_boxed(tol: float) -> Callable[..., Prepared]:
    def prepare(residuals: Residuals, like: Inputs) -> Prepared:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is archived, and says so
            library = importlib.import_module("jaxopt")

        def solve(inputs: Inputs) -> Any:
            method = library.LBFGSB(
                squares(residuals), maxiter=MAX_ITERATIONS, tol=tol, implicit_diff=False
            )
            params, state = method.run(inputs.x, inputs.bounds, *inputs.data)
            evaluations = jnp.maximum(state.num_fun_eval, state.num_grad_eval)
            return params, evaluations, state.error <= tol

        def read(found: Any) -> Answer:
            params, evaluations, is_success = found
            ended = "success" if is_success else "no success"
            return Answer(np.asarray(params), int(evaluations), 0, ended)

        return Prepared(_compiled(solve, like), read)

    return prepare


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def default_fit() -> Family:
    return Family(ours(gx.least_squares), {"gx.least_squares": {}})


def fitters() -> tuple[Family, ...]:
    """The solvers without bounds, in float64."""
    newton = gx.trust_region(curvature=gx.gauss_newton())

    def by_region(residuals: Residuals, x: jax.Array, **options: Any) -> gx.Solution:
        return gx.least_squares(residuals, x, newton, stop=gx.small_step(), **options)

    by_scipy = {
        "SciPy lm": {"method": "lm"},
        "SciPy lm, 1e-15": {"method": "lm", **_TIGHT},
        "SciPy trf": {"method": "trf"},
        "SciPy trf, 1e-15": {"method": "trf", **_TIGHT},
    }
    found = [
        default_fit(),
        Family(ours(by_region), {"gx.trust_region, Gauss–Newton": {}}),
        Family(scipy_squares, by_scipy),
    ]
    if _installed("optimistix"):
        tols = {f"Optimistix LM, {tol:.0e}": {"tol": tol} for tol in (1e-8, 1e-12)}
        found.append(Family(optimistix_squares, tols))
    return tuple(found)


def bounded_fitters(tol: float) -> tuple[Family, ...]:
    """The solvers with bounds, in float64."""

    def minimized(
        tx: Callable[[Any], Any] | None, residuals: Residuals, x: jax.Array, **options: Any
    ) -> gx.Solution:
        return gx.minimize(squares(residuals), x, tx, tol=tol, **options)

    def region(bounds: Any) -> Any:
        return gx.trust_region(bounds=bounds)

    asked = {"maxfun": MAX_EVALUATIONS, "ftol": 0.0, "gtol": tol}
    by_scipy = {
        "SciPy L-BFGS-B": {"method": "L-BFGS-B", "maxiter": MAX_ITERATIONS, **asked},
        "SciPy TNC": {"method": "TNC", "xtol": 0.0, **asked},
    }
    found = [
        default_fit(),
        Family(ours(functools.partial(minimized, region)), {"gx.trust_region": {}}),
        Family(ours(functools.partial(minimized, None)), {"gx.minimize": {}}),
        Family(scipy_squares, {"SciPy trf, 1e-15": {"method": "trf", **_TIGHT}}),
        Family(scipy_minimize, by_scipy),
    ]
    if _installed("jaxopt"):
        found.append(Family(jaxopt_boxed(tol), {"jaxopt LBFGSB": {}}))
    return tuple(found)
