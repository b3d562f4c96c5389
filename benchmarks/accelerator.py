"""What the library does with an accelerator: one command, one page of tables.

    python -m benchmarks.accelerator [--quick] [--data-dir DATA_DIR] [--out benchmarks/results]

The sizes are those of the device that JAX finds: large ones for CUDA and TPU, small ones for a
CPU, where the page shows that it works and not what it is for. Everything is in float32, the matrix
products in JAX's default precision, which on accelerators is less.

**First-order updates.** A step is ``update`` and ``apply_updates`` with parameters and state
donated, of one large leaf and of the same floats in many; a time is the median of several turns of
ten steps, ours and Optax's in turns. The floor is the bytes that a step must read (gradient,
parameters, state) and write (the last two), over the bandwidth of ``x + 1`` in place, measured
between them. No step is faster, unless all of it stays in a cache.

**Curvature products**, each after the first, in gradients of the same batch: in time, and in the
operations of the matrix products that JAX is asked for.

**The sweep** trains a net of 784-32-10 at so many learning rates at once, on noise of MNIST's size.
Compilation is apart.

**The deep autoencoder** is trained on MNIST's images with ``--data-dir``, else on scikit-learn's
digits, by the lab: mean squared error of an image of the training part, after so many seconds of
training. Neither compilation nor evaluation counts. The batches: Adam's 100, Hessian-free's 1,000
with curvature on a quarter (500 of the digits, which are few), L-BFGS's all.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradxform as gx
from benchmarks import sweep
from benchmarks.common import repeated, table, timed, turns
from benchmarks.curvature import cost_of, dot_operations
from gradxform.lab.data.sets import load
from gradxform.lab.experiment import methods as optimizers
from gradxform.lab.experiment.grid import Axis, members
from gradxform.lab.tasks import models
from gradxform.lab.tasks.task import make_task
from gradxform.lab.training.race import race_on_task
from gradxform.lab.training.sweep import sweep_on_task

TURNS, STEPS = 5, 10  #: of an update: the median is over turns of so many steps
RATE = 1e-3


class Sizes(NamedTuple):
    floats: int  #: of the parameters that are updated
    leaves: int  #: that they are cut into
    mlp: tuple[int, ...]  #: hidden units
    mlp_batch: int
    transformer: Mapping[str, int]  #: options of the model
    text: tuple[int, int]  #: sequences of a batch and their length
    members: tuple[int, ...]
    member_steps: int
    widths: tuple[int, ...]  #: of the autoencoder
    seconds: tuple[float, ...]  #: after which its loss is told
    rates: tuple[float, ...]  #: of Adam


ACCELERATOR = Sizes(
    floats=2**27,
    leaves=1000,
    mlp=(4096, 4096, 4096),
    mlp_batch=4096,
    transformer={"width": 512, "layers": 6, "heads": 8},
    text=(32, 256),
    members=(1, 64, 512, 4096),
    member_steps=200,
    widths=(1000, 500, 250, 30),
    seconds=(10, 30, 100),
    rates=(3e-4, 1e-3, 3e-3),
)
CPU = Sizes(
    floats=2**22,
    leaves=1000,
    mlp=(256, 256),
    mlp_batch=512,
    transformer={"width": 64, "layers": 2, "heads": 4},
    text=(16, 64),
    members=(1, 64, 512, 4096),
    member_steps=5,
    widths=(250, 100, 30),
    seconds=(2, 5),
    rates=(3e-3,),
)
QUICK = CPU._replace(
    floats=2**20,
    leaves=4,
    mlp=(32,),
    mlp_batch=64,
    transformer={"width": 16, "layers": 1, "heads": 2},
    text=(4, 16),
    members=(8,),
    member_steps=2,
    widths=(5,),
    seconds=(0.1, 0.2),
)


# -- first-order updates


UPDATES: Mapping[str, tuple[optax.GradientTransformation, optax.GradientTransformation]] = {
    "sgd": (gx.sgd(RATE), optax.sgd(RATE)),
    "momentum": (gx.momentum(RATE), optax.sgd(RATE, momentum=0.9)),
    "rmsprop": (gx.rmsprop(RATE), optax.rmsprop(RATE, decay=0.9, eps=1e-6)),
    "adam": (gx.adam(RATE), optax.adam(RATE)),
}


def cut(floats: int, leaves: int) -> list[jax.Array]:
    return [jnp.full(floats // leaves, 0.01 * (1 + i % 7)) for i in range(leaves)]


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def stepping(
    tx: optax.GradientTransformation, floats: int, leaves: int
) -> tuple[float, int, Callable[[], Any]]:
    """Seconds of compiling a step, the bytes it moves, and a call that makes :data:`STEPS`."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = cut(floats, leaves), cut(floats, leaves)
    state = jax.jit(tx.init)(params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower
    compiling, compiled = timed(lambda: lowered(params, state, grads).compile())
    moved = bytes_of(grads) + 2 * bytes_of((params, state))
    return compiling, moved, repeated(lambda carry: compiled(*carry, grads), (params, state), STEPS)


def updates_table(sizes: Sizes) -> str:
    rows = []
    x = jnp.zeros(4 * sizes.floats)
    copied = 2 * STEPS * x.nbytes  # read and written by adding 1 in place
    copy = repeated(jax.jit(lambda x: x + 1, donate_argnums=0), x, STEPS)
    for leaves in (1, sizes.leaves):
        for name, pair in UPDATES.items():
            (compiling, moved, ours), (compiling_optax, _, theirs) = (
                stepping(tx, sizes.floats, leaves) for tx in pair
            )
            times = turns({"ours": ours, "Optax": theirs, "copy": copy}, TURNS)
            time_ours, time_optax, time_copy = map(statistics.median, times.values())
            time_ours, time_optax, speed = time_ours / STEPS, time_optax / STEPS, copied / time_copy
            ratios = (a / b for a, b in zip(times["ours"], times["Optax"], strict=True))
            floor = moved / speed
            rows.append(
                [
                    f"{name}, {leaves} {'leaf' if leaves == 1 else 'leaves'}",
                    *(f"{1e3 * seconds:.2f}" for seconds in (time_ours, time_optax, floor)),
                    f"{statistics.median(ratios):.2f}",
                    f"{time_ours / floor:.2f}",
                    f"{speed / 1e9:.1f}",
                    f"{compiling:.1f}",
                    f"{compiling_optax:.1f}",
                ]
            )
    head = ["update", "ours ms", "Optax ms", "floor ms", "ours / Optax", "ours / floor"]
    return table([*head, "copy GB/s", "compiling s", "Optax's"], rows)


# -- curvature products


class Net(NamedTuple):
    name: str
    logits: Callable[..., Any]  #: of parameters and x
    params: Any
    batch: Any  #: (x, y)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def nets(sizes: Sizes) -> Iterator[Net]:
    """A multilayer net on noise, and a transformer on random characters."""
    rng = np.random.default_rng(0)
    widths, rows, classes = list(sizes.mlp), sizes.mlp_batch, 10
    x = rng.normal(size=(rows, 784)).astype(np.float32)
    y = rng.integers(0, classes, rows)
    options = {"hidden": widths, "input_dropout": 0.0, "dropout": 0.0}
    shape = "-".join(map(str, (784, *widths, classes)))
    yield net(f"MLP {shape}, {rows} examples", "mlp", classes, options, x, y)

    characters = 64
    text = rng.integers(0, characters, (sizes.text[0], sizes.text[1] + 1))
    shape = ", ".join(f"{name} {value}" for name, value in sizes.transformer.items())
    name = f"transformer of {shape}, {sizes.text[0]} sequences of {sizes.text[1]}"
    yield net(name, "transformer", characters, sizes.transformer, text[:, :-1], text[:, 1:])


def net(
    name: str, model: str, classes: int, options: Mapping[str, Any], x: np.ndarray, y: np.ndarray
) -> Net:
    module, batch = models.build(model, classes, **options), (jnp.asarray(x), jnp.asarray(y))
    params = jax.jit(lambda key: module.init(key, batch[0], train=False))(jax.random.key(0))
    logits = lambda params, x: module.apply(params, x, train=False)
    return Net(name, logits, params, batch)


def products_table(sizes: Sizes) -> str:
    rows = []
    for name, logits, params, batch in nets(sizes):
        composed = lambda batch, logits=logits: gx.compose(
            cross_entropy, logits, x=batch[0], y=batch[1]
        )
        gradient = jax.jit(lambda p, b, composed=composed: jax.grad(composed(b))(p))
        operations = dot_operations(jax.make_jaxpr(gradient)(params, batch).jaxpr)
        for kind, curvature in (("Hessian", gx.hessian()), ("Gauss–Newton", gx.gauss_newton())):
            curved = lambda p, b, c=curvature, composed=composed: c(composed(b), p)
            cost = cost_of(curved, gradient, params, batch)
            rows.append(
                [
                    f"{kind}, {name}",
                    f"{cost['time']:.2f}",
                    f"{cost['operations'] / operations:.2f}",
                    f"{1e3 * cost['seconds']:.2f}",
                ]
            )
    return table(["product", "time / gradient's", "operations / gradient's", "ms"], rows)


# -- the sweep


def sweep_table(sizes: Sizes) -> str:
    data = sweep.examples(None, sizes.member_steps * sweep.BATCH)
    task = make_task(data, "keras_mlp", model_options={"hidden": sweep.HIDDEN})
    rows = []
    for count in sizes.members:
        rates = Axis(tuple(np.geomspace(1e-3, 1.0, count).tolist()))
        runs = members({"sgd": sweep.TABLE}, {"learning_rate": rates}, {})
        result = sweep_on_task(task, {"sgd": sweep.TABLE}, runs, epochs=1, batch_size=sweep.BATCH)
        speed = len(runs) / result.seconds
        rows.append(
            [
                str(len(runs)),
                f"{speed:.1f}",
                f"{speed * sizes.member_steps:,.0f}",
                f"{result.seconds:.2f}",
                f"{result.compile_seconds:.1f}",
            ]
        )
    return table(["members", "members / s", "steps / s", "training s", "compiling s"], rows)


# -- the deep autoencoder


def autoencoder_table(sizes: Sizes, data_dir: Path | None) -> str:
    data = load("digits") if data_dir is None else load("mnist", data_dir)
    task = make_task(data, "autoencoder", model_options={"widths": list(sizes.widths)})
    examples = len(task.train.x)
    batch = 1000 if examples >= 5000 else 500
    tables: dict[str, dict[str, Any]] = {
        f"adam, {rate:g}": {"method": "adam", "learning_rate": rate} for rate in sizes.rates
    }
    tables["hessian_free"] = {
        "method": "hessian_free",
        "maxiter": 30,
        "curvature_batch_size": batch // 4,
    }
    tables["lbfgs"] = {"method": "lbfgs"}
    result = race_on_task(
        task,
        optimizers.build_all(tables),
        epochs=10**9,
        batch_size=100,
        max_seconds=max(sizes.seconds),
        overrides={
            "hessian_free": {"batch_size": batch},
            "lbfgs": {"batch_size": "full", "order": "sequential"},
        },
    )
    rows = []
    for history in result.histories:
        losses = (loss_after(history.rows, seconds) for seconds in sizes.seconds)
        last = history.rows[-1]
        cells = [history.label, *losses, str(last["step"]), f"{last['gradients']:.0f}"]
        rows.append([*cells, f"{history.compile_seconds:.1f}"])
    head = ["method", *(f"{seconds:g} s" for seconds in sizes.seconds)]
    net = "-".join(map(str, (task.train.x[0].size, *sizes.widths)))
    return f"{data.name}, {examples} images, {net} and back.\n\n" + table(
        [*head, "updates", "gradients of all images", "compiling s"], rows
    )


def loss_after(rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """That of the last epoch that ended in time."""
    losses = [row["train_loss"] for row in rows if row["seconds"] <= seconds]
    return f"{losses[-1]:.4g}" if losses else "no epoch ended"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the library on this machine's accelerator")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--data-dir", type=Path, help="MNIST's files; else scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.quick:  # its times mean nothing, and most of them would be the compiler's
        jax.config.update("jax_disable_most_optimizations", True)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    sizes = QUICK if options.quick else CPU if on_cpu else ACCELERATOR

    kind = f"{len(jax.devices())} x {device.device_kind}"
    title = f"# The library on {kind}, float32, jax {jax.__version__}"
    notes = "What the columns mean is told at the head of `benchmarks/accelerator.py`."
    if on_cpu:
        notes += (
            f" **No accelerator: small sizes, on {os.cpu_count()} cores with a load of "
            f"{os.getloadavg()[0]:.1f} before.** It shows that the command works."
        )
    floats = f"{sizes.floats:,} floats"
    steps = f"{sizes.member_steps} steps of {sweep.BATCH} examples a member"
    parts: Sequence[tuple[str, Callable[[], str]]] = (
        (f"First-order updates of {floats}", lambda: updates_table(sizes)),
        ("Curvature products", lambda: products_table(sizes)),
        (f"The sweep, {steps}", lambda: sweep_table(sizes)),
        ("The deep autoencoder", lambda: autoencoder_table(sizes, options.data_dir)),
    )
    page = [title, notes]
    print(f"{title}\n\n{notes}")
    for heading, make in parts:
        page.append(f"## {heading}\n\n{make()}")
        print(f"\n{page[-1]}", flush=True)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"accelerator_{device.platform}.md"
        path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
