"""The problems of ``benchmarks/fitting.py``, their judges, and the runs of the solvers on them."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.common import timed, turns
from benchmarks.fitting_solvers import Family, Prepared, Residuals
from benchmarks.solvers import (
    MAX_EVALUATIONS,
    PRECISIONS,
    Answer,
    make_judge,
    usable_starts,
)
from testbed import boxes, nist
from testbed.problems import PROBLEMS

SOLVED = ("solved", "global", "listed")
QUICK_NIST, QUICK_PROBLEMS, QUICK_BOXES = ("MGH09",), (8,), (1,)


class Start(NamedTuple):
    """Where the solvers start, and what becomes of their answers."""

    label: str
    group: str  #: the column of the table that counts it
    x: np.ndarray
    bounds: tuple[np.ndarray, ...]  #: the lower and the upper ones, or ()
    judge: Callable[[Answer], tuple[float, str]]  #: digits or value, and the outcome


class Case(NamedTuple):
    """One function of residuals with all its starts."""

    name: str
    residuals: Residuals
    starts: Sequence[Start]
    points: list[np.ndarray] | None = None  #: with bounds, where the last run evaluated


class Result(NamedTuple):
    """One solver from one start."""

    solver: str
    case: str
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
    first = case.starts[0]
    like = jax.ShapeDtypeStruct(first.x.shape, first.x.dtype)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(
            pool.map(lambda f: f.prepare(case.residuals, like, bool(first.bounds)), families)
        )
    results = []
    for family, prepared in zip(families, compiled, strict=True):
        for solver, options in family.variants.items():
            results += [_run_one(case, start, solver, prepared, options) for start in case.starts]
    return results


def _run_one(
    case: Case, start: Start, solver: str, prepared: Prepared, options: Mapping[str, Any]
) -> Result:
    def run() -> Any:
        return prepared.run(start.x, *start.bounds, **options)

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
            Answer(np.full(len(start.x), np.nan), 0, 0, type(error).__name__),
            math.nan,
        )
    jax.effects_barrier()
    found, outcome = start.judge(answer)
    outcome = "failed" if answer.evaluations > MAX_EVALUATIONS else outcome
    outside = _outside(points, start.bounds)
    return Result(solver, case.name, start, answer, found, outcome, seconds, outside)


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
            Start(group, group, np.asarray(x, dtype), (), judge)
            for group, x in zip(("far", "near"), problem.starts, strict=True)
        ]
        yield Case(problem.name, problem.residuals, starts)


def problem_cases(quick: bool) -> Iterator[Case]:
    settings = PRECISIONS["float64"]
    for problem in PROBLEMS:
        if not quick or problem.number in QUICK_PROBLEMS:
            judge = make_judge(problem, settings)
            starts = [
                Start(f"×{factor}", f"×{factor}", x, (), judge)
                for factor, x in usable_starts(problem, settings)
            ]
            yield Case(f"{problem.number} {problem.name}", problem.residuals, starts)


def box_cases(quick: bool) -> Iterator[Case]:
    published = {box.problem.number: box for box in boxes.GAY}
    for problem in PROBLEMS:
        if quick and problem.number not in QUICK_BOXES:
            continue
        points: list[np.ndarray] = []
        chosen = [published.get(problem.number), boxes.random_box(problem, 0)]
        starts = []
        for box in (box for box in chosen if box is not None):

            def judge(answer: Answer, box: boxes.Box = box) -> tuple[float, str]:
                return boxes.judge(box, answer.params)

            group = box.name.split()[0]
            starts += [
                Start(f"{group} ×{factor}", group, x, (box.lower, box.upper), judge)
                for factor, x in boxes.usable_starts(box)
            ]
        residuals = _recorded(problem.residuals, points)
        yield Case(f"{problem.number} {problem.name}", residuals, starts, points)


def _recorded(residuals: Residuals, points: list[np.ndarray]) -> Residuals:
    """The same function, which notes where it is evaluated."""

    def record(x: Any) -> None:
        points.append(np.asarray(x))

    def noting(x: jax.Array) -> jax.Array:
        jax.debug.callback(record, x)
        return residuals(x)

    return noting
