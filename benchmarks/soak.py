"""A million updates of every method, and a thousand solves of objectives that are used once.

    python -m benchmarks.soak [--quick] [--only updates|solves] [--steps 1000000] [--solves 1000]
                              [--out benchmarks/results]

**Updates** (``soak.md``). The objective has three
parameters and a minimum that jumps every thousand updates, so that no method comes to rest, and
memories, brackets and radii are of an objective that is no more. The updates run in compiled scans,
ten in a row, parameters and state donated from one to the next.

*Finite*: all parameters after all updates, and at the end the parameters to evaluate. *Mean value*:
of the objective over the last scan; its minimum is 0, and a jump costs about 5. AdaDelta with so
large an ε runs away here, as Optax's does: its steps follow the gradients that they enlarge.
*Memory*: by how much the process grew between the end of the second scan and the end of the last.
*Counters*: those of the state at the end; one called ``count`` must be the number of updates. The
searches meet few points as good as those before a jump, and begin anew again and again: what they
go through here is their resets.

**Solves** (``fresh_solves.md``). Each row calls ``gx.minimize`` again and again, every time with a
function that did not exist before, so every call compiles. *Memory*: by how much the process grew
from the end of the first solve to the end of the last. *Alive*: how many of the functions the
process still holds at the end; a program and its data should go with the function. *Converged*:
how many solves found the minimum.
"""

import argparse
import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradxform as gx
from benchmarks.common import resident_mebibytes, stopwatch, table
from gradxform.lab.experiment.catalogue import methods

CHUNKS, JUMP = 10, 1000
RATE = 0.05
#: with other arguments than the defaults, or several times
CHOSEN: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "delta_bar_delta": lambda: gx.delta_bar_delta(RATE, kappa=0.01, phi=0.1, theta=0.7),
    "rmsprop_momentum": lambda: gx.rmsprop(RATE, momentum=0.9),
    "rmsprop_nesterov": lambda: gx.rmsprop(RATE, momentum=0.9, nesterov=True),
    "adadelta": lambda: gx.adadelta(eps=1e-2),
    "adam": lambda: gx.adam(RATE),
    "coordinate_descent_random": lambda: gx.coordinate_descent("random"),
    "coordinate_descent_greedy_leaf": lambda: gx.coordinate_descent("greedy", "leaf"),
    "lbfgs": lambda: gx.lbfgs(2, ravel=False),
    "nonlinear_cg": lambda: gx.nonlinear_cg("hager_zhang", ravel=False),
    "newton": lambda: gx.newton(0.5),
    "newton_cg": lambda: gx.newton_cg(0.5, forcing="fixed", tol=0.3),
    "trust_region": lambda: gx.trust_region(max_radius=5.0),
    "trust_region_steihaug": lambda: gx.trust_region("steihaug", tol=0.1),
    "hessian_free": lambda: gx.hessian_free(curvature=gx.hessian(), damping=1.0, iterates=3),
    "polyak_average": lambda: gx.polyak_average(gx.nesterov(RATE), decay=0.9, start=1),
}


def every_method() -> dict[str, Callable[[], optax.GradientTransformationExtraArgs]]:
    """The public methods, by name: with the arguments chosen above, or the defaults and RATE."""
    found = {}
    for signature in methods("gradxform"):
        name = signature.name.removeprefix("gradxform.")
        required = {key for key, argument in signature.arguments.items() if argument.required}
        if required <= {"learning_rate"} and not name.startswith("scale_by_"):
            found[name] = functools.partial(getattr(gx, name), **dict.fromkeys(required, RATE))
    return found | CHOSEN


METHODS = every_method()
WEIGHTS = {"w": jnp.asarray([1.0, 4.0]), "b": jnp.asarray(2.0)}
PHASES = {"w": jnp.asarray([0.3, 1.1]), "b": jnp.asarray(2.0)}


class Run(NamedTuple):
    """What the scans hand on."""

    params: Any
    state: Any
    step: jax.Array
    finite: jax.Array


def objective(params: Any, step: jax.Array) -> jax.Array:
    """Convex, with its minimum at another place after every so many steps."""
    place = (step // JUMP).astype(jnp.float32)

    def part(x: jax.Array, weight: jax.Array, phase: jax.Array) -> jax.Array:
        away = x - jnp.sin(phase + place)
        return jnp.sum(weight * away**2 + 0.05 * away**4)

    return sum(jax.tree.leaves(jax.tree.map(part, params, WEIGHTS, PHASES)), start=jnp.zeros(()))


def all_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def scan_of(
    tx: optax.GradientTransformationExtraArgs, steps: int
) -> tuple[Run, Callable[[Run], tuple[Run, jax.Array]]]:
    """The first state, and the function that goes on by so many updates."""

    def body(run: Run, _: None) -> tuple[Run, jax.Array]:
        def value_fn(params: Any) -> jax.Array:
            return objective(params, run.step)

        value, grads = jax.value_and_grad(value_fn)(run.params)
        updates, state = tx.update(
            grads, run.state, run.params, value=value, grad=grads, value_fn=value_fn
        )
        params = jax.tree.map(jnp.add, run.params, updates)
        theta = gx.eval_params(state, params)
        return Run(params, state, run.step + 1, run.finite & all_finite(params)), value_fn(theta)

    def scan(run: Run) -> tuple[Run, jax.Array]:
        run, values = jax.lax.scan(body, run, length=steps)
        return run, jnp.mean(values)

    params = jax.tree.map(jnp.zeros_like, WEIGHTS)
    start = Run(params, tx.init(params), jnp.array(0, jnp.int32), jnp.array(True))
    return start, jax.jit(scan, donate_argnums=0)


def counters(state: Any) -> dict[str, int]:
    """The counts of the state, and those of its diagnostics, by name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [getattr(key, "name", "") for key in path]
        if jnp.issubdtype(leaf.dtype, jnp.integer) and ("info" in names or names[-1] == "count"):
            found[names[-1]] = int(leaf)
    return found


def soak(name: str, steps: int) -> list[str]:
    """One row of the table."""
    run, scan = scan_of(METHODS[name](), steps // CHUNKS)
    memory, value, clock = 0.0, jnp.nan, stopwatch()
    for chunk in range(CHUNKS):
        run, value = jax.block_until_ready(scan(run))
        if chunk == 1:
            memory = resident_mebibytes()
    grown, seconds = resident_mebibytes() - memory, clock()
    counts = counters(run.state)
    made = steps // CHUNKS * CHUNKS
    assert counts.get("count", made) == made
    assert min(counts.values(), default=0) >= 0
    finite = run.finite & all_finite(gx.eval_params(run.state, run.params))
    return [
        name,
        "yes" if finite else "**no**",
        f"{float(value):.2g}",
        f"{grown:+.1f}",
        f"{1e6 * seconds / made:.1f}",
        ", ".join(f"{key} {count:,}" for key, count in counts.items()),
    ]


def over_new_data(size: int) -> Callable[[int], Callable[[jax.Array], jax.Array]]:
    """Objectives of three parameters, each with an array of its own of this many entries."""

    def build(i: int) -> Callable[[jax.Array], jax.Array]:
        data = jnp.full(size, i / 1000)
        return lambda x: jnp.sum((x - data[:3]) ** 2) + 1e-6 * jnp.mean(data) * jnp.sum(x)

    return build


def with_new_constant(i: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.sum((x - i / 1000) ** 2)


SOLVES = {
    "a new array of 3 entries, sgd": (over_new_data(3), lambda: gx.sgd(0.3)),
    "a new array of 1 MB, sgd": (over_new_data(250_000), lambda: gx.sgd(0.3)),
    "a new Python number, sgd": (with_new_constant, lambda: gx.sgd(0.3)),
    "a new array of 3 entries, bfgs": (over_new_data(3), gx.bfgs),
}


def fresh_solves(name: str, solves: int) -> list[str]:
    """One row of the table of solves."""
    build, method = SOLVES[name]
    objectives, converged, memory, clock = [], 0, 0.0, stopwatch()
    for i in range(solves):
        fn = build(i)
        objectives.append(weakref.ref(fn))
        solution = gx.minimize(fn, jnp.zeros(3), method(), tol=1e-4)
        converged += int(solution.status) == gx.Status.converged
        del fn, solution
        if i == 0:
            memory = resident_mebibytes()
    seconds, grown = clock(), resident_mebibytes() - memory
    gc.collect()
    alive = sum(objective() is not None for objective in objectives)
    return [
        name,
        f"{solves:,}",
        f"{grown:+.0f}",
        f"{alive}",
        f"{converged:,}",
        f"{1000 * seconds / solves:.0f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="long runs of updates and of solves")
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that it works")
    parser.add_argument("--only", choices=("updates", "solves"), help="one of the two tables")
    parser.add_argument("--steps", type=int, default=1_000_000, help="updates of each method")
    parser.add_argument("--solves", type=int, default=1_000, help="solves of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, float32, jax "
    machine += f"{jax.__version__}. What the columns mean is told at the head of "
    machine += "`benchmarks/soak.py`; the times are of a busy machine."

    def write(file: str, title: str, head: Sequence[str], rows: list[list[str]]) -> None:
        if not options.quick:
            options.out.mkdir(parents=True, exist_ok=True)
            text = f"# {title}\n\n{machine}\n\n{table(head, rows)}\n"
            (options.out / file).write_text(text, encoding="utf-8")

    sound = True
    if options.only != "solves":
        steps = 5_000 if options.quick else options.steps
        head = ["method", "finite", "mean value", "memory MiB", "µs an update", "counters"]
        rows = printed(soak(name, steps) for name in METHODS)
        write("soak.md", f"{steps:,} updates of every method", head, rows)
        sound &= all(row[1] == "yes" for row in rows)
    if options.only != "updates":
        solves = 5 if options.quick else options.solves
        head = ["objective and method", "solves", "memory MiB", "alive", "converged", "ms a solve"]
        rows = printed(fresh_solves(name, solves) for name in SOLVES)
        write("fresh_solves.md", f"{solves:,} solves of objectives used once", head, rows)
        sound &= all(row[3] == "0" and row[4] == row[1] for row in rows)
    return 0 if sound else 1


def printed(rows: Iterable[list[str]]) -> list[list[str]]:
    """The rows, each printed when it is there."""
    made = []
    for row in rows:
        print(*row, sep="  ", flush=True)
        made.append(row)
    return made


if __name__ == "__main__":
    sys.exit(main())
