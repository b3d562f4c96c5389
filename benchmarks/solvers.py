"""Minimisers on the problems of Moré, Garbow and Hillstrom, ours and the peers' alike.

    python -m benchmarks.solvers [--quick] [--precision float64|float32] [--out benchmarks/results]

Every solver starts from 1, 10 and 100 times the standard start, with the exact gradient (and the
Hessian where it takes one), compiled. Left out are starts that already are a solution, and those
where value or gradient is not finite, or the gradient zero, in the precision of the run.

**Solved.** The objective is evaluated in float64 at the point returned, whatever the solver says
about it. With f* a minimum of the paper and f₀ the objective at the standard start, f* is reached
when

    f(x) − f* ≤ τ max(|f*|, min(1, f₀ − f*)),    τ = 1e-8 in float64, 1e-4 in float32.

The scale does not grow with the distance of the start. *Global* is the lowest minimum of the paper,
*listed* another one of the paper (to 1e-3 relative: some are infima at infinity), *elsewhere* any
other point where the second-order model in float64 promises no descent beyond that tolerance: a
local minimum that the paper does not list, or a plateau. Everything else is *failed*, an exception
and a point that is not finite included. Solved is global or listed.

**Budget.** 10,000 evaluations where the solver counts those, 2,000 iterations where it does not;
more than 10,000 evaluations is failed. **Tolerance.** 1e-8 in float64, 1e-6 in float32, of the
gradient or whatever the solver tests.

**Evaluations** are of value and gradient together. Ours: as ``Solution.evaluations`` reports.
SciPy: points at which it asked for value or gradient, by a counter around the objective.
Optimistix: its steps, each of which evaluates the value once and the gradient at most once.
``optax.lbfgs``: the evaluations of its zoom search, without the one that ``minimize`` makes beside
it, though its time has both. jaxopt: the larger one of its two counters. **Products** are
Hessian-vector products; a dense Hessian counts n. **Work** is the sum of the two. SciPy iterates in
float64 always: in the float32 run it is the objective that is in float32.

**Time** is of a warm solve, the least of three where it is below half a second. Medians are over
the starts solved. Ratios are geometric means, over the starts that both solve, of this solver to
the first one of its class.
"""

import argparse
import collections
import functools
import importlib
import importlib.util
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import gradxform as gx
from benchmarks.common import stopwatch, table, timed, turns
from testbed.problems import PROBLEMS, Problem, starts

MAX_EVALUATIONS, MAX_ITERATIONS = 10_000, 2_000
QUICK = (1, 8, 13)  #: numbers of the problems of ``--quick``

Outcome = Literal["global", "listed", "elsewhere", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("global", "listed", "elsewhere", "failed")
SOLVED = ("global", "listed")


class Settings(NamedTuple):
    dtype: Any
    solved: float  #: τ of the module's docstring
    tol: float  #: what the solvers are asked for


PRECISIONS = {
    "float64": Settings(np.float64, 1e-8, 1e-8),
    "float32": Settings(np.float32, 1e-4, 1e-6),
}


class Answer(NamedTuple):
    """What a solver returned."""

    params: np.ndarray
    evaluations: int
    products: int
    ended: str  #: in the solver's own words


class Prepared(NamedTuple):
    """A solver compiled for a problem: ``read(run(start))``; ``run`` alone is timed."""

    run: Callable[[Any], Any]
    read: Callable[[Any], Answer]


Prepare = Callable[[Problem, Settings], Prepared]


class Solver(NamedTuple):
    name: str
    family: str
    prepare: Prepare


class Result(NamedTuple):
    """One solver from one start."""

    solver: Solver
    problem: Problem
    factor: int
    outcome: Outcome
    value: float
    evaluations: int
    products: int
    seconds: float
    ended: str

    @property
    def solved(self) -> bool:
        return self.outcome in SOLVED

    @property
    def work(self) -> int:
        return self.evaluations + self.products


# -- the solvers


def _compiled(
    solve: Callable[[jax.Array], Any], problem: Problem, settings: Settings
) -> Callable[[Any], Any]:
    start = jax.ShapeDtypeStruct((len(problem.start),), settings.dtype)
    return jax.jit(solve).lower(start).compile()


def ours(tx: optax.GradientTransformation, *, in_update: bool = False) -> Prepare:
    """A method run by :func:`gradxform.minimize`; ``in_update``: its own search evaluates."""

    def prepare(problem: Problem, settings: Settings) -> Prepared:
        steps = MAX_ITERATIONS if in_update else MAX_EVALUATIONS - 1  # the start is evaluated too

        def solve(x: jax.Array) -> gx.Solution:
            solution = gx.minimize(problem, x, tx, tol=settings.tol, max_steps=steps)
            return solution._replace(loop=None)

        def read(solution: gx.Solution) -> Answer:
            repeated = int(solution.steps) if in_update else 0
            return Answer(
                np.asarray(solution.params),
                int(solution.evaluations) - repeated,
                int(solution.curvature_products),
                gx.Status(int(solution.status)).name,
            )

        return Prepared(_compiled(solve, problem, settings), read)

    return prepare


def scipy_minimize(
    method: str, *, hessian: Literal["none", "product", "dense"] = "none", **options: Any
) -> Prepare:
    def prepare(problem: Problem, settings: Settings) -> Prepared:
        def product(x: jax.Array, v: jax.Array) -> jax.Array:
            return jax.jvp(jax.grad(problem), (x,), (v,))[1]

        start = jnp.ones(len(problem.start), settings.dtype)
        value_and_grad = jax.jit(jax.value_and_grad(problem)).lower(start).compile()
        curvature: Any = None
        if hessian == "product":
            curvature = jax.jit(product).lower(start, start).compile()
        elif hessian == "dense":
            curvature = jax.jit(jax.hessian(problem)).lower(start).compile()
        tol = {"xtol" if method == "Newton-CG" else "gtol": settings.tol}

        def run(x: np.ndarray) -> tuple[Any, collections.Counter[str]]:
            counts: collections.Counter[str] = collections.Counter()

            def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
                counts["evaluations"] += 1
                value, grad = value_and_grad(x.astype(settings.dtype))
                return float(value), np.asarray(grad, np.float64)

            def second(x: np.ndarray, *v: np.ndarray) -> np.ndarray:
                counts["products"] += 1 if v else len(x)
                arrays = (a.astype(settings.dtype) for a in (x, *v))
                return np.asarray(curvature(*arrays), np.float64)

            derivative = {"none": {}, "product": {"hessp": second}, "dense": {"hess": second}}
            result = scipy.optimize.minimize(
                fun,
                x.astype(np.float64),
                jac=True,
                method=method,
                options={"maxiter": MAX_ITERATIONS, **tol, **options},
                **derivative[hessian],
            )
            return result, counts

        def read(answer: tuple[Any, collections.Counter[str]]) -> Answer:
            result, counts = answer
            return Answer(result.x, counts["evaluations"], counts["products"], str(result.message))

        return Prepared(run, read)

    return prepare


def optimistix_minimise(make: Callable[[Any, float], Any]) -> Prepare:
    def prepare(problem: Problem, settings: Settings) -> Prepared:
        optx = importlib.import_module("optimistix")

        def solve(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            solution = optx.minimise(
                lambda x, _: problem(x),
                make(optx, settings.tol),
                x,
                max_steps=MAX_EVALUATIONS,
                throw=False,
            )
            ok = solution.result == optx.RESULTS.successful
            return solution.value, solution.stats["num_steps"], ok

        def read(answer: Any) -> Answer:
            x, steps, ok = answer
            return Answer(np.asarray(x), int(steps), 0, "successful" if ok else "unsuccessful")

        return Prepared(_compiled(solve, problem, settings), read)

    return prepare


def jaxopt_run(name: str) -> Prepare:
    def prepare(problem: Problem, settings: Settings) -> Prepared:
        jaxopt = importlib.import_module("jaxopt")

        def solve(x: jax.Array) -> Any:
            solver = getattr(jaxopt, name)(
                problem, maxiter=MAX_ITERATIONS, tol=settings.tol, implicit_diff=False
            )
            x, state = solver.run(x)
            evaluations = jnp.maximum(state.num_fun_eval, state.num_grad_eval)
            return x, evaluations, state.iter_num, state.error

        def read(answer: Any) -> Answer:
            x, evaluations, iterations, error = answer
            ended = f"{int(iterations)} iterations, error {float(error):.1e}"
            return Answer(np.asarray(x), int(evaluations), 0, ended)

        return Prepared(_compiled(solve, problem, settings), read)

    return prepare


BFGS, LBFGS, NCG, SECOND = "BFGS", "L-BFGS", "nonlinear CG", "second order"
_LIBRARIES: dict[str, tuple[Solver, ...]] = {
    "gradxform": (
        Solver("gx.bfgs", BFGS, ours(gx.bfgs())),
        Solver("gx.lbfgs", LBFGS, ours(gx.lbfgs())),
        Solver("gx.nonlinear_cg PR+", NCG, ours(gx.nonlinear_cg("polak_ribiere"))),
        Solver("gx.nonlinear_cg FR", NCG, ours(gx.nonlinear_cg("fletcher_reeves"))),
        Solver("gx.nonlinear_cg HS", NCG, ours(gx.nonlinear_cg("hestenes_stiefel"))),
        Solver("gx.nonlinear_cg DY", NCG, ours(gx.nonlinear_cg("dai_yuan"))),
        Solver("gx.nonlinear_cg HZ", NCG, ours(gx.nonlinear_cg("hager_zhang"))),
        Solver("gx.newton", SECOND, ours(gx.with_line_search(gx.scale_by_newton()))),
        Solver("gx.newton_cg", SECOND, ours(gx.with_line_search(gx.scale_by_newton_cg()))),
        Solver("gx.trust_region", SECOND, ours(gx.trust_region())),
        Solver("gx.trust_region CG", SECOND, ours(gx.trust_region("steihaug"))),
        Solver("gx.hessian_free", SECOND, ours(gx.hessian_free(curvature=gx.hessian()))),
    ),
    "optax": (Solver("optax.lbfgs", LBFGS, ours(optax.lbfgs(), in_update=True)),),
    "scipy": (
        Solver("SciPy BFGS", BFGS, scipy_minimize("BFGS")),
        Solver(
            "SciPy L-BFGS-B",
            LBFGS,
            scipy_minimize("L-BFGS-B", maxfun=MAX_EVALUATIONS, ftol=0.0),
        ),
        Solver("SciPy CG", NCG, scipy_minimize("CG")),
        Solver("SciPy Newton-CG", SECOND, scipy_minimize("Newton-CG", hessian="product")),
        Solver("SciPy trust-ncg", SECOND, scipy_minimize("trust-ncg", hessian="product")),
        Solver("SciPy trust-exact", SECOND, scipy_minimize("trust-exact", hessian="dense")),
    ),
    "optimistix": (
        Solver("Optimistix BFGS", BFGS, optimistix_minimise(lambda o, tol: o.BFGS(tol, tol))),
        Solver("Optimistix LBFGS", LBFGS, optimistix_minimise(lambda o, tol: o.LBFGS(tol, tol))),
        Solver(
            "Optimistix NonlinearCG",
            NCG,
            optimistix_minimise(lambda o, tol: o.NonlinearCG(tol, tol)),
        ),
    ),
    "jaxopt": (
        Solver("jaxopt BFGS", BFGS, jaxopt_run("BFGS")),
        Solver("jaxopt LBFGS", LBFGS, jaxopt_run("LBFGS")),
        Solver("jaxopt NonlinearCG", NCG, jaxopt_run("NonlinearCG")),
    ),
}


def installed_solvers() -> tuple[Solver, ...]:
    """Those of the libraries that are there, in the order of their classes."""
    found = [s for name, s in _LIBRARIES.items() if importlib.util.find_spec(name)]
    families = (BFGS, LBFGS, NCG, SECOND)
    return tuple(
        sorted((s for some in found for s in some), key=lambda s: families.index(s.family))
    )


def is_ours(solver: Solver) -> bool:
    return solver in _LIBRARIES["gradxform"]


# -- what became of a run


class Judge(NamedTuple):
    """The objective of a problem in float64, whatever the precision of the run."""

    problem: Problem
    tau: float
    derivatives: Callable[[np.ndarray], Any]  #: value, gradient and Hessian
    scale: float  #: min(1, f₀ − f*)

    def __call__(self, answer: Answer) -> tuple[float, Outcome]:
        """The value at the point returned, and which minimum that is."""
        minima = self.problem.minima
        with jax.enable_x64(True):
            value, grad, hessian = (
                np.asarray(a) for a in self.derivatives(np.asarray(answer.params, np.float64))
            )
        reached = float(value)
        within = self.tau * max(abs(minima[0]), self.scale)
        if not math.isfinite(reached) or answer.evaluations > MAX_EVALUATIONS:
            return reached, "failed"
        if reached - minima[0] <= within:
            return reached, "global"
        if any(abs(reached - minimum) <= 1e-3 * abs(minimum) for minimum in minima[1:]):
            return reached, "listed"
        if np.all(np.isfinite(grad)) and np.all(np.isfinite(hessian)):
            curvature, axes = np.linalg.eigh(hessian)
            largest = max(np.max(np.abs(curvature)), np.finfo(np.float64).tiny)
            floor = np.maximum(np.abs(curvature), 1e-14 * largest)
            with np.errstate(over="ignore"):
                promised = np.sum((axes.T @ grad) ** 2 / (2 * floor))
            if promised <= max(within, self.tau * reached) and np.min(curvature) >= -1e-8 * largest:
                return reached, "elsewhere"
        return reached, "failed"


def make_judge(problem: Problem, settings: Settings) -> Judge:
    def derivatives(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        value, grad = jax.value_and_grad(problem)(x)
        return value, grad, jax.hessian(problem)(x)

    with jax.enable_x64(True):
        start = np.asarray(problem.start, np.float64)
        compiled = jax.jit(derivatives).lower(start).compile()
        value = float(compiled(start)[0])
    return Judge(problem, settings.solved, compiled, min(1.0, value - problem.minima[0]))


def usable_starts(problem: Problem, settings: Settings) -> list[tuple[int, np.ndarray]]:
    """Those from which there is something to do for a method that follows the gradient."""
    value_and_grad = jax.jit(jax.value_and_grad(problem))

    def usable(x: np.ndarray) -> bool:
        value, grad = value_and_grad(x)
        solved = value - problem.minima[0] <= 1e-12 * max(1, abs(problem.minima[0]))
        moves = jnp.any(grad != 0) & jnp.all(jnp.isfinite(grad)) & jnp.isfinite(value)
        return bool(moves & ~solved)

    cast = ((factor, x.astype(settings.dtype)) for factor, x in starts(problem))
    return [(factor, x) for factor, x in cast if usable(x)]


def measure(prepared: Prepared, start: np.ndarray) -> tuple[Answer, float]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        run = functools.partial(prepared.run, start)
        seconds, raw = timed(run)
        if seconds < 0.5:
            seconds = min(seconds, *turns({"": run}, 2, warm_up=0)[""])
    return prepared.read(raw), seconds


def run_problem(problem: Problem, solvers: Sequence[Solver], settings: Settings) -> list[Result]:
    """All solvers from all usable starts; compiled side by side, then timed one after another."""
    judge = make_judge(problem, settings)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda s: s.prepare(problem, settings), solvers))
    results = []
    for factor, start in usable_starts(problem, settings):
        for solver, prepared in zip(solvers, compiled, strict=True):
            try:
                answer, seconds = measure(prepared, start)
            except Exception as error:  # a peer's exception is its failure, not ours
                answer = Answer(
                    np.full(len(start), np.nan), 0, 0, f"{type(error).__name__}: {error}"
                )
                seconds = math.nan
            value, outcome = judge(answer)
            counts = (answer.evaluations, answer.products)
            results.append(
                Result(solver, problem, factor, outcome, value, *counts, seconds, answer.ended)
            )
    return results


# -- tables and the plot


def by_solver(results: Iterable[Result]) -> dict[Solver, list[Result]]:
    groups: dict[Solver, list[Result]] = {}
    for result in results:
        groups.setdefault(result.solver, []).append(result)
    return groups


def ratio(
    mine: Sequence[Result], first: Sequence[Result], cost: Callable[[Result], float]
) -> float:
    """The geometric mean of the cost relative to another solver's, where both solve."""
    logs = [
        math.log(cost(a) / cost(b))
        for a, b in zip(mine, first, strict=True)
        if a.solved and b.solved
    ]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def solved_table(results: Sequence[Result]) -> str:
    groups = by_solver(results)
    factors = sorted({r.factor for r in results})
    head = ["method", "class", "solved", *OUTCOMES, *(f"from ×{f}" for f in factors)]
    head += ["evaluations", "products", "ms", "work ratio", "time ratio"]
    rows = []
    first: dict[str, list[Result]] = {}
    for solver, mine in groups.items():
        reference = first.setdefault(solver.family, mine)
        done = [r for r in mine if r.solved]
        row = [solver.name, solver.family, f"{len(done) / len(mine):.1%}"]
        row += [str(sum(r.outcome == outcome for r in mine)) for outcome in OUTCOMES]
        for factor in factors:
            group = [r for r in mine if r.factor == factor]
            row.append(f"{sum(r.solved for r in group)}/{len(group)}")
        row += (
            [
                f"{statistics.median(r.evaluations for r in done):.0f}",
                f"{statistics.median(r.products for r in done):.0f}",
                f"{1e3 * statistics.median(r.seconds for r in done):.2f}",
                f"{ratio(mine, reference, lambda r: r.work):.2f}",
                f"{ratio(mine, reference, lambda r: r.seconds):.2f}",
            ]
            if done
            else ["–"] * 5
        )
        rows.append(row)
    return table(head, rows, texts=2)


def lost(results: Sequence[Result]) -> str:
    """Where a method of ours does not solve what a peer of any class solves."""
    starts: dict[tuple[Problem, int], list[Result]] = {}
    for result in results:
        starts.setdefault((result.problem, result.factor), []).append(result)
    head = ["problem", "from", "method", "f − f*", "outcome", "evaluations", "ended", "solved by"]
    rows = []
    for (problem, factor), group in starts.items():
        peers = [r.solver.name for r in group if r.solved and not is_ours(r.solver)]
        for r in group:
            if is_ours(r.solver) and not r.solved and peers:
                row = [f"{problem.number} {problem.name}", f"×{factor}", r.solver.name]
                row += [f"{r.value - problem.minima[0]:.2e}", r.outcome, str(r.evaluations)]
                rows.append([*row, r.ended, ", ".join(peers)])
    return table(head, rows, texts=len(head))


def plot_profiles(results: Sequence[Result], path: Path) -> None:
    """Performance profiles (Dolan & Moré, Math. Program. 91:201, 2002), one panel a class."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    plt = importlib.import_module("matplotlib.pyplot")
    groups = by_solver(results)
    families = list(dict.fromkeys(solver.family for solver in groups))
    work = {s: np.array([r.work if r.solved else np.inf for r in rs]) for s, rs in groups.items()}
    best = np.min([*work.values()], axis=0)
    best = np.where(np.isfinite(best), best, 1)
    figure, panels = plt.subplots(
        1, len(families), figsize=(3.6 * len(families), 3.8), sharey=True, squeeze=False
    )
    styles = ["-", "--", "-.", ":"]
    for panel, family in zip(panels[0], families, strict=True):
        members = [s for s in groups if s.family == family]
        for i, solver in enumerate(members):
            ratios = np.sort(work[solver] / best)
            share = np.arange(1, len(ratios) + 1) / len(ratios)
            shade = 0.0 if is_ours(solver) else 0.55
            panel.step(
                [1, *ratios],
                [0, *share],
                where="post",
                color=str(shade),
                linestyle=styles[i % len(styles)],
                linewidth=1.8 if is_ours(solver) else 1.2,
                marker="" if i < len(styles) else "o",
                markevery=0.2,
                markersize=3,
                label=solver.name,
            )
        panel.set(xscale="log", xlim=(1, 100), ylim=(0, 1), title=family)
        panel.set_xlabel("evaluations and products\nrelative to the fewest of all")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="lower right")
    panels[0][0].set_ylabel("share of the starts solved")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(results: Sequence[Result], precision: str, seconds: float) -> str:
    count = len({(r.problem, r.factor) for r in results})
    return f"""# Minimisers on the Moré–Garbow–Hillstrom problems, {precision}

{count} starts, {seconds / 60:.1f} minutes on {jax.devices()[0].device_kind}; jax {jax.__version__}.
What the columns mean is told at the head of `benchmarks/solvers.py`.

{solved_table(results)}

## Where a method of ours does not solve what a peer of any class solves

{lost(results)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="minimisers on standard test problems")
    parser.add_argument("--quick", action="store_true", help="three problems, nothing written")
    parser.add_argument("--precision", choices=PRECISIONS, default="float64")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="", help="solvers whose name contains this")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", options.precision == "float64")
    settings = PRECISIONS[options.precision]
    solvers = [s for s in installed_solvers() if options.only in s.name]

    seconds = stopwatch()
    results: list[Result] = []
    for problem in PROBLEMS:
        if not options.quick or problem.number in QUICK:
            results += run_problem(problem, solvers, settings)
            jax.clear_caches()  # a program for every solver and problem adds up to gigabytes
            print(
                f"{seconds():6.0f} s  {problem.number:2} {problem.name}",
                file=sys.stderr,
                flush=True,
            )
    text = report(results, options.precision, seconds())
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"solvers_{options.precision}"
        (options.out / f"{name}.md").write_text(text, encoding="utf-8")
        plot_profiles(results, options.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
