"""One epoch of training and the evaluation after it, as pure functions: what a run compiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from gradxform.evaluation import eval_params
from gradxform.info import infos, total
from gradxform.lab.batching import Batches, Order, epoch_batches
from gradxform.lab.data import Split
from gradxform.lab.processes import (
    WHOLE,
    Devices,
    divided,
    filled,
    mesh_of,
    put,
    put_rows,
    rows_of,
)
from gradxform.lab.tasks import Batch, Examples, Task, objective
from gradxform.tree import PyTree

METRICS = ("loss", "accuracy", "error")
EVALUATION_BLOCK = 512  # examples evaluated at once: bounds the memory of a large net's activations


class TrainState(NamedTuple):
    """All that changes in a run, and all that it takes to continue one: arrays only."""

    params: PyTree
    opt_state: optax.OptState
    epoch: jax.Array  #: int32, epochs done
    key: jax.Array  #: raw data of the run's random key; batches and dropout follow from it


class Epoch(NamedTuple):
    """What an epoch reports."""

    cost: jax.Array  #: training loss, each batch taken before its update; mean over the examples
    work: jax.Array  #: gradients of a batch that it took, or as much of other work
    params: PyTree  #: the parameters to evaluate
    finite: jax.Array  #: whether cost and parameters are


def to_device(split: Split | Examples, mesh: Mesh | None = None) -> Examples:
    """A part of a data set, put on the device once for all who use it.

    Args:
      split: the part; returned as it is if it is there already.
      mesh: of the devices that divide the examples, of which the last one is repeated until they
        can; JAX's first device alone if not given.

    Raises:
      ValueError: it is on other devices.
    """
    if isinstance(split, Examples):
        return split if mesh is None else _there(split, NamedSharding(mesh, rows_of(mesh)))
    x, y = map(jax.device_put if mesh is None else functools.partial(put_rows, mesh=mesh), split)
    return Examples(x, y, len(split.x))


def to_every_device(split: Split | Examples, mesh: Mesh) -> Examples:
    """A part of a data set, put whole on every device.

    Args:
      split: the part; returned as it is if it is there already.
      mesh: of the devices.

    Raises:
      ValueError: it is on other devices, or divided among them.
    """
    if isinstance(split, Examples):
        return _there(split, NamedSharding(mesh, WHOLE))
    return Examples(put(split.x, mesh), put(split.y, mesh), len(split.x))


def _there(part: Examples, sharding: NamedSharding) -> Examples:
    if not part.x.sharding.is_equivalent_to(sharding, part.x.ndim):
        found, wanted = part.x.sharding, sharding
        raise ValueError(f"the data are put as {found}; give those of the host, or as {wanted}")
    return part


def batch_mesh(devices: Devices | None) -> Mesh:
    """The devices that divide examples and batches; this process's first one if not given."""
    return mesh_of("batch", jax.local_devices()[:1] if devices is None else devices)


def on_devices(task: Task, devices: Devices | None = None) -> Task:
    """The task with its data on devices; those on the host may go once the task given goes.

    Args:
      task: with its data on the host.
      devices: those that divide the examples, of all processes; this process's first one if not
        given.
    """
    mesh = batch_mesh(devices)
    validation = None if task.validation is None else to_device(task.validation, mesh)
    train, test = to_device(task.train, mesh), to_device(task.test, mesh)
    return task._replace(train=train, validation=validation, test=test)


def init_state(tx: optax.GradientTransformation, params: PyTree, key: jax.Array) -> TrainState:
    """The state before the first epoch, in buffers of its own, so that it can be donated.

    Args:
      tx: the transformation.
      params: the initial parameters.
      key: the run's random key.
    """

    def own(x: jax.typing.ArrayLike) -> jax.Array:
        # a weakly typed start would not be the type that the first epoch returns
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

    It scans over minibatches that it draws itself. Hyperparameters of ``tx`` may be traced, so that
    ``jax.vmap`` of a function that builds ``tx`` and calls this sweeps them in one program.

    Args:
      task: model and loss.
      tx: the transformation; it is given ``value``, ``grad`` and, as ``value_fn``, the batch's
        :func:`gradxform.lab.tasks.objective` with the same dropout.
      batch_size: examples of a batch.
      order: how batches are drawn.
      mesh: of devices that divide each batch, and the examples as :func:`to_device` does.

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
            updates, opt_state = tx.update(
                grads, opt_state, params, value=value, grad=grads, value_fn=value_fn
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
    """Mean metrics over a whole part of a data set, block by block.

    Args:
      task: whose metrics.
      params: the parameters.
      examples: the part.
      mesh: of devices that divide the examples, and each block.
    """
    size = examples.size
    block = min(size, EVALUATION_BLOCK)

    def sums(sofar: dict[str, jax.Array], begin: jax.Array) -> tuple[dict[str, jax.Array], None]:
        first = jnp.minimum(begin, size - block)  # the last block overlaps the one before
        at = first + jnp.arange(block)
        drawn = Batches(at[None], (at >= begin).astype(jnp.float32)[None])
        if mesh is not None:
            drawn = filled(drawn, mesh)
        (at,), (weight,) = drawn
        batch = Batch(examples.x[at], examples.y[at], weight)
        if mesh is not None:
            batch = divided(batch, mesh)
        return jax.tree.map(jnp.add, sofar, task.metrics(params, batch)), None

    probe = Batch(examples.x[:1], examples.y[:1], jnp.ones(1))
    shapes = jax.eval_shape(task.metrics, params, probe)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    totals, _ = jax.lax.scan(sums, zeros, jnp.arange(0, size, block))
    return {metric: summed / size for metric, summed in totals.items()}


def _work(state: optax.OptState) -> jax.Array:
    """What the methods in a state report to have evaluated over all updates, in gradients."""
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
