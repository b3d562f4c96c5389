"""The problems of ``benchmarks/fitting.py``, their judges, and the runs of the solvers on them."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import timed, turns
from benchmarks.fitting_solvers import Family, Inputs, Prepared, Residuals
from benchmarks.solvers import (
    MAX_EVALUATIONS,
    PRECISIONS,
    Answer,
    make_judge,
    usable_starts,
)
from testbed import boxes, nist
from testbed.problems import PROBLEMS, Problem

SOLVED = ("solved", "global", "listed")
QUICK_NIST, QUICK_PROBLEMS, QUICK_BOXES = ("MGH09",), (8,), (1,)


class Start(NamedTuple):
    """Where the solvers start, and what becomes of their answers."""

    problem: str
    label: str
    group: str  #: the column of the table that counts it
    inputs: Inputs
    judge: Callable[[Answer], tuple[float, str]]  #: digits or value, and the outcome


class Case(NamedTuple):
    """One function of residuals, which is compiled once, with all its starts."""

    name: str
    residuals: Residuals
    starts: Sequence[Start]
    points: list[np.ndarray] | None = None  #: outside the box, where the last run evaluated


class Result(NamedTuple):
    """One solver from one start."""

    solver: str
    start: Start
    answer: Answer
    found: float  #: digits or value
    outcome: str
    seconds: float
    outside: int  #: points outside the box

    @property
    def solved(self) -> bool:
        return self.outcome in SOLVED

    @property
    def is_ours(self) -> bool:
        return self.solver.startswith("gx.")


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """For all threads, other than ``jax.enable_x64``, because solvers are compiled in several."""
    before = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", name == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


# -- runs


def run_case(case: Case, families: Sequence[Family]) -> list[Result]:
    """All solvers from all starts; compiled side by side, then run one after another."""
    if not case.starts:
        return []
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.starts[0].inputs)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda f: f.prepare(case.residuals, like), families))
    results = []
    for family, prepared in zip(families, compiled, strict=True):
        for solver, options in family.variants.items():
            results += [_run_one(case, start, solver, prepared, options) for start in case.starts]
    return results


def _run_one(
    case: Case, start: Start, solver: str, prepared: Prepared, options: Mapping[str, Any]
) -> Result:
    def run() -> Any:
        return prepared.run(start.inputs, **options)

    points = [] if case.points is None else case.points
    points.clear()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            seconds, raw = timed(run)
            if case.points is None and seconds < 0.5:
                seconds = min(seconds, *turns({"": run}, 2, warm_up=0)[""])
        answer = prepared.read(raw)
    except Exception as error:  # a peer's exception is its failure, not ours
        answer, seconds = (
            Answer(np.full(len(start.inputs.x), np.nan), 0, 0, type(error).__name__),
            math.nan,
        )
    jax.effects_barrier()
    found, outcome = start.judge(answer)
    outcome = "failed" if answer.evaluations > MAX_EVALUATIONS else outcome
    outside = _outside(points, start.inputs.bounds)
    return Result(solver, start, answer, found, outcome, seconds, outside)


def _outside(points: Sequence[np.ndarray], bounds: tuple[np.ndarray, ...]) -> int:
    distinct = {x.tobytes(): x for x in points}.values()
    return sum(bool(np.any(x < bounds[0]) or np.any(x > bounds[1])) for x in distinct)


# -- the cases


def nist_cases(dtype: Any, digits: int, quick: bool) -> Iterator[Case]:
    for problem in nist.PROBLEMS:
        if quick and problem.name not in QUICK_NIST:
            continue

        def judge(answer: Answer, problem: nist.Problem = problem) -> tuple[float, str]:
            found = nist.correct_digits(problem, answer.params)
            return found, "solved" if found >= digits else "failed"

        starts = [
            Start(problem.name, group, group, Inputs(np.asarray(x, dtype)), judge)
            for group, x in zip(("far", "near"), problem.starts, strict=True)
        ]
        yield Case(problem.name, problem.residuals, starts)


def problem_cases(quick: bool) -> Iterator[Case]:
    settings = PRECISIONS["float64"]
    for problem in PROBLEMS:
        if not quick or problem.number in QUICK_PROBLEMS:
            judge, name = make_judge(problem, settings), f"{problem.number} {problem.name}"
            starts = [
                Start(name, f"×{factor}", f"×{factor}", Inputs(x), judge)
                for factor, x in usable_starts(problem, settings)
            ]
            yield Case(name, problem.residuals, starts)


def box_cases(quick: bool) -> Iterator[Case]:
    """A case for all problems with equally many parameters, so that fewer programs are compiled."""
    chosen = [p for p in PROBLEMS if not quick or p.number in QUICK_BOXES]
    for size in sorted({len(problem.start) for problem in chosen}):
        group = [problem for problem in chosen if len(problem.start) == size]
        points: list[np.ndarray] = []
        starts = [start for i, problem in enumerate(group) for start in _box_starts(problem, i)]
        yield Case(f"{size} parameters", _recorded(_one_of(group), points), starts, points)


def _box_starts(problem: Problem, place: int) -> Iterator[Start]:
    published = [box for box in boxes.GAY if box.problem is problem]
    for box in (*published, boxes.random_box(problem, 0)):

        def judge(answer: Answer, box: boxes.Box = box) -> tuple[float, str]:
            return boxes.judge(box, answer.params)

        name, group = f"{problem.number} {problem.name}", box.name.split()[0]
        for factor, x in boxes.usable_starts(box):
            bounds = box.lower, box.upper
            inputs = Inputs(x, bounds, (np.asarray(place), *bounds))
            yield Start(name, f"{group} ×{factor}", group, inputs, judge)


def _one_of(group: Sequence[Problem]) -> Residuals:
    """The residuals of the problem at a place in ``group``, with zeros for equally many of each."""
    start = jax.ShapeDtypeStruct((len(group[0].start),), float)
    most = max(jax.eval_shape(problem.residuals, start).size for problem in group)

    def padded(problem: Problem) -> Residuals:
        def residuals(x: jax.Array) -> jax.Array:
            r = problem.residuals(x)
            return jnp.pad(r, (0, most - r.size))

        return residuals

    branches = [padded(problem) for problem in group]
    return lambda x, place: jax.lax.switch(place, branches, x)


def _recorded(residuals: Residuals, points: list[np.ndarray]) -> Residuals:
    """The same function, which gets the bounds too and notes where it is evaluated outside."""

    def record(x: Any) -> None:
        points.append(np.asarray(x))

    def noting(x: jax.Array, place: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        # a call of the host takes longer than an evaluation
        is_outside = jnp.any((x < low) | (x > high))
        jax.lax.cond(is_outside, lambda: jax.debug.callback(record, x), lambda: None)
        return residuals(x, place)

    return noting
