"""A task that a user registered, made from its function and checked."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.lab.data.formats import Split
from gradxform.lab.experiment import registry
from gradxform.lab.tasks.models import ModelError
from gradxform.lab.tasks.task import Batch, Task

_METRIC = r"[A-Za-z][A-Za-z0-9_]{0,60}"


def made_by_user(table: Any, _: Any = None) -> Task:
    """The task of a config whose ``task.kind`` a user registered.

    Raises:
      ModelError: the function fails, which the error says in its words, or returns something else.
    """
    entry = registry.find("task", table.kind)
    if entry is None:
        raise ModelError(f"no task is registered as {table.kind!r}: add --with FILE")
    options = table.model_dump(exclude={"kind"})
    try:
        task = entry.make(**options)
        if not isinstance(task, Task):
            wanted = "should return a gradxform.lab.Task"
            raise ModelError(f"task {entry.name}: {wanted}, found {type(task).__name__}")
        task = task._replace(name=entry.name)
        parts = {name: getattr(task, name) for name in ("train", "test", "validation")}
        made = {name: _split(name, part) for name, part in parts.items() if part is not None}
        task = task._replace(**made)
        _check(task)
    except ModelError:
        raise
    except Exception as error:  # what a user's function raises is unknown
        said = registry.in_own_words(error, entry.make)
        raise ModelError(f"task {entry.name}: {said}") from error
    return task


def as_it_is(_: Any, task: Task) -> Task:
    """The task, which :func:`made_by_user` has made with its data."""
    return task


def _split(name: str, part: Any) -> Split:
    x, y = map(np.asarray, part)
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        shapes = f"{x.shape} and {y.shape}"
        raise ValueError(f"{name} should be arrays (x, y) of equally many rows, found {shapes}")
    return Split(x, y)


def _check(task: Task) -> None:
    """Traces the functions once, so that a mistake is an error before the first run."""
    x, y = (jnp.asarray(part[:2]) for part in (task.train.x, task.train.y))
    batch = Batch(x, y, jnp.ones(len(x)))
    params = jax.eval_shape(task.init, jax.random.key(0))

    def loss(params: Any, batch: Batch) -> jax.Array:
        outputs = task.model(params, batch.x, jax.random.key(0))
        return jnp.asarray(task.loss(outputs, batch.x, batch.y, batch.weight))

    found = jax.eval_shape(loss, params, batch)
    if found.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"loss should return one real number, found {found}")
    metrics = jax.eval_shape(task.sums, params, batch)
    for name in metrics:
        if not re.fullmatch(_METRIC, name):
            raise ValueError(f"metrics: {name!r} should be letters, digits and underscores")
    if "loss" not in metrics:
        raise ValueError(f"metrics should have a loss, found {', '.join(metrics)}")
