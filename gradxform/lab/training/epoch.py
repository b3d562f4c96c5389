"""One epoch of training, and the evaluation after it, as pure functions to be compiled."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from gradxform.evaluation import eval_params
from gradxform.info import infos, total
from gradxform.lab.data.sets import Split
from gradxform.lab.tasks.task import Batch, Examples, Task, objective
from gradxform.lab.training.batching import Batches, Order, epoch_batches
from gradxform.lab.training.processes import (
    WHOLE,
    Devices,
    divided,
    filled,
    mesh_of,
    put,
    put_rows,
    rows_of,
)
from gradxform.tree import PyTree

EVALUATION_BLOCK = 512  # examples evaluated at once; limits the memory for activations


class TrainState(NamedTuple):
    """Everything that changes in a run and that a resumed run needs; only arrays."""

    params: PyTree
    opt_state: optax.OptState
    epoch: jax.Array  #: int32, finished epochs
    key: jax.Array  #: raw data of the random key for batches and dropout


class Epoch(NamedTuple):
    """The report of one epoch."""

    cost: jax.Array  #: mean training loss over the examples, each before its batch's update
    work: jax.Array  #: work, in gradients of a batch
    params: PyTree  #: the parameters to evaluate
    finite: jax.Array  #: whether cost and parameters are finite


def to_device(split: Split | Examples, mesh: Mesh | None = None) -> Examples:
    """Puts a part of a data set on devices.

    Args:
      split: the part; returned unchanged if it is already there.
      mesh: devices that share the examples; the last example is repeated until their number is a
        multiple of the number of devices. JAX's first device if not given.

    Raises:
      ValueError: the part is on other devices.
    """
    if isinstance(split, Examples):
        return split if mesh is None else _there(split, NamedSharding(mesh, rows_of(mesh)))
    x, y = map(jax.device_put if mesh is None else functools.partial(put_rows, mesh=mesh), split)
    return Examples(x, y, len(split.x))


def to_every_device(split: Split | Examples, mesh: Mesh) -> Examples:
    """Puts a copy of a part of a data set on every device.

    Args:
      split: the part; returned unchanged if it is already there.
      mesh: the devices.

    Raises:
      ValueError: the part is on other devices, or divided among them.
    """
    if isinstance(split, Examples):
        return _there(split, NamedSharding(mesh, WHOLE))
    return Examples(put(split.x, mesh), put(split.y, mesh), len(split.x))


def _there(part: Examples, sharding: NamedSharding) -> Examples:
    if not part.x.sharding.is_equivalent_to(sharding, part.x.ndim):
        found, wanted = part.x.sharding, sharding
        raise ValueError(f"the data are put as {found}; give data on the host, or put as {wanted}")
    return part


def batch_mesh(devices: Devices | None) -> Mesh:
    """A mesh of the devices that share examples and batches; by default the first local one."""
    return mesh_of("batch", jax.local_devices()[:1] if devices is None else devices)


def on_devices(task: Task, devices: Devices | None = None) -> Task:
    """The task with its data on devices.

    The host copy can be freed once the caller drops ``task``.

    Args:
      task: a task with its data on the host.
      devices: devices, of all processes, that share the examples; by default the first device of
        this process.
    """
    mesh = batch_mesh(devices)
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    there = {name: to_device(part, mesh) for name, part in parts.items() if part is not None}
    return task._replace(**there)


def init_state(tx: optax.GradientTransformation, params: PyTree, key: jax.Array) -> TrainState:
    """The state before the first epoch, as a copy that can be donated.

    Args:
      tx: the transformation.
      params: the initial parameters.
      key: the run's random key.
    """

    def own(x: jax.typing.ArrayLike) -> jax.Array:
        # a weakly typed start would have another type than the result of the first epoch
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.copy(x)
        return jnp.array(x, dtype=x.dtype, copy=True)

    state = TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), jax.random.key_data(key))
    return jax.tree.map(own, state)


def make_epoch(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    order: Order = "reshuffle",
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Examples], tuple[TrainState, Epoch]]:
    """One epoch of training as a pure function, to be compiled.

    The function draws minibatches and scans over them. Hyperparameters of ``tx`` may be traced. So
    you can build ``tx`` inside a function and sweep over them with ``jax.vmap``.

    Args:
      task: model and loss.
      tx: the transformation. It receives ``value``, ``grad`` and, as ``value_fn``, the batch's
        :func:`gradxform.lab.tasks.task.objective` with the same dropout.
      batch_size: examples in a batch.
      order: how batches are drawn.
      mesh: devices that share each batch, and the examples as in :func:`to_device`.

    Returns:
      ``(state, training examples) -> (state, Epoch)``.
    """
    tx = optax.with_extra_args_support(tx)

    def epoch(state: TrainState, examples: Examples) -> tuple[TrainState, Epoch]:
        batch_key, noise_key = jax.random.split(jax.random.wrap_key_data(state.key))
        batches = epoch_batches(
            batch_key, state.epoch, size=examples.size, batch_size=batch_size, order=order
        )
        if mesh is not None:
            batches = filled(batches, mesh)
        keys = jax.random.split(jax.random.fold_in(noise_key, state.epoch), len(batches.indices))

        def step(carry: tuple[PyTree, Any], drawn: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            params, opt_state = carry
            indices, weights, key = drawn
            sample_key, dropout_key = jax.random.split(key)
            batch = Batch(examples.x[indices], examples.y[indices], weights)
            if mesh is not None:
                batch = divided(batch, mesh)
            if order == "online":
                batch = task.draw(sample_key, batch)
            value_fn = objective(task, batch, dropout_key)
            value, grads = jax.value_and_grad(value_fn)(params)
            curved = objective(task, batch, dropout_key, for_curvature=True)
            updates, opt_state = tx.update(
                grads, opt_state, params, value=value, grad=grads, value_fn=curved
            )
            params = optax.apply_updates(params, updates)
            return (params, opt_state), (value, _searched(opt_state))

        (params, opt_state), (values, searched) = jax.lax.scan(
            step, (state.params, state.opt_state), (batches.indices, batches.weights, keys)
        )
        sizes = jnp.sum(batches.weights, axis=1)
        cost = jnp.sum(values * sizes) / jnp.sum(sizes)
        work = len(values) + jnp.sum(searched) + _work(opt_state) - _work(state.opt_state)
        best = eval_params(opt_state, params)
        finite = functools.reduce(
            jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((cost, best))]
        )
        state = TrainState(params, opt_state, state.epoch + 1, state.key)
        return state, Epoch(cost, work, best, finite)

    return epoch


def evaluate(
    task: Task,
    params: PyTree,
    examples: Examples,
    *,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """Mean metrics over a part of a data set, computed block by block.

    Args:
      task: the task, which defines the metrics.
      params: the parameters.
      examples: the part.
      mesh: devices that share the examples and each block.
    """
    size = examples.size
    block = min(size, EVALUATION_BLOCK)

    def sums(sofar: dict[str, jax.Array], begin: jax.Array) -> tuple[dict[str, jax.Array], None]:
        first = jnp.minimum(begin, size - block)  # the last block overlaps the previous one
        at = first + jnp.arange(block)
        drawn = Batches(at[None], (at >= begin).astype(jnp.float32)[None])
        if mesh is not None:
            drawn = filled(drawn, mesh)
        (at,), (weight,) = drawn
        batch = Batch(examples.x[at], examples.y[at], weight)
        if mesh is not None:
            batch = divided(batch, mesh)
        return jax.tree.map(jnp.add, sofar, task.sums(params, batch)), None

    probe = Batch(examples.x[:1], examples.y[:1], jnp.ones(1))
    shapes = jax.eval_shape(task.sums, params, probe)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    totals, _ = jax.lax.scan(sums, zeros, jnp.arange(0, size, block))
    means = {metric: summed / size for metric, summed in totals.items()}
    return {x: jnp.sqrt(mean) if x in task.roots else mean for x, mean in means.items()}


def in_order(metrics: Iterable[str]) -> list[str]:
    """The names of metrics as columns: the loss, then the others by name.

    >>> in_order(["accuracy", "loss"])
    ['loss', 'accuracy']
    """
    return sorted(metrics, key=lambda name: (name != "loss", name))


def _work(state: optax.OptState) -> jax.Array:
    """The extra work over all updates that the methods in a state report, in gradients."""
    cost = jnp.zeros((), jnp.float32)
    for info in infos(state):
        exact = hasattr(info, "gradient_equivalents")
        names = ("gradient_equivalents",) if exact else ("curvature_products", "evaluations")
        for name in names:
            cost += jnp.sum(jnp.asarray(getattr(info, name, 0), jnp.float32))
    return cost


def _searched(state: optax.OptState) -> jax.Array:
    """The evaluations that Optax's line searches made in the last update."""
    return total(state, "num_linesearch_steps").astype(jnp.float32)
