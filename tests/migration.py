"""Ten problems for each peer, in the peer's words and in ours.

``python -m tests.migration`` measures them and writes the tables of ``docs/coming_from``.

Both calls of a row are what the page prints; they are evaluated as they stand, with the names that
:func:`names` returns. SciPy gets functions written in NumPy, with gradients and Hessians by hand.
The others get the functions of this module. Everything is in float64.

**Evaluations** are of value and gradient together. Ours: ``Solution.evaluations``. SciPy: the
larger of ``nfev`` and ``njev``. JAXopt: the larger of its two counters. Optimistix: its steps, each
of which evaluates the value once and the gradient at most once. **Products** are Hessian-vector
products; a dense Hessian of n columns counts n.
"""

import functools
import importlib
import importlib.util
import re
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import gradxform as gx

PAGES = Path(__file__).parents[1] / "docs" / "coming_from"


class Row(NamedTuple):
    """One problem."""

    name: str
    theirs: str  #: the peer's call
    ours: str


class Answer(NamedTuple):
    """What a solver returned."""

    params: np.ndarray
    value: float
    evaluations: int
    products: int


# -- the problems, in JAX


def rosen(x: jax.Array, _: None = None) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def beale(x: jax.Array, _: None = None) -> jax.Array:
    powers = jnp.arange(1, 4)
    return jnp.sum((jnp.asarray([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** powers)) ** 2)


def himmelblau(x: jax.Array, _: None = None) -> jax.Array:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def quadratic(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return 0.5 * x @ a @ x - b @ x


def logistic(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0, -y * (x @ w))) + 0.01 * w @ w


def poisson(w: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
    return jnp.mean(jnp.exp(x @ w) - n * (x @ w))


def decay(p: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((p[0] * jnp.exp(-p[1] * t) + p[2] - y) ** 2)


def peak(p: Any, t: jax.Array, y: jax.Array) -> jax.Array:
    curve = p["height"] * jnp.exp(-(((t - p["place"]) / p["width"]) ** 2))
    return jnp.mean((curve - y) ** 2)


def classifier(p: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    margins = y * (x @ p["w"] + p["b"])
    loss = jnp.mean(jnp.logaddexp(0, -margins)) + 0.01 * p["w"] @ p["w"]
    return loss, jnp.mean(margins > 0)


def robust(w: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sqrt(1 + (x @ w - z) ** 2))


# -- the same in NumPy: (value, gradient), and Hessians


def np_quadratic(x: Any, a: Any, b: Any) -> Any:
    return 0.5 * x @ a @ x - b @ x, a @ x - b


def np_logistic(w: Any, x: Any, y: Any) -> Any:
    margins = y * (x @ w)
    slopes = -y / (1 + np.exp(margins))
    value = np.mean(np.logaddexp(0, -margins)) + 0.01 * w @ w
    return value, x.T @ slopes / len(y) + 0.02 * w


def np_logistic_hess(w: Any, x: Any, y: Any) -> Any:
    p = 1 / (1 + np.exp(-(x @ w)))
    return (x.T * (p * (1 - p))) @ x / len(y) + 0.02 * np.eye(len(w))


def np_poisson(w: Any, x: Any, n: Any) -> Any:
    rate = np.exp(x @ w)
    return np.mean(rate - n * (x @ w)), x.T @ (rate - n) / len(n)


def np_decay(p: Any, t: Any, y: Any) -> Any:
    fading = np.exp(-p[1] * t)
    rest = p[0] * fading + p[2] - y
    jacobian = np.stack([fading, -p[0] * t * fading, np.ones_like(t)], axis=1)
    return np.mean(rest**2), 2 * rest @ jacobian / len(t)


def np_robust(w: Any, x: Any, z: Any) -> Any:
    rest = x @ w - z
    root = np.sqrt(1 + rest**2)
    return np.mean(root), x.T @ (rest / root) / len(z)


def np_beale(x: Any) -> Any:
    powers = np.arange(1, 4)
    rest = np.asarray([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** powers)
    jacobian = np.stack([x[1] ** powers - 1, x[0] * powers * x[1] ** (powers - 1)], axis=1)
    return np.sum(rest**2), 2 * rest @ jacobian


def np_himmelblau(x: Any) -> Any:
    a, b = x[0] ** 2 + x[1] - 11, x[0] + x[1] ** 2 - 7
    return a**2 + b**2, np.asarray([4 * a * x[0] + 2 * b, 2 * a + 4 * b * x[1]])


def np_himmelblau_hess(x: Any) -> Any:
    mixed = 4 * (x[0] + x[1])
    return np.asarray(
        [[12 * x[0] ** 2 + 4 * x[1] - 42, mixed], [mixed, 4 * x[0] + 12 * x[1] ** 2 - 26]]
    )


@functools.cache
def data() -> dict[str, Any]:
    """Starts and measurements, in NumPy."""
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(60, 4)), np.linspace(0, 3, 30)
    truth = np.asarray([1.0, -0.5, 0.25, 0.75])
    root = rng.normal(size=(6, 6))
    noise = 0.05 * rng.normal(size=30)
    return {
        "two": np.asarray([-1.2, 1.0]),
        "ten": np.asarray([-1.2, 1.0] * 5),
        "ones": np.ones(2),
        "w0": np.zeros(4),
        "x0": np.zeros(6),
        "p0": np.ones(3),
        "peak0": {"height": 1.0, "place": 1.0, "width": 1.0},
        "net0": {"w": np.zeros(4), "b": 0.0},
        "a": root @ root.T + 0.1 * np.eye(6),
        "b": rng.normal(size=6),
        "x": x,
        "y": np.sign(x @ truth + rng.normal(size=60)),
        "z": x @ truth + rng.standard_t(2, size=60),
        "n": rng.poisson(np.exp(x @ truth / 2)).astype(float),
        "t": t,
        "faded": 2 * np.exp(-1.3 * t) + 0.5 + noise,
        "hill": 2 * np.exp(-(((t - 1.5) / 0.6) ** 2)) + noise,
    }


# -- the calls


def _rows(*rows: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in rows)


ROWS = {
    "scipy": _rows(
        (
            "Rosenbrock, 2 variables",
            'minimize(rosen, two, jac=rosen_der, method="BFGS", tol=1e-8)',
            "gx.minimize(rosen, two, gx.bfgs(), tol=1e-8)",
        ),
        (
            "Beale",
            'minimize(beale, ones, jac=True, method="BFGS", tol=1e-8)',
            "gx.minimize(beale, ones, gx.bfgs(), tol=1e-8)",
        ),
        (
            "a fading signal",
            'minimize(decay, p0, args=(t, faded), jac=True, method="BFGS", tol=1e-8)',
            "gx.minimize(decay, p0, gx.bfgs(), args=(t, faded), tol=1e-8)",
        ),
        (
            "Rosenbrock, 10 variables",
            'minimize(rosen, ten, jac=rosen_der, method="L-BFGS-B", '
            'options={"ftol": 0, "gtol": 1e-8})',
            "gx.minimize(rosen, ten, gx.lbfgs(), tol=1e-8)",
        ),
        (
            "logistic regression",
            'minimize(logistic, w0, args=(x, y), jac=True, method="L-BFGS-B", '
            'options={"ftol": 0, "gtol": 1e-8})',
            "gx.minimize(logistic, w0, gx.lbfgs(), args=(x, y), tol=1e-8)",
        ),
        (
            "Poisson regression",
            'minimize(poisson, w0, args=(x, n), jac=True, method="L-BFGS-B", '
            'options={"ftol": 0, "gtol": 1e-8})',
            "gx.minimize(poisson, w0, gx.lbfgs(), args=(x, n), tol=1e-8)",
        ),
        (
            "a quadratic form",
            'minimize(quadratic, x0, args=(a, b), jac=True, method="CG", tol=1e-7)',
            "gx.minimize(quadratic, x0, gx.nonlinear_cg(), args=(a, b), tol=1e-7)",
        ),
        (
            "robust regression",
            'minimize(robust, w0, args=(x, z), jac=True, method="CG", tol=1e-7)',
            "gx.minimize(robust, w0, gx.nonlinear_cg(), args=(x, z), tol=1e-7)",
        ),
        (
            "Himmelblau",
            'minimize(himmelblau, ones, jac=True, hess=himmelblau_hess, method="Newton-CG", '
            "tol=1e-8)",
            "gx.minimize(himmelblau, ones, gx.with_line_search(gx.scale_by_newton_cg()), tol=1e-8)",
        ),
        (
            "Rosenbrock by second derivatives",
            'minimize(rosen, two, jac=rosen_der, hess=rosen_hess, method="trust-exact", tol=1e-8)',
            'gx.minimize(rosen, two, gx.trust_region("exact"), tol=1e-8)',
        ),
    ),
    "jaxopt": _rows(
        (
            "Rosenbrock, 2 variables",
            "BFGS(rosen, tol=1e-8).run(two)",
            "gx.minimize(rosen, two, gx.bfgs(), tol=1e-8)",
        ),
        (
            "Beale",
            "BFGS(beale, tol=1e-8).run(ones)",
            "gx.minimize(beale, ones, gx.bfgs(), tol=1e-8)",
        ),
        (
            "Himmelblau",
            "BFGS(himmelblau, tol=1e-8).run(ones)",
            "gx.minimize(himmelblau, ones, gx.bfgs(), tol=1e-8)",
        ),
        (
            "a fading signal",
            "BFGS(decay, tol=1e-8).run(p0, t, faded)",
            "gx.minimize(decay, p0, gx.bfgs(), args=(t, faded), tol=1e-8)",
        ),
        (
            "Rosenbrock, 10 variables",
            "LBFGS(rosen, tol=1e-8).run(ten)",
            "gx.minimize(rosen, ten, gx.lbfgs(), tol=1e-8)",
        ),
        (
            "logistic regression",
            "LBFGS(logistic, tol=1e-8).run(w0, x, y)",
            "gx.minimize(logistic, w0, gx.lbfgs(), args=(x, y), tol=1e-8)",
        ),
        (
            "a peak, parameters in a dictionary",
            "LBFGS(peak, tol=1e-8).run(peak0, t, hill)",
            "gx.minimize(peak, peak0, gx.lbfgs(), args=(t, hill), tol=1e-8)",
        ),
        (
            "a classifier and its accuracy",
            "LBFGS(classifier, has_aux=True, tol=1e-8).run(net0, x, y)",
            "gx.minimize(classifier, net0, gx.lbfgs(), args=(x, y), has_aux=True, tol=1e-8)",
        ),
        (
            "a quadratic form",
            "NonlinearCG(quadratic, maxiter=1000, tol=1e-7).run(x0, a, b)",
            "gx.minimize(quadratic, x0, gx.nonlinear_cg(), args=(a, b), tol=1e-7)",
        ),
        (
            "robust regression",
            "NonlinearCG(robust, maxiter=1000, tol=1e-7).run(w0, x, z)",
            "gx.minimize(robust, w0, gx.nonlinear_cg(), args=(x, z), tol=1e-7)",
        ),
    ),
    "optimistix": _rows(
        (
            "Rosenbrock, 2 variables",
            "minimise(rosen, BFGS(1e-8, 1e-8), two)",
            "gx.minimize(rosen, two, gx.bfgs(), tol=1e-8)",
        ),
        (
            "Beale",
            "minimise(beale, BFGS(1e-8, 1e-8), ones)",
            "gx.minimize(beale, ones, gx.bfgs(), tol=1e-8)",
        ),
        (
            "Himmelblau",
            "minimise(himmelblau, BFGS(1e-8, 1e-8), ones)",
            "gx.minimize(himmelblau, ones, gx.bfgs(), tol=1e-8)",
        ),
        (
            "a fading signal",
            "minimise(decay, BFGS(1e-8, 1e-8), p0, args=(t, faded))",
            "gx.minimize(decay, p0, gx.bfgs(), args=((t, faded),), tol=1e-8)",
        ),
        (
            "Rosenbrock, 10 variables",
            "minimise(rosen, LBFGS(1e-8, 1e-8), ten)",
            "gx.minimize(rosen, ten, gx.lbfgs(), tol=1e-8)",
        ),
        (
            "logistic regression",
            "minimise(logistic, LBFGS(1e-8, 1e-8), w0, args=(x, y))",
            "gx.minimize(logistic, w0, gx.lbfgs(), args=((x, y),), tol=1e-8)",
        ),
        (
            "a peak, parameters in a dictionary",
            "minimise(peak, BFGS(1e-8, 1e-8), peak0, args=(t, hill))",
            "gx.minimize(peak, peak0, gx.bfgs(), args=((t, hill),), tol=1e-8)",
        ),
        (
            "a classifier and its accuracy",
            "minimise(classifier, BFGS(1e-8, 1e-8), net0, args=(x, y), has_aux=True)",
            "gx.minimize(classifier, net0, gx.bfgs(), args=((x, y),), has_aux=True, tol=1e-8)",
        ),
        (
            "a quadratic form",
            "minimise(quadratic, NonlinearCG(1e-7, 1e-7), x0, args=(a, b), max_steps=10_000)",
            "gx.minimize(quadratic, x0, gx.nonlinear_cg(), args=((a, b),), tol=1e-7)",
        ),
        (
            "robust regression",
            "minimise(robust, NonlinearCG(1e-7, 1e-7), w0, args=(x, z), max_steps=10_000)",
            "gx.minimize(robust, w0, gx.nonlinear_cg(), args=((x, z),), tol=1e-7)",
        ),
    ),
}


# -- what the names in the calls are

FUNCTIONS = (
    rosen,
    beale,
    himmelblau,
    quadratic,
    logistic,
    poisson,
    decay,
    peak,
    classifier,
    robust,
)


def _in_one_argument(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Optimistix passes all data as one argument."""
    return lambda y, args: fn(y, *args)


@functools.cache
def names(peer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names in the peer's calls, and those in ours."""
    arrays = jax.tree.map(jnp.asarray, data())
    own = {fn.__name__: fn for fn in FUNCTIONS}
    if peer == "optimistix":
        plain = (rosen, beale, himmelblau)
        own = {k: f if f in plain else _in_one_argument(f) for k, f in own.items()}
    ours = {"gx": gx, **arrays, **own}
    if peer != "scipy":
        return {**vars(peer_module(peer)), **arrays, **own}, ours
    optimize = importlib.import_module("scipy.optimize")
    by_hand = {k[3:]: f for k, f in globals().items() if k.startswith("np_")}
    return {**vars(optimize), **data(), **by_hand}, ours


def peer_module(peer: str) -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAXopt says that it is archived
        return importlib.import_module(peer)


# -- running them


def _vector(params: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(params)[0])


def run_ours(peer: str, row: Row) -> Answer:
    solution = eval(row.ours, names(peer)[1])
    return Answer(
        _vector(solution.params),
        float(solution.value),
        int(solution.evaluations),
        int(solution.curvature_products),
    )


def run_theirs(peer: str, row: Row) -> Answer:
    known = names(peer)[0]  # before tracing, because it makes arrays

    def call() -> Any:
        return eval(row.theirs, known)

    if peer == "scipy":
        result = call()
        products = len(result.x) * result.get("nhev", 0)
        return Answer(result.x, float(result.fun), max(result.nfev, result.njev), products)

    def solve() -> tuple[Any, jax.Array, jax.Array]:
        if peer == "optimistix":
            found = call()
            return found.value, found.state.f_info.f, found.stats["num_steps"]
        params, state = call()
        return params, state.value, jnp.maximum(state.num_fun_eval, state.num_grad_eval)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params, value, evaluations = jax.jit(solve)()
    return Answer(_vector(params), float(value), int(evaluations), 0)


# -- the tables of the pages


class Measured(NamedTuple):
    """A row with what both sides returned."""

    row: Row
    theirs: Answer
    ours: Answer


def measure(peer: str) -> list[Measured]:
    return [Measured(row, run_theirs(peer, row), run_ours(peer, row)) for row in ROWS[peer]]


def total(answers: list[Answer]) -> tuple[int, int]:
    """The sums of evaluations and of products."""
    return sum(a.evaluations for a in answers), sum(a.products for a in answers)


def table(measured: list[Measured]) -> str:
    def counts(evaluations: int, products: int) -> str:
        return f"{evaluations} + {products}" if products else str(evaluations)

    lines = ["| problem | there | here | evaluations there | here |", "|---|---|---|---:|---:|"]
    for row, theirs, ours in measured:
        numbers = (counts(x.evaluations, x.products) for x in (theirs, ours))
        lines.append(f"| {row.name} | `{row.theirs}` | `{row.ours}` | {' | '.join(numbers)} |")
    sums = (counts(*total(list(answers))) for answers in list(zip(*measured, strict=True))[1:])
    lines.append(f"| sum | | | {' | '.join(sums)} |")
    return "\n".join(lines)


_TABLE = re.compile(r"(?<=<!-- written by tests/migration\.py -->\n\n).*?(?=\n\n)", re.DOTALL)


def printed(peer: str) -> str:
    """The table on the peer's page."""
    found = _TABLE.search((PAGES / f"{peer}.md").read_text(encoding="utf-8"))
    assert found, f"{peer}.md has no table"
    return found[0]


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    for peer in ROWS:
        page = PAGES / f"{peer}.md"
        text = page.read_text(encoding="utf-8")
        new = table(measure(peer))
        page.write_text(_TABLE.sub(lambda _, new=new: new, text), encoding="utf-8")


if __name__ == "__main__":
    main()
