"""How soon gx.kronecker is where tuned first-order methods end: four small nets, by the clock.

    python -m benchmarks.nets [--quick] [--task transformer mlp cnn_256 cnn_1000]
                              [--data-dir DIR] [--runs 3] [--out benchmarks/results]

**Tasks.** The transformer predicts the next character of synthetic text: width 32, two layers, four
heads, 64 sequences of 32 characters a batch. The mlp is the lecture's Keras net, with batches of
1,000. The cnn has two stages of 5 x 5 convolutions with 4 and 8 channels, a rectified layer of 64
units and no dropout, with batches of 256 and of 1,000; MNIST's images are averaged over 2 x 2
pixels for it. The images are MNIST's with ``--data-dir``, else scikit-learn's digits.

**Methods.** Adam runs with a constant rate and with cosine decay to 0; on the transformer also with
decoupled weight decay of 0.1. Muon and SOAP run there with cosine decay. The rate of Muon's own
Adam is a fifth of Muon's. ``gx.kronecker`` runs with its defaults and nothing is tuned. Where its
batches are small it also runs "averaged", under ``gx.polyak_average`` with a decay of 0.98, and
"decayed": over the last quarter of its updates a factor on its steps falls from 1 to 0. Each other
method is tuned on seed 0 with half of the updates: three rates a factor of 3 apart, and further
ones, up to five in all, while the best is at the edge. The medians are over the runs on the seeds
from 1. All methods start at the same parameters and see the same batches on each seed.

**Loss.** The objective of record is the training loss on the first 5,000 training examples; for the
text on 512 sequences, which are 16,384 characters. A run's best loss is the lowest one seen, and
its time and its updates are those until then. Every first-order method makes the same number of
updates. ``gx.kronecker`` stops at the lowest loss of the others on that seed, after as many updates
or after 1.5 times their longest time. "Decayed" makes fewer updates, as many as fit into the time
of the others.

**Clock.** Parameters and state are donated. The clock starts when everything is compiled, counts
the steps, and stands still while the loss is evaluated. Ratios compare runs on the same seed, one
soon after the other. **Gradients a step** is the mean time of a step over that of one
value-and-gradient of the same batch, taken in turns with the steps from the 21st to the 40th.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradxform as gx
from benchmarks.common import shuffled, table, timed
from benchmarks.soap import soap
from gradxform.lab.data.sets import Dataset, load, synthetic_text
from gradxform.lab.tasks.task import Batch, Task, make_task, objective

UNSETTLED, TURNS = 20, 20  # steps whose time does not count, and those after them with a gradient
EVALUATIONS, TUNING_EVALUATIONS = 30, 5  # of the loss, in a run
TUNING = 0.5  # updates of a run of the grid, over those of the others
APART, RATES, MOST_RATES = 3.0, 3, 5  # of the grid: factor, rates at first and at most
PATIENCE = 1.5  # time of gx.kronecker at most, over the longest of the others
OURS = "gx.kronecker"
AVERAGED, DECAYED = f"{OURS}, averaged", f"{OURS}, decayed"

Make = Callable[[Any, Any], optax.GradientTransformation]  # of the rate, the number of updates


def decayed(rate: Any, updates: Any) -> optax.Schedule:
    """From ``rate`` to 0 along a cosine; Optax's own does not trace the number of updates."""
    return lambda count: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(count / updates, 1))) / 2


def cosine(make: Callable[..., optax.GradientTransformation], **options: Any) -> Make:
    return lambda rate, updates: make(decayed(rate, updates), **options)


def muon(rate: Any, updates: Any) -> optax.GradientTransformation:
    slower = decayed(rate / 5, updates)
    return optax.contrib.muon(decayed(rate, updates), adam_learning_rate=slower)


def kronecker_decayed(_: Any, updates: Any) -> optax.GradientTransformation:
    last_quarter = lambda count: jnp.clip(4 * (updates - count) / updates, 0, 1)
    return optax.chain(gx.kronecker(), optax.scale_by_schedule(last_quarter))


METHODS: dict[str, Make] = {
    "Adam": lambda rate, _: optax.adam(rate),
    "Adam, cosine": cosine(optax.adam),
    "Adam, cosine, weight decay": cosine(optax.adamw, weight_decay=0.1),
    "Muon, cosine": muon,
    "SOAP, cosine": cosine(soap),
    OURS: lambda rate, _: gx.kronecker(),
    AVERAGED: lambda rate, _: gx.polyak_average(gx.kronecker(), decay=0.98),
    DECAYED: kronecker_decayed,
}


class Case(NamedTuple):
    """A net on its data, and who takes part."""

    title: str
    task: Task
    batch_size: int
    updates: int  #: of the first-order methods
    evaluated: int  #: training examples that the loss is of
    rates: Mapping[str, float]  #: of each method but ours: the middle of its grid
    aims: Mapping[str, tuple[float | None, float]]  #: by the start of a name: updates, time
    decayed: int | None = None  #: updates of ours, decayed

    def ours(self) -> list[str]:
        return [OURS] if self.decayed is None else [OURS, AVERAGED, DECAYED]


def transformer(data_dir: Path | None) -> Case:
    options = {"width": 32, "layers": 2, "heads": 4}
    rates = {"Adam": 0.01, "Adam, cosine": 0.01, "Adam, cosine, weight decay": 0.01}
    return Case(
        title="Transformer on synthetic text",
        task=make_task(synthetic_text(length=32), "transformer", model_options=options),
        batch_size=64,
        updates=600,
        evaluated=512,
        rates={**rates, "Muon, cosine": 0.05, "SOAP, cosine": 0.01},
        aims={"Adam": (0.6, 0.9), "Muon": (None, 1.0), "SOAP": (None, 1.0)},
        decayed=470,
    )


def images(data_dir: Path | None) -> Dataset:
    return load("digits") if data_dir is None else load("mnist", data_dir)


def mlp(data_dir: Path | None) -> Case:
    data = images(data_dir)
    return Case(
        title=f"Keras's net on {data.name}",
        task=make_task(data, "keras_mlp"),
        batch_size=1000,
        updates=2000,
        evaluated=5000,
        rates={"Adam": 0.01, "Adam, cosine": 0.03},
        aims={"Adam": (None, 1.0)},
    )


def cnn(batch_size: int, updates: int, decayed: int | None, data_dir: Path | None) -> Case:
    data = images(data_dir)
    assert data.test is not None
    if data.train.x.shape[1] == 28:
        parts = (part._replace(x=halved(part.x)) for part in (data.train, data.test))
        data = data._replace(train=next(parts), test=next(parts))
    options = {"channels": [4, 8], "hidden": 64, "input_dropout": 0.0, "dropout": 0.0}
    return Case(
        title=f"CNN on {data.name}",
        task=make_task(data, "cnn", model_options=options),
        batch_size=batch_size,
        updates=updates,
        evaluated=5000,
        rates={"Adam": 0.003, "Adam, cosine": 0.01},
        aims={"Adam": (None, 1.0)},
        decayed=decayed,
    )


def halved(x: np.ndarray) -> np.ndarray:
    """Images of half the height and width: means of 2 x 2 pixels."""
    n, height, width = x.shape
    means = x.reshape(n, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
    return np.round(means).astype(x.dtype)


CASES: dict[str, Callable[[Path | None], Case]] = {
    "transformer": transformer,
    "mlp": mlp,
    "cnn_256": functools.partial(cnn, 256, 400, 165),
    "cnn_1000": functools.partial(cnn, 1000, 150, None),
}


# -- a run


class Program(NamedTuple):
    """A method on a task, compiled."""

    start: Callable[[Any], Any]
    step: Callable[..., Any]  #: of the rate, the updates, parameters and state, and the batch
    gradient: Callable[[Any, Batch], Any]
    loss: Callable[[Any], jax.Array]  #: of record


class Run(NamedTuple):
    """What is seen in one run, evaluation by evaluation."""

    updates: list[int]
    times: list[float]  #: seconds
    losses: list[float]
    gradients: float  #: time of a step over that of a gradient

    def best(self) -> tuple[int, float, float]:
        """Updates, time and loss at the lowest loss."""
        at = int(np.argmin(self.losses))
        return self.updates[at], self.times[at], self.losses[at]

    def until(self, bound: float) -> tuple[float, float]:
        """Updates and time until the loss is first seen at the bound or below, or infinity."""
        seen = zip(self.updates, self.times, self.losses, strict=True)
        return next(((n, at) for n, at, loss in seen if loss <= bound), (math.inf, math.inf))


def first_examples(task: Task, size: int) -> Batch:
    x, y = task.train.x[:size], task.train.y[:size]
    return Batch(jnp.asarray(x), jnp.asarray(y), jnp.ones(len(x)))


def batches(case: Case, seed: int) -> Iterable[Batch]:
    train = case.task.train
    for chosen in shuffled(len(train.x), case.batch_size, seed):
        x, y = jnp.asarray(train.x[chosen]), jnp.asarray(train.y[chosen])
        yield Batch(x, y, jnp.ones(len(chosen)))


def compiled(case: Case, make: Make) -> Program:
    key = jax.random.key(0)  # of the dropout, which no task here has
    value_fn = lambda batch: objective(case.task, batch, key)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(rate: jax.Array, updates: jax.Array, carry: Any, batch: Batch) -> Any:
        params, state = carry
        tx = optax.with_extra_args_support(make(rate, updates))
        fn = value_fn(batch)
        value, grads = jax.value_and_grad(fn)(params)
        change, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=fn)
        return optax.apply_updates(params, change), state

    examples = first_examples(case.task, min(case.evaluated, len(case.task.train.x)))
    parts = 8 if len(examples.x) % 8 == 0 else 1  # one after the other, to save memory
    parted = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), examples)

    @jax.jit
    def loss(params: Any, parted: Batch) -> jax.Array:
        return jnp.mean(jax.lax.map(lambda batch: value_fn(batch)(params), parted))

    program = Program(
        start=lambda params: jax.tree.map(jnp.copy, (params, make(1.0, 1).init(params))),
        step=step,
        gradient=jax.jit(lambda params, batch: jax.value_and_grad(value_fn(batch))(params)),
        loss=lambda params: loss(params, parted),
    )
    params = case.task.init(jax.random.key(0))
    carry, batch = program.start(params), next(iter(batches(case, 0)))
    for _ in range(2):  # the types of the first state can differ
        carry = jax.block_until_ready(step(jnp.float32(0.0), jnp.float32(1.0), carry, batch))
    jax.block_until_ready((program.gradient(params, batch), program.loss(params)))
    return program


def run(
    case: Case,
    program: Program,
    rate: float,
    seed: int,
    *,
    is_tuning: bool = False,
    planned: int | None = None,
    bound: float = -math.inf,
    limit: float = math.inf,
) -> Run:
    """Makes the planned updates; stops at a loss of ``bound`` or after ``limit`` seconds."""
    updates = math.ceil(TUNING * case.updates) if is_tuning else planned or case.updates
    every = max(updates // (TUNING_EVALUATIONS if is_tuning else EVALUATIONS), 5)
    step = functools.partial(program.step, jnp.float32(rate), jnp.float32(updates))
    carry, clock = program.start(case.task.init(jax.random.key(seed))), 0.0
    seen, steps, alone = Run([], [], [], math.nan), [], []
    for number, batch in enumerate(itertools.islice(batches(case, seed), updates), 1):
        took, carry = timed(functools.partial(step, carry, batch))
        clock += took
        if UNSETTLED < number <= UNSETTLED + TURNS and not is_tuning:
            steps.append(took)
            alone.append(timed(functools.partial(program.gradient, carry[0], batch))[0])
        if number % every == 0:
            params, state = carry
            loss = float(program.loss(gx.eval_params(state, params)))
            seen.updates.append(number)
            seen.times.append(clock)
            seen.losses.append(loss if math.isfinite(loss) else math.inf)
            is_over = seen.losses[-1] <= bound or clock > limit
            if is_over and number >= UNSETTLED + TURNS:
                break
    return seen._replace(gradients=sum(steps) / sum(alone)) if alone else seen


def tuned(case: Case, program: Program, middle: float, most: int) -> dict[float, float]:
    """The best loss of each rate on seed 0."""
    best: dict[float, float] = {}
    todo = [middle * APART**k for k in range(-(RATES // 2), RATES // 2 + 1)]
    if most < RATES:
        todo = [middle]
    while todo:
        rate = todo.pop(0)
        best[rate] = run(case, program, rate, 0, is_tuning=True).best()[2]
        if not todo and len(best) < most:
            chosen = min(best, key=best.__getitem__)
            outer = {min(best): chosen / APART, max(best): chosen * APART}
            todo = [outer[chosen]] if chosen in outer else []
    return best


# -- the races of a task


class Entry(NamedTuple):
    """A method with its rate, and its runs."""

    name: str
    rate: float
    tuned: Mapping[float, float]  #: the loss of each rate tried
    runs: list[Run]

    def median(self, of_run: Callable[[Run], float]) -> float:
        return statistics.median(map(of_run, self.runs))


def race(case: Case, runs: int, most_rates: int, patience: float) -> list[Entry]:
    """All methods of a task, ours last; seed by seed, so that neighbours in time are compared."""
    programs, others, ours = {}, [], []
    for name in (*case.rates, *case.ours()):
        programs[name] = compiled(case, METHODS[name])
        is_ours = name in case.ours()
        found = {} if is_ours else tuned(case, programs[name], case.rates[name], most_rates)
        rate = min(found, key=found.__getitem__) if found else math.nan
        (ours if is_ours else others).append(Entry(name, rate, found, []))
        print(f"{case.title}: {name} at {rate:.3g}", file=sys.stderr)
    for seed in range(1, runs + 1):
        for entry in others:
            entry.runs.append(run(case, programs[entry.name], entry.rate, seed))
        bound = min(entry.runs[-1].best()[2] for entry in others)
        limit = patience * max(entry.runs[-1].times[-1] for entry in others)
        for entry in ours:
            planned = case.decayed if entry.name == DECAYED else None
            options = {"planned": planned, "bound": bound, "limit": limit}
            entry.runs.append(run(case, programs[entry.name], 0.0, seed, **options))
    return [*others, *ours]


def entry_table(entries: Iterable[Entry]) -> str:
    head = ["method", "rate", "best loss", "least", "greatest", "updates", "seconds"]
    head += ["ms a step", "gradients a step"]

    def row(entry: Entry) -> list[str]:
        losses = [one.best()[2] for one in entry.runs]
        return [
            entry.name,
            f"{entry.rate:.3g}" if entry.tuned else "none",
            *(f"{f(losses):.4g}" for f in (statistics.median, min, max)),
            f"{entry.median(lambda one: one.best()[0]):.0f}",
            f"{entry.median(lambda one: one.best()[1]):.2f}",
            f"{entry.median(lambda one: 1e3 * one.times[-1] / one.updates[-1]):.2f}",
            f"{entry.median(lambda one: one.gradients):.2f}",
        ]

    return table(head, map(row, entries))


def ratio(ours: Entry, other: Entry, which: int, bounds: Sequence[float] | None = None) -> float:
    """Median over the seeds of our updates (0) or time (1) to a loss over the other's.

    The loss is the other's best one, or that of ``bounds``. Infinite if we do not get there, 0 if
    only the other does not.
    """
    bounds = bounds or [one.best()[2] for one in other.runs]
    found = []
    for mine, its, bound in zip(ours.runs, other.runs, bounds, strict=True):
        top, bottom = mine.until(bound)[which], its.until(bound)[which]
        found.append(top if math.isinf(top) else top / bottom)
    return statistics.median(found)


def ratio_table(case: Case, entries: Sequence[Entry]) -> str:
    others = [entry for entry in entries if entry.name not in case.ours()]
    adams = (entry for entry in others if entry.name.startswith("Adam"))
    adam = min(adams, key=lambda entry: entry.median(lambda one: one.best()[2]))
    bounds = [one.best()[2] for one in adam.runs]

    def cell(number: float | None) -> str:
        if number is None:
            return ""
        if number in (0, math.inf):
            return "not reached" if number else "the other does not reach it"
        return f"{number:.2f}"

    def row(ours: Entry, other: Entry) -> list[str]:
        is_aim = other is adam or not other.name.startswith("Adam")
        aim = case.aims[other.name.split(",")[0]] if is_aim else (None, None)
        values = ratio(ours, other, 0), aim[0], ratio(ours, other, 1), aim[1]
        return [ours.name, other.name, *map(cell, values), cell(ratio(ours, other, 1, bounds))]

    head = ["ours", "over", "updates", "aim: at most", "time", "aim: at most"]
    pairs = itertools.product(entries[len(others) :], others)
    rows = itertools.starmap(row, pairs)
    return table([*head, f"time to the loss of {adam.name}"], rows)


def section(case: Case, entries: Sequence[Entry]) -> str:
    tried = (
        f"- {entry.name}: "
        + "; ".join(f"{rate:.3g}: {loss:.4g}" for rate, loss in sorted(entry.tuned.items()))
        for entry in entries
        if entry.tuned
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(case.task.init(jax.random.key(0))))
    lines = [
        f"## {case.title}, batch {case.batch_size:,}",
        f"{parameters:,} parameters; {case.updates} updates.",
        entry_table(entries),
        "To the best loss of each method, ours over that method:",
        ratio_table(case, entries),
        "Rates tried on seed 0, with their best loss:",
        "\n".join(tried),
    ]
    return "\n\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="gx.kronecker against tuned first-order methods")
    parser.add_argument("--quick", action="store_true", help="a few updates, nothing written")
    parser.add_argument("--task", nargs="+", choices=CASES, help="these alone, nothing written")
    parser.add_argument("--data-dir", type=Path, help="MNIST's files; else scikit-learn's digits")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    settings = (1, 1, math.inf) if options.quick else (options.runs, MOST_RATES, PATIENCE)
    text = (
        "# gx.kronecker against tuned first-order methods on small nets\n\n"
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; medians of {settings[0]} runs. "
        "What the columns mean is at the head of `benchmarks/nets.py`.\n"
    )
    for name in options.task or CASES:
        case = CASES[name](options.data_dir)
        case = case._replace(batch_size=min(case.batch_size, len(case.task.train.x) // 2))
        if options.quick:
            case = case._replace(updates=45, decayed=case.decayed and 45)
        text += "\n" + section(case, race(case, *settings)) + "\n"
    print(text)
    if not options.quick and options.task is None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "nets.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
