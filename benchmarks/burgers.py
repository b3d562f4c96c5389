"""A physics-informed net for Burgers' equation: seconds to an error of the solution.

    python -m benchmarks.burgers [--methods lm,bfgs,lbfgs,adam,soap] [--seeds 3] [--seconds 60]
        [--viscosity 0.0031831] [--points 3072] [--hidden 12,12,12,12] [--out FILE] [--append]

All methods minimise the same objective, half the mean squared residual at the same points, of the
same net from the same starts, in float64; see ``gradxform/lab/tasks/physics.py`` and
``configs/burgers.toml``. The error is the relative L2 error of the solution on a grid of 100 × 256
points, against the integrals of Cole and Hopf.

**Time** is that of the updates only, without compiling, and without the evaluations of the error
after each call of the compiled loop. A call makes so many updates that it takes some hundredths of
a second. A method stops at the smallest target or after ``--seconds``; the targets it misses count
as infinite. The tables hold medians over the seeds, each of which is another start of the net.

**The rivals.** Adam and SOAP have the best of three rates, by the least error of seed 0 in a third
of the time. They have a cosine schedule to zero over all their updates, whose number is that of the
time limit. L-BFGS and BFGS have no rate. SOAP is ``benchmarks/soap.py``.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradxform as gx
from benchmarks.common import stopwatch, table, timed
from benchmarks.soap import soap
from gradxform.lab.data.equations import burgers_points
from gradxform.lab.data.sets import load
from gradxform.lab.tasks.physics import VISCOSITY, physics_task
from gradxform.lab.tasks.task import Batch, Task, objective
from gradxform.lab.training.epoch import evaluate, to_device

TARGETS = (1e-2, 1e-3, 1e-4)
LONGEST = 1000  #: updates in a call


class Method(NamedTuple):
    """A method; the rates of one with a schedule are tuned."""

    words: str
    make: Callable[[float, int], Any]  #: (rate, updates) -> transformation
    call: float  #: seconds that one call should take
    rates: tuple[float, ...] = (0.0,)


def _cosine(rate: float, updates: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(rate, updates)


METHODS = {
    "lm": Method("gx.levenberg_marquardt()", lambda *_: gx.levenberg_marquardt(), 0.01),
    "gn": Method(
        "gx.trust_region, Gauss–Newton",
        lambda *_: gx.trust_region(curvature=gx.gauss_newton()),
        0.01,
    ),
    "bfgs": Method("gx.bfgs()", lambda *_: gx.bfgs(), 0.1),
    "lbfgs": Method("gx.lbfgs()", lambda *_: gx.lbfgs(), 0.1),
    "lbfgs50": Method("gx.lbfgs(memory_size=50)", lambda *_: gx.lbfgs(memory_size=50), 0.1),
    "adam": Method(
        "Optax Adam, cosine schedule",
        lambda rate, updates: optax.adam(_cosine(rate, updates)),
        0.1,
        (1e-3, 3e-3, 1e-2),
    ),
    "soap": Method(
        "SOAP, cosine schedule",
        lambda rate, updates: soap(_cosine(rate, updates), precondition_frequency=2),
        0.1,
        (1e-3, 3e-3, 1e-2),
    ),
}


class Run(NamedTuple):
    """One run of one method."""

    reached: dict[float, float]  #: seconds, by target; infinite if missed
    least: float  #: the least error
    updates: int
    seconds: float


def _problem(task: Task) -> tuple[Any, Any, Callable[[Any], jax.Array]]:
    """The objective for gradients, the one for curvature, and the error of parameters."""
    x, y = (jnp.asarray(part) for part in (task.train.x, task.train.y))
    batch, key = Batch(x, y, jnp.ones(len(x))), jax.random.key(0)
    plain, curved = (objective(task, batch, key, for_curvature=c) for c in (False, True))
    assert task.test is not None
    test = to_device(task.test)
    return plain, curved, jax.jit(lambda params: evaluate(task, params, test)["relative_error"])


def _steps(task: Task, tx: Any) -> Callable[..., Any]:
    """So many updates as one compiled program."""
    tx = optax.with_extra_args_support(tx)
    plain, curved, _ = _problem(task)

    def one(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        value, grads = jax.value_and_grad(plain)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=curved)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def steps(params: Any, state: Any, count: jax.Array) -> tuple[Any, Any]:
        return jax.lax.fori_loop(0, count, lambda _, carry: one(carry), (params, state))

    return steps


def run(task: Task, method: Method, rate: float, seed: int, seconds: float) -> Run:
    """One run until the smallest target or the end of the time."""
    params = task.init(jax.random.key(seed))
    *_, error = _problem(task)
    # a first program measures how long an update takes, and how many the schedule will see
    tx = optax.with_extra_args_support(method.make(rate, 10**6))
    state = tx.init(params)
    steps = _steps(task, tx)
    jax.block_until_ready(steps(params, state, 2))
    each = min(timed(lambda: steps(params, state, 5))[0] for _ in range(3)) / 5
    if len(method.rates) > 1:
        tx = optax.with_extra_args_support(method.make(rate, int(seconds / each)))
        state = tx.init(params)
        steps = _steps(task, tx)
        jax.block_until_ready(steps(params, state, 2))
    count = max(1, min(LONGEST, round(method.call / each)))
    reached, least, updates, spent = dict.fromkeys(TARGETS, math.inf), math.inf, 0, 0.0
    while spent < seconds and reached[TARGETS[-1]] == math.inf:
        elapsed, (params, state) = timed(functools.partial(steps, params, state, count))
        spent, updates = spent + elapsed, updates + count
        found = float(error(gx.eval_params(state, params)))
        least = min(least, found) if math.isfinite(found) else least
        reached = {t: min(at, spent) if found <= t else at for t, at in reached.items()}
        if not math.isfinite(found):
            break
    return Run(reached, least, updates, spent)


def _best_rate(task: Task, method: Method, seconds: float) -> float:
    """The rate with the least error of seed 0."""
    if len(method.rates) == 1:
        return method.rates[0]
    return min(method.rates, key=lambda rate: run(task, method, rate, 0, seconds).least)


def _seconds(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    shown = f"{middle:.1f}" if math.isfinite(middle) else "–"
    return f"{shown} ({sum(map(math.isfinite, values))} of {len(values)})"


def _row(method: Method, rate: float, runs: Sequence[Run]) -> list[str]:
    words = method.words + (f", rate {rate:g}" if rate else "")
    reached = [_seconds([r.reached[target] for r in runs]) for target in TARGETS]
    each = statistics.median(1e3 * r.seconds / r.updates for r in runs)
    least = statistics.median(r.least for r in runs)
    return [words, *reached, f"{least:.1e}", f"{each:.2f}", f"{runs[0].updates:,}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="lm,bfgs,lbfgs,adam,soap")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--viscosity", type=float, default=VISCOSITY)
    parser.add_argument("--points", type=int, default=3072)
    parser.add_argument("--hidden", default="12,12,12,12")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--append", action="store_true", help="add rows to the table in --out")
    options = parser.parse_args(arguments)
    hidden = tuple(map(int, options.hidden.split(",")))
    clock = stopwatch()
    with jax.enable_x64(True):
        data = load("burgers")._replace(test=burgers_points((100, 256))[1])
        task = physics_task(data, hidden=hidden, points=options.points, viscosity=options.viscosity)
        rows = []
        for name in options.methods.split(","):
            method = METHODS[name]
            rate, runs = _best_rate(task, method, options.seconds / 3), []
            for seed in range(options.seeds):
                runs.append(run(task, method, rate, seed, options.seconds))
                print(f"{clock():5.0f} s  {name} {seed} {runs[-1]}", file=sys.stderr, flush=True)
            rows.append(_row(method, rate, runs))
            jax.clear_caches()
    heads = [f"to {target:.0e}, s" for target in TARGETS]
    head = ["method", *heads, "least error", "ms an update", "updates"]
    text = f"""# Burgers' equation by a physics-informed net

ν = {options.viscosity:.5g}, {options.points} points, tanh layers of {options.hidden} units,
float64, {options.seeds} seeds, at most {options.seconds:g} s a run. In brackets: how many seeds
reach the target. JAX {jax.__version__}, {jax.devices()[0].device_kind}.

{table(head, rows)}
"""
    print(text)
    if options.append:  # the file ends with the table
        text = options.out.read_text(encoding="utf-8") + table(head, rows).split("\n", 2)[2] + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
