"""An MNIST epoch through the lab against a bare hand-written scan of the same steps.

    python -m benchmarks.lab [DATA_DIR]

Without a folder that holds MNIST the images are noise of MNIST's size, which takes as long. Both
programs draw a new permutation, gather each batch from the bytes on the device and make an SGD step
on the lecture's 784-32-10 net. They take turns in one process; the ratio is of the medians and must
be at most 1.2.
"""

import statistics
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradxform as gx
from benchmarks.common import timed
from gradxform.lab.data.sets import Dataset, Split, load
from gradxform.lab.tasks.task import make_task
from gradxform.lab.training.epoch import TrainState, evaluate, init_state, make_epoch, to_device

BATCH, RATE, RUNS, LIMIT = 128, 0.01, 15, 1.2


def noise() -> Dataset:
    rng = np.random.default_rng(0)

    def split(size: int) -> Split:
        x = rng.integers(0, 256, (size, 28, 28), np.uint8)
        return Split(x, rng.integers(0, 10, size, np.int32))

    return Dataset("noise", split(60_000), split(10_000), 10, 255.0)


def bare_epoch(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
    """What one would write by hand for this net and this method alone."""
    steps = len(x) // BATCH
    order = jax.random.permutation(key, len(x))[: steps * BATCH].reshape(steps, BATCH)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        inputs = x.reshape(len(x), -1).astype(jnp.float32) / 255
        hidden, output = params["Dense_0"], params["Dense_1"]
        hidden = jax.nn.sigmoid(inputs @ hidden["kernel"] + hidden["bias"])
        logits = hidden @ output["kernel"] + output["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    def step(params: Any, indices: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, x[indices], y[indices])
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), value

    params, values = jax.lax.scan(step, params, order)
    return params, jnp.mean(values)


def main() -> int:
    data = load("mnist", sys.argv[1]) if len(sys.argv) > 1 else noise()
    task = make_task(data, "keras_mlp")
    assert task.test is not None
    tx, train, test = gx.sgd(RATE), to_device(task.train), to_device(task.test)
    params = task.init(jax.random.key(0))

    lab = jax.jit(make_epoch(task, tx, batch_size=BATCH), donate_argnums=0)
    bare = jax.jit(bare_epoch, donate_argnums=0)
    measure = jax.jit(lambda params, examples: evaluate(task, params, examples))
    state: TrainState = init_state(tx, params, jax.random.key(1))
    mine = jax.tree.map(jnp.copy, params)
    times: dict[str, list[float]] = {"lab": [], "bare": [], "evaluation": []}
    for run in range(RUNS + 1):
        key = jax.random.key(run)
        lab_time, (state, epoch) = timed(partial(lab, state, train))
        bare_time, (mine, _) = timed(partial(bare, mine, key, train.x, train.y))
        evaluations = (timed(partial(measure, epoch.params, part)) for part in (train, test))
        evaluation = sum(seconds for seconds, _ in evaluations)
        if run:  # the first compiles
            for name, value in zip(times, (lab_time, bare_time, evaluation), strict=True):
                times[name].append(value)

    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["lab"] / median["bare"]
    print(f"device                   {jax.devices()[0].device_kind}")
    print(f"bare scan                {median['bare'] * 1e3:8.1f} ms an epoch")
    print(f"lab                      {median['lab'] * 1e3:8.1f} ms an epoch")
    print(f"evaluation, train + test {median['evaluation'] * 1e3:8.1f} ms")
    print(f"lab / bare               {ratio:8.2f}    (at most {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
