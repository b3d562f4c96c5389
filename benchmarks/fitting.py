"""Least squares and bounds, ours and the peers' alike.

    python -m benchmarks.fitting [--quick] [--only nist|problems|bounds|batch|wide]
        [--out benchmarks/results]

All solvers get the same residuals in JAX, exact derivatives and compiled functions. Each of them is
compiled once for a problem, or in boxes once for all problems with equally many parameters, with
zeros as further residuals of some. Libraries that are not installed are left out; nlls-gram is in
none of the environments of this repository.

**Solved** is judged in float64 at the point returned, whatever the solver says about it. NIST's
problems are solved when the worst parameter agrees with the certified one to 6 digits. Moré,
Garbow and Hillstrom's are solved when f(x) − f* ≤ 1e-8 max(|f*|, min(1, f₀ − f*)) for a minimum f*
that is known, where f₀ belongs to the standard start. *Global* is the lowest minimum, *listed*
another one that is known, *elsewhere* a local minimum or a plateau that nobody lists. Everything
else is *failed*: an exception, a point outside the box, or more than 10,000 evaluations.

**Tolerances.** ``gx.least_squares`` and SciPy's ``lm`` and ``trf`` run with their defaults. SciPy's
default of 1e-8 is too loose for six digits, so 1e-15 in all three tolerances stands beside it.
``gx.trust_region`` with ``gx.gauss_newton`` has the stop rule of ``gx.least_squares``. In boxes
``gx.minimize``, ``gx.trust_region``, L-BFGS-B, TNC and jaxopt are asked for a projected gradient of
1e-8, with no other test where that can be turned off.

**Evaluations.** Ours: those of ``Solution.evaluations``. SciPy: points at which it asks for
residuals or for value and gradient. Optimistix: its steps. jaxopt: the larger one of its two
counters. The median and the most are over the starts solved. The ratio is the geometric mean of the
ratios to the first solver, over the starts that both solve. **Outside** are the starts from which a
solver evaluated the objective at a point outside the box, by however little, and those points.

**Time** is of a warm solve, the least of three where it is below half a second; the median is over
the starts solved. SciPy's loop is in Python, so its time here is mostly that of calls. In boxes no
time is measured, because every evaluation is recorded there.

**Data sets in one program** has the problem, the reference and the columns of
``benchmarks/datasets.py``: fits of three parameters to 30 points each, under ``jax.vmap``.

**Many parameters** is a net with one hidden layer of tanh units, fitted to noise at 200 points. A
time is the median of three warm runs until ‖r‖ is a part of what it was at the start, with at most
50 updates. "First call" includes compiling. By hand is a Gauss–Newton method with J Jᵀ + λ, with λ
a tenth or ten times the last one. nlls-gram has its defaults. Optimistix has conjugate gradients on
the normal equations with a tolerance of 1e-3.
"""

import argparse
import collections
import functools
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gradxform as gx
from benchmarks import datasets, fitting_wide
from benchmarks.common import stopwatch, table, timed
from benchmarks.fitting_cases import (
    Case,
    Result,
    box_cases,
    nist_cases,
    precision,
    problem_cases,
    run_case,
)
from benchmarks.fitting_solvers import Family, bounded_fitters, default_fit, fitters
from benchmarks.solvers import OUTCOMES
from testbed import boxes, nist

DIGITS, DIGITS_FLOAT32 = 6, 3  #: that count as solved
TOL = 1e-8  #: of the projected gradient in boxes
LANES, WIDE = 2_000, (200, 100_000)


# -- tables


def _by_solver(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.solver, []).append(result)
    return groups


def _ratio(mine: Sequence[Result], first: Sequence[Result]) -> float:
    logs = [
        math.log(a.answer.evaluations / b.answer.evaluations)
        for a, b in zip(mine, first, strict=True)
        if a.solved and b.solved
    ]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def _ended(results: Sequence[Result]) -> str:
    counts = collections.Counter(r.answer.ended for r in results)
    return ", ".join(f"{count} {ended}" for ended, count in counts.most_common())


def summary(results: Sequence[Result], outcomes: Sequence[str] = ()) -> str:
    """A row for each solver."""
    groups = list(dict.fromkeys(r.start.group for r in results))
    boxed = any(r.start.inputs.bounds for r in results)
    head = ["solver", "solved", *outcomes, *groups, "evaluations", "most", "ratio"]
    head += ["outside: starts", "points", "ended"] if boxed else ["ms", "ended"]
    by_solver = _by_solver(results)
    first = next(iter(by_solver.values()), [])
    rows = []
    for name, mine in by_solver.items():
        done = [r for r in mine if r.solved]
        counts = [r.answer.evaluations for r in done]
        row = [name, f"{len(done)}/{len(mine)}"]
        row += [str(sum(r.outcome == outcome for r in mine)) for outcome in outcomes]
        for group in groups:
            some = [r for r in mine if r.start.group == group]
            row.append(f"{sum(r.solved for r in some)}/{len(some)}")
        row += [f"{statistics.median(counts):.0f}", str(max(counts))] if done else ["–", "–"]
        row.append(f"{_ratio(mine, first):.2f}")
        if boxed:
            row += [str(sum(r.outside > 0 for r in mine)), str(sum(r.outside for r in mine))]
        else:
            row.append(f"{1e3 * statistics.median(r.seconds for r in done):.2f}" if done else "–")
        rows.append([*row, _ended(mine)])
    return table(head, rows)


def lost(results: Sequence[Result], found: str) -> str:
    """Where a solver of ours does not solve what a peer solves."""
    starts: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        starts.setdefault((result.start.problem, result.start.label), []).append(result)
    rows = []
    for (case, label), group in starts.items():
        peers = [r.solver for r in group if r.solved and not r.is_ours]
        for r in group:
            if r.is_ours and not r.solved and peers:
                row = [case, label, r.solver, f"{r.found:.6g}", r.outcome]
                rows.append([*row, str(r.answer.evaluations), r.answer.ended, ", ".join(peers)])
    if not rows:
        return "Ours solve every start that a peer solves."
    head = ["problem", "start", "solver", found, "outcome", "evaluations", "ended", "solved by"]
    return table(head, rows, texts=len(head))


# -- the sections


def _progress(clock: Callable[[], float], name: str) -> None:
    print(f"{clock():6.0f} s  {name}", file=sys.stderr, flush=True)


def _run(cases: Iterator[Case], families: Sequence[Family]) -> list[Result]:
    clock = stopwatch()
    results: list[Result] = []
    for case in cases:
        results += run_case(case, families)
        jax.clear_caches()  # a program for every solver and problem adds up to gigabytes
        boxes.derivatives.cache_clear()
        _progress(clock, case.name)
    return results


def nist_section(quick: bool) -> str:
    with precision("float64"):
        results = _run(nist_cases(np.float64, DIGITS, quick), fitters())
        errors = _standard_errors(results)
    with precision("float32"):
        single = _run(nist_cases(np.float32, DIGITS_FLOAT32, quick), [default_fit()])
    solved = [r for r in single if r.solved]
    others = [r for r in single if not r.solved]
    rows = [[r.start.problem, r.start.label, f"{r.found:.1f}", r.answer.ended] for r in others]
    listed = table(["problem", "start", "digits", "ended"], rows) if rows else "none."
    return f"""## NIST's {len({r.start.problem for r in results})} problems

{summary(results)}

{lost(results, "digits")}

{errors}

In float32 `gx.least_squares` solves {len(solved)} of {len(single)} starts to {DIGITS_FLOAT32}
digits ({_ended(solved)}). The others:

{listed}
"""


def _standard_errors(results: Sequence[Result]) -> str:
    """How far ``gx.covariance`` agrees with NIST at our solutions."""
    problems = {problem.name: problem for problem in nist.PROBLEMS}
    mine = [r for r in results if r.solver == "gx.least_squares" and r.solved]
    digits = {}
    for r in mine:
        problem = problems[r.start.problem]
        variances = np.diag(gx.covariance(problem.residuals, jnp.asarray(r.answer.params)))
        certified = np.asarray(problem.deviations)
        error = np.max(np.abs(np.sqrt(variances) - certified) / certified)
        digits[r.start.problem, r.start.label] = -math.log10(max(error, 1e-11))
    few = {key: value for key, value in digits.items() if not value >= DIGITS}
    listed = ", ".join(f"{case} {start} {value:.1f}" for (case, start), value in few.items())
    return (
        f"The standard errors by `gx.covariance` agree with NIST's to {DIGITS} digits at "
        f"{len(digits) - len(few)} of the {len(digits)} solutions of `gx.least_squares`"
        f"{'; digits of the others: ' + listed if few else ''}."
    )


def problems_section(quick: bool) -> str:
    with precision("float64"):
        results = _run(problem_cases(quick), fitters())
    return f"""## Moré, Garbow and Hillstrom's problems

{summary(results, OUTCOMES)}

{lost(results, "f")}
"""


def bounds_section(quick: bool) -> str:
    with precision("float64"):
        results = _run(box_cases(quick), bounded_fitters(TOL))
    return f"""## Moré, Garbow and Hillstrom's problems in boxes

{summary(results, OUTCOMES)}

{lost(results, "f")}
"""


def _least_squares(t: jax.Array, y: jax.Array) -> datasets.Fit:
    args = {"t": t, "y": y}
    steps = datasets.MAX_STEPS
    found = gx.least_squares(datasets.residuals, datasets.start(t), args=args, max_steps=steps)
    return datasets.Fit(found.params, found.evaluations)


def batch_section(quick: bool) -> str:
    count, rounds = (100, 1) if quick else (LANES, 7)
    data = datasets.make_data(count)
    reference = datasets.reference(data)
    tables = [
        f"In {name}:\n\n{_batch_table(name, data, reference, rounds)}"
        for name in (("float32",) if quick else datasets.TOL)
    ]
    return f"## {count:,} data sets in one program\n\n" + "\n\n".join(tables) + "\n"


def _batch_table(
    name: str, data: datasets.Data, reference: tuple[np.ndarray, np.ndarray], rounds: int
) -> str:
    solvers: dict[str, datasets.Solve] = {"gx.least_squares": _least_squares}
    if importlib.util.find_spec("optimistix") is not None:
        tol = datasets.TOL[name]
        solvers["Optimistix LM"] = datasets.optimistix("LevenbergMarquardt", tol)
    with precision(name):
        arrays = [jnp.asarray(x, name) for x in (data.t, data.y)]
        fits = {s: jax.jit(jax.vmap(solve, (None, 0))) for s, solve in solvers.items()}
        compiled = {
            s: timed(lambda fit=fit: fit.lower(*arrays).compile()) for s, fit in fits.items()
        }
        calls = {s: functools.partial(fit, *arrays) for s, (_, fit) in compiled.items()}
        times = datasets.taken_turns(calls, rounds)
        rows = []
        for solver, call in calls.items():
            found = jax.tree.map(np.asarray, call())
            own, ratios = zip(*((a, a / b) for a, b in times[solver]), strict=True)
            row = [solver, *datasets.quality(found, data, *reference)]
            row += [f"{compiled[solver][0]:.1f}", f"{1e3 * statistics.median(own):.1f}"]
            rows.append([*row, f"{statistics.median(ratios):.2f}"])
    head = ["solver", "solved", "distance, 99 %", "evaluations: mean", "max"]
    return table([*head, "compile s", "ms", "ratio"], rows)


def wide_section(quick: bool) -> str:
    m, n = (20, 10_000) if quick else WIDE
    tables = [
        f"In {name}:\n\n{fitting_wide.compare(m, n, name, 1 if quick else 3)}"
        for name in (("float32",) if quick else fitting_wide.TARGETS)
    ]
    return f"## {m} residuals, {n:,} parameters\n\n" + "\n\n".join(tables) + "\n"


SECTIONS: dict[str, Callable[[bool], str]] = {
    "nist": nist_section,
    "problems": problems_section,
    "bounds": bounds_section,
    "batch": batch_section,
    "wide": wide_section,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="least squares and bounds")
    parser.add_argument("--quick", action="store_true", help="few problems, nothing written")
    parser.add_argument("--only", choices=tuple(SECTIONS), help="one section, nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    clock = stopwatch()
    chosen = [options.only] if options.only else list(SECTIONS)
    sections = []
    for name in chosen:
        sections.append(SECTIONS[name](options.quick))
        _progress(clock, f"section {name}")
    text = (
        f"# Least squares and bounds\n\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"{clock() / 60:.1f} minutes; jax {jax.__version__}. In float64 unless a sentence says "
        "otherwise. What the columns mean is told at the head of `benchmarks/fitting.py`.\n\n"
        + "\n".join(sections)
    )
    print(text)
    if not options.quick and not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fitting.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
