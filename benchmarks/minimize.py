"""``minimize`` with the line-search methods: many lanes, many leaves, overhead, evaluations.

    python -m benchmarks.minimize [--quick]

Prints four tables in Markdown. Times are warm: medians of runs in which the candidates take turns,
so that a ratio is between neighbours. An evaluation is of value and gradient at one point; of
Optimistix it is a step, which evaluates the value once and the gradient at most once. Rosenbrock is
the chain of n variables, which has a second minimum, f ≈ 3.99, beyond n = 3. A step of
``optax.lbfgs`` makes the evaluations of its search beside the loop's own. Optimistix is left out
where it is not installed.
"""

import argparse
import importlib
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import sklearn.datasets

import gradxform as gx
from benchmarks.common import repeated, table, timed, turns
from gradxform.lab.tasks.surfaces import rosenbrock
from gradxform.second_order.nonlinear_cg import Beta

TOL = 1e-6  #: of the largest absolute gradient entry
OPTIMISTIX_TOL = 1e-8  #: of the step and the decrease: the gradients end about as small
CONVERGED = 1e-5  #: the largest absolute gradient entry that counts as converged, for everybody
MAX_STEPS = 10_000
RUNS = 5
BETAS = get_args(Beta)

Objective = Callable[[jax.Array], jax.Array]


class Answer(NamedTuple):
    params: jax.Array
    evaluations: jax.Array


Solve = Callable[[jax.Array], Answer]


def ours(fn: Objective, make: Callable[[], optax.GradientTransformation]) -> Solve:
    def solve(x: jax.Array) -> Answer:
        solution = gx.minimize(fn, x, make(), tol=TOL, max_steps=MAX_STEPS)
        return Answer(solution.params, solution.evaluations)

    return solve


def optimistix(fn: Objective, names: Sequence[str]) -> dict[str, Solve]:
    """Its solvers of these names; none where it is not installed."""
    if importlib.util.find_spec("optimistix") is None:
        return {}
    optx = importlib.import_module("optimistix")

    def solve(name: str, x: jax.Array) -> Answer:
        solver = getattr(optx, name)(OPTIMISTIX_TOL, OPTIMISTIX_TOL)
        solution = optx.minimise(lambda x, _: fn(x), solver, x, max_steps=MAX_STEPS, throw=False)
        return Answer(solution.value, solution.stats["num_steps"])

    return {f"Optimistix {name}": lambda x, name=name: solve(name, x) for name in names}


def warm_seconds(calls: Mapping[str, Callable[[], Any]], repeat: int = 1) -> dict[str, float]:
    """The median time of each call; they take turns."""
    many = {name: repeated(lambda _, f=f: f(), None, repeat) for name, f in calls.items()}
    times = turns(many, RUNS)
    return {name: statistics.median(some) / repeat for name, some in times.items()}


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n## {title}\n\n{table(head, rows)}", flush=True)


def standard_start(n: int) -> np.ndarray:
    return np.resize(np.asarray([-1.2, 1.0]), n)


# -- many starts in one program


def lanes(count: int) -> None:
    noise = np.random.default_rng(0).normal(size=(count, 10))
    starts = jnp.asarray(standard_start(10) + noise)
    solves = {"gx.bfgs": ours(rosenbrock, gx.bfgs), "gx.lbfgs": ours(rosenbrock, gx.lbfgs)}
    solves |= optimistix(rosenbrock, ("BFGS", "LBFGS"))
    compiled = {name: jax.jit(jax.vmap(solve)) for name, solve in solves.items()}
    seconds = warm_seconds({name: lambda f=f: f(starts) for name, f in compiled.items()})
    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(rosenbrock)))

    def row(name: str) -> list[str]:
        params, evaluations = compiled[name](starts)
        values, grads = value_and_grad(params)
        grad_norms = jnp.max(jnp.abs(grads), axis=1)
        peer = {"gx.bfgs": "Optimistix BFGS", "gx.lbfgs": "Optimistix LBFGS"}.get(name)
        return [
            name,
            f"{jnp.mean(grad_norms <= CONVERGED):.2%}",
            f"{jnp.mean(evaluations):.1f}",
            f"{jnp.max(evaluations)}",
            f"{1e3 * seconds[name]:.0f}",
            f"{seconds[name] / seconds[peer]:.2f}" if peer in seconds else "",
            f"{jnp.median(grad_norms):.1e}",
            f"{jnp.max(grad_norms):.1e}",
            f"{jnp.median(values):.1e}",
            f"{jnp.max(values):.3g}",
        ]

    head = ["method", f"max abs g ≤ {CONVERGED:.0e}", "evaluations: mean", "max", "ms"]
    head += ["time / Optimistix's", "max abs g: median", "max", "f: median", "max"]
    print_table(f"{count} starts on Rosenbrock 10 in one vmap, float64", head, map(row, solves))


# -- many leaves


def valley(leaves: list[jax.Array]) -> jax.Array:
    """Each number lies in a curved valley with that of the same place in the next leaf."""
    ends = sum(jnp.sum((1 - leaf) ** 2) for leaf in leaves)
    steps = itertools.pairwise(leaves)
    return jnp.asarray(ends + sum(10 * jnp.sum((b - a**2) ** 2) for a, b in steps))


def leaves(count: int, size: int, steps: int, methods: Mapping[str, Any]) -> None:
    start = [jnp.full(size, 0.5, jnp.float32) + 0.001 * i for i in range(count)]

    def prepare(tx: optax.GradientTransformationExtraArgs) -> tuple[Callable[[], Any], float]:
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            value, grads = jax.value_and_grad(valley)(params)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=valley
            )
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(start)
        compile_seconds, compiled = timed(lambda: jax.jit(step).lower(start, state).compile())

        def run() -> Any:
            carry = start, state
            for _ in range(steps):
                carry = compiled(*carry)
            return carry

        return run, compile_seconds

    prepared = {name: prepare(tx) for name, tx in methods.items()}
    seconds = warm_seconds({name: run for name, (run, _) in prepared.items()})

    def row(name: str) -> list[str]:
        run, compile_seconds = prepared[name]
        params, state = run()
        value = valley(gx.eval_params(state, params))
        return [
            name,
            f"{compile_seconds:.2f}",
            f"{1e3 * seconds[name] / steps:.2f}",
            f"{value:.3g}",
        ]

    title = f"{count} leaves of {size} numbers, float32, one step in one program"
    head = ["method", "compile s", "ms a step", f"f after {steps} steps"]
    print_table(title, head, map(row, methods))


# -- overhead of the loop on a small problem


def hand_written_bfgs(fn: Objective) -> Solve:
    """A compiled loop as one would write it for a vector: BFGS, halving until Armijo holds."""
    value_and_grad = jax.value_and_grad(fn)

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, f, g, h, d, t, count = carry
        s = t * d
        value, grad = value_and_grad(x + s)
        accept = value <= f + 1e-4 * (g @ s)
        y = grad - g
        sy, hy = s @ y, h @ y
        cross = jnp.outer(s, hy)
        updated = h + ((1 + (y @ hy) / sy) * jnp.outer(s, s) - cross - cross.T) / sy
        h = jnp.where(accept & (sy > 0), updated, h)
        x, f, g = (jnp.where(accept, a, b) for a, b in ((x + s, x), (value, f), (grad, g)))
        d = jnp.where(accept, -h @ g, d)
        return x, f, g, h, d, jnp.where(accept, 1, t / 2), count + 1

    def running(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (jnp.max(jnp.abs(carry[2])) > TOL) & (carry[-1] < MAX_STEPS)

    def solve(x: jax.Array) -> Answer:
        f, g = value_and_grad(x)
        carry = x, f, g, jnp.eye(len(x)), -g, 1 / jnp.max(jnp.abs(g)), jnp.asarray(1)
        x, *_, count = jax.lax.while_loop(running, body, carry)
        return Answer(x, count)

    return solve


def evaluations_alone(fn: Objective, count: jax.Array) -> Solve:
    """The floor: as many evaluations, each at a point that depends on the last."""

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, lowest, done = carry
        value, grad = jax.value_and_grad(fn)(x)
        return x - 1e-4 * grad, jnp.minimum(lowest, value), done + 1

    def solve(x: jax.Array) -> Answer:
        start = x, jnp.asarray(jnp.inf, x.dtype), jnp.zeros_like(count)
        x, _, done = jax.lax.while_loop(lambda carry: carry[-1] < count, body, start)
        return Answer(x, done)

    return solve


def overhead(repeat: int) -> None:
    start = jnp.asarray(standard_start(2))
    minimizers = {"gx.bfgs": ours(rosenbrock, gx.bfgs), "gx.lbfgs": ours(rosenbrock, gx.lbfgs)}
    calls = {f"{name}, called from Python": solve for name, solve in minimizers.items()}
    calls |= {f"{name}, in jit": jax.jit(solve) for name, solve in minimizers.items()}
    peers = {"hand-written BFGS": hand_written_bfgs(rosenbrock)}
    peers["evaluations alone"] = evaluations_alone(rosenbrock, minimizers["gx.bfgs"](start)[1])
    peers |= optimistix(rosenbrock, ("BFGS",))
    calls |= {f"{name}, in jit": jax.jit(solve) for name, solve in peers.items()}
    seconds = warm_seconds({name: lambda f=f: f(start) for name, f in calls.items()}, repeat)

    def row(name: str) -> list[str]:
        params, evaluations = calls[name](start)
        micro = 1e6 * seconds[name]
        value = rosenbrock(params)
        numbers = f"{micro:.0f}", f"{evaluations}", f"{micro / int(evaluations):.2f}"
        return [name, *numbers, f"{value:.1e}"]

    head = ["solve", "µs", "evaluations", "µs an evaluation", "f"]
    print_table("One solve of Rosenbrock 2, float64", head, map(row, calls))


# -- evaluations to a small gradient


def logistic(features: np.ndarray, positive: np.ndarray, l2: float = 1e-3) -> Objective:
    """The mean logistic loss of standardised features and a bias, and l2/2 Σw², bias left free."""
    deviation = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    x, sign = jnp.asarray(scaled), jnp.asarray(np.where(positive, 1.0, -1.0))

    def loss(w: jax.Array) -> jax.Array:
        margins = sign * (x @ w[1:] + w[0])
        return jnp.mean(jax.nn.softplus(-margins)) + l2 / 2 * jnp.sum(w[1:] ** 2)

    return loss


def counted_problems(quick: bool) -> dict[str, tuple[Objective, np.ndarray]]:
    problems: dict[str, tuple[Objective, np.ndarray]] = {
        f"Rosenbrock {n}": (rosenbrock, standard_start(n))
        for n in (2, 10, 100)[: 1 if quick else 3]
    }
    x, y = map(np.asarray, sklearn.datasets.load_breast_cancer(return_X_y=True))
    problems["breast cancer"] = logistic(x, y == 1), np.zeros(x.shape[1] + 1)
    if not quick:
        x, y = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
        problems["digits < 5"] = logistic(x, y < 5), np.zeros(x.shape[1] + 1)
    return problems


def scipy_minimize(fn: Objective, method: str, **options: Any) -> Solve:
    value_and_grad = jax.jit(jax.value_and_grad(fn))

    def solve(x: jax.Array) -> Answer:
        points = 0

        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal points
            points += 1
            value, grad = value_and_grad(x)
            return float(value), np.asarray(grad)

        options_ = {"gtol": TOL, "maxiter": MAX_STEPS, **options}
        result = scipy.optimize.minimize(fun, x, jac=True, method=method, options=options_)
        return Answer(jnp.asarray(result.x), jnp.asarray(points))

    return solve


def counts(quick: bool) -> None:
    problems = counted_problems(quick)

    def solvers(fn: Objective) -> dict[str, Solve]:
        methods = {"gx.bfgs": gx.bfgs, "gx.lbfgs": gx.lbfgs}
        for beta in BETAS[-1:] if quick else BETAS:
            methods[f"gx.nonlinear_cg {beta}"] = lambda beta=beta: gx.nonlinear_cg(beta)
        found = {name: ours(fn, make) for name, make in methods.items()}
        found["SciPy BFGS"] = scipy_minimize(fn, "BFGS")
        found["SciPy L-BFGS-B"] = scipy_minimize(fn, "L-BFGS-B", ftol=0.0, maxcor=10, maxfun=10**6)
        found["SciPy CG"] = scipy_minimize(fn, "CG")
        return found

    cells: dict[str, list[str]] = {}
    for fn, start in problems.values():
        value_and_grad = jax.jit(jax.value_and_grad(fn))
        for name, solve in solvers(fn).items():
            params, evaluations = solve(jnp.asarray(start))
            value, grad = value_and_grad(params)
            missed = "" if jnp.max(jnp.abs(grad)) <= TOL else "*"
            cells.setdefault(name, []).extend([f"{evaluations}{missed}", f"{value:.6g}"])
    head = ["method", *(cell for name in problems for cell in (name, "f"))]
    title = f"Evaluations until the largest absolute gradient entry is {TOL:.0e}, float64"
    print_table(title, head, ([name, *row] for name, row in cells.items()))
    print("\n\\* ended above it")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="minimize with the line-search methods")
    parser.add_argument("--quick", action="store_true", help="small versions of the four tables")
    quick = parser.parse_args(arguments).quick
    print(f"# minimize on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    with jax.enable_x64(True):
        lanes(100 if quick else 2000)
    methods = {"gx.lbfgs": gx.lbfgs(), "gx.lbfgs, ravel=False": gx.lbfgs(ravel=False)}
    methods |= {} if quick else {"optax.lbfgs": optax.lbfgs()}
    methods |= {"optax.sgd": optax.with_extra_args_support(optax.sgd(1e-3))}  # the loop's own share
    leaves(10 if quick else 200, 64, 20, methods)
    with jax.enable_x64(True):
        overhead(10 if quick else 100)
        counts(quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
