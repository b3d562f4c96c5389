"""Many learning rates at once against one after another: 200 SGD steps of the lecture's MNIST net.

    python -m benchmarks.sweep [--data-dir DATA_DIR] [--rates 64] [--seeds 4] [--quick]

Without a folder that holds MNIST the images are noise of MNIST's size, which takes as long. Seconds
count all from the data on the device to the last cost on the host, compilation included; all take
turns in one process, and the better of two turns counts:

- sweep: `gradxform.lab.training.sweep`, which also evaluates each member once at the end; with the
  batches the same for all seeds, and with batches of each seed's own;
- compiled once: the same epoch, its rate an argument, jitted once and called for one member after
  another;
- compiled for each rate: what one writes first, a Python loop over minibatches around a jitted step
  of Optax's SGD. A few rates are measured and the others taken to last as long, seeds without a
  compilation of their own;
- PyTorch: the same loop by torch.optim.SGD, if it is installed, as far measured and multiplied.

The last table is of one sweep in blocks of different sizes, from which `_BLOCK` is chosen.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import stopwatch, table, timed
from gradxform.lab.data.sets import Dataset, Split, load
from gradxform.lab.experiment import methods as optimizers
from gradxform.lab.experiment.grid import Axis, Member, members
from gradxform.lab.tasks.task import Batch, Task, make_task, objective
from gradxform.lab.training.epoch import init_state, make_epoch, to_device
from gradxform.lab.training.outcomes import SweepResult
from gradxform.lab.training.programs import Vary
from gradxform.lab.training.sweep import sweep_on_task

STEPS, BATCH, HIDDEN, MEASURED, TURNS = 200, 128, 32, 3, 2
BLOCKS = (1, 4, 16, 32, 64, 128, 256)
TABLE = {"method": "sgd", "learning_rate": 0.1}


def examples(data_dir: Path | None, size: int) -> Dataset:
    """The first images of MNIST, or noise; few to evaluate on."""
    if data_dir is not None:
        data = load("mnist", data_dir)
        assert data.test is not None
        train, test = (Split(s.x[:n], s.y[:n]) for s, n in ((data.train, size), (data.test, 512)))
        return data._replace(train=train, test=test)
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        x = rng.integers(0, 256, (n, 28, 28), np.uint8)
        return Split(x, rng.integers(0, 10, n, np.int32))

    return Dataset("noise", split(size), split(512), 10, 255.0)


def swept(task: Task, runs: Sequence[Member], vary: Vary, block: int | None) -> SweepResult:
    options: dict[str, Any] = {"epochs": 1, "batch_size": BATCH, "vary": vary, "block_size": block}
    return sweep_on_task(task, {"sgd": TABLE}, runs, **options)


def compiled_once(task: Task, runs: Sequence[Member]) -> tuple[float, float]:
    """Seconds of all members one after another by one program, and of compiling it."""
    train = to_device(task.train)
    seconds = stopwatch()

    @jax.jit
    def run(rate: jax.Array, seed: jax.Array) -> jax.Array:
        tx = optimizers.build({**TABLE, "learning_rate": rate}, "sgd")
        init_key, key = jax.random.split(jax.random.key(seed))
        state = init_state(tx, task.init(init_key), key)
        return make_epoch(task, tx, batch_size=BATCH)(state, train)[1].cost

    program = run.lower(jnp.float32(0.1), jnp.int32(0)).compile()
    compiled = seconds()
    for member in runs:
        rate, seed = member.values["learning_rate"], member.seed
        float(program(jnp.float32(rate), jnp.int32(seed)))
    return seconds(), compiled


def compiled_for_each(task: Task, rates: Sequence[float], seeds: int) -> float:
    """Seconds of all members by a loop that compiles its step anew for each rate."""
    train = to_device(task.train)
    first = rest = 0.0
    for rate in rates[:MEASURED]:
        tx = optax.sgd(rate)

        @jax.jit
        def step(params: Any, state: Any, batch: Batch, tx: Any = tx) -> tuple[Any, Any, jax.Array]:
            fn = objective(task, batch, jax.random.key(0))
            value, grads = jax.value_and_grad(fn)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        for seed in range(2):  # the first compiles
            seconds = stopwatch()
            init_key, key = jax.random.split(jax.random.key(seed))
            params = task.init(init_key)
            state, value = tx.init(params), jnp.zeros(())
            order = jax.random.permutation(key, len(train.x))
            for i in range(STEPS):
                at = order[i * BATCH : (i + 1) * BATCH]
                batch = Batch(train.x[at], train.y[at], jnp.ones(len(at)))
                params, state, value = step(params, state, batch)
            float(value)
            elapsed = seconds()
            first, rest = (first + elapsed, rest) if seed == 0 else (first, rest + elapsed)
    measured = min(MEASURED, len(rates))
    return len(rates) * (first + (seeds - 1) * rest) / measured


def by_torch(task: Task, rates: Sequence[float], seeds: int) -> float:
    """Seconds of all members by PyTorch, one after another."""
    torch = importlib.import_module("torch")
    x = torch.tensor(task.train.x.reshape(len(task.train.x), -1))
    y = torch.tensor(task.train.y, dtype=torch.long)
    seconds = stopwatch()
    for rate in rates[:MEASURED]:
        net = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.Sigmoid(), torch.nn.Linear(HIDDEN, 10)
        )
        method = torch.optim.SGD(net.parameters(), lr=rate)
        order = torch.randperm(len(x))
        for i in range(STEPS):
            at = order[i * BATCH : (i + 1) * BATCH]
            method.zero_grad()
            torch.nn.functional.cross_entropy(net(x[at].float() / 255), y[at]).backward()
            method.step()
    return len(rates) * seeds * seconds() / min(MEASURED, len(rates))


def compare(task: Task, rates: Sequence[float], seeds: int, runs: Sequence[Member]) -> str:
    ways: dict[Vary, str] = {"initialisation": "batches shared", "both": "batches of each seed"}

    def turn() -> Iterator[tuple[float, str, float, float]]:
        for vary, words in ways.items():
            total, result = timed(lambda vary=vary: swept(task, runs, vary, None))
            yield total, f"sweep, {words}", result.compile_seconds, result.seconds
        total, compiled = compiled_once(task, runs)
        yield total, "compiled once", compiled, total - compiled

    turns = [list(turn()) for _ in range(TURNS)]
    rows: list[tuple[str, float, str, str]] = [
        (name, total, f"{compiled:.1f}", f"{trained:.1f}")
        for total, name, compiled, trained in (min(same) for same in zip(*turns, strict=True))
    ]
    total = compiled_for_each(task, rates, seeds)
    rows.append((f"compiled for each rate (from {MEASURED})", total, "", ""))
    if importlib.util.find_spec("torch") is not None:
        rows.append((f"PyTorch (from {MEASURED})", by_torch(task, rates, seeds), "", ""))
    else:
        print("PyTorch is not installed", file=sys.stderr)
    best = rows[0][1]
    return table(
        [f"{len(runs)} members", "seconds", "of the sweep", "compiling", "training"],
        ([n, f"{total:.1f}", f"{total / best:.1f}", *others] for n, total, *others in rows),
    )


def blocks(task: Task, runs: Sequence[Member]) -> str:
    rows = []
    for size in (size for size in BLOCKS if size <= max(len(runs), 1)):
        found = [swept(task, runs, vary, size) for vary in ("initialisation", "both")]
        times = [1e3 * result.seconds / len(runs) for result in found]
        compiled = [f"{result.compile_seconds:.1f}" for result in found]
        rows.append([str(size), *(f"{ms:.1f}" for ms in times), *compiled])
    head = ["block", "ms a member, shared", "own batches", "compiling s, shared", "own batches"]
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a sweep of learning rates against single runs")
    parser.add_argument("--data-dir", type=Path, help="MNIST's files; else noise of its size")
    parser.add_argument("--rates", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="few members, to see that it works")
    options = parser.parse_args(arguments)
    count, seeds = (4, 2) if options.quick else (options.rates, options.seeds)
    data = examples(options.data_dir, STEPS * BATCH)
    task = make_task(data, "keras_mlp", model_options={"hidden": HIDDEN})
    rates = Axis(low=1e-3, high=1.0, is_log=True, points=max(2, count)).values()
    runs = members({"sgd": TABLE}, {"learning_rate": Axis(rates)}, {}, seeds=seeds)
    load_before = os.getloadavg()[0]
    device = jax.devices()[0].device_kind
    print(
        f"{data.name}, {count} rates, {seeds} seeds, {STEPS} steps of {BATCH}; {device}, ", end=""
    )
    print(f"{os.cpu_count()} cores, load {load_before:.1f} before\n", flush=True)
    print(compare(task, rates, seeds, runs), flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f} here\n\n{blocks(task, runs)}")
    print(f"\nload {os.getloadavg()[0]:.1f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
