"""Physics-informed nets: a net whose inputs are points, trained to satisfy an equation there.

The residual of Burgers' equation at a point is u_t + u u_x − ν u_xx. The loss is half the mean of
its square over the points. So that u meets the conditions at the start and at both ends exactly,
the net N is only a part of it::

    u(t, x) = −sin πx + t (1 − x²) N(t, x)

References:
  Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019), appendix A. Lagaris,
  Likas & Fotiadis, "Artificial neural networks for solving ordinary and partial differential
  equations" (1998), for the conditions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.initializers import glorot_uniform

from gradxform.lab.data.equations import burgers
from gradxform.lab.data.formats import Split
from gradxform.lab.data.sets import Dataset
from gradxform.lab.tasks.models import ModelError
from gradxform.lab.tasks.task import Batch, Task
from gradxform.per_example import by_rows
from gradxform.tree import PyTree

_HIDDEN = (10, 10, 10, 10)
VISCOSITY = 0.01 / np.pi


def task_of(table: Any, data: Dataset) -> Task:
    """The task of a config's ``[task]`` and its points; see :func:`physics_task`."""
    return physics_task(data, **table.model_dump(exclude={"kind", "equation"}))


class TanhNet(nn.Module):
    """Layers of tanh units, then one linear unit: one number for each input vector."""

    hidden: Sequence[int] = _HIDDEN

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"kernel_init": glorot_uniform(), "param_dtype": jnp.result_type(float)}
        for width in self.hidden:
            x = jnp.tanh(nn.Dense(width, **options)(x))
        return nn.Dense(1, **options)(x)[..., 0]


def solution(params: PyTree, point: jax.Array, *, hidden: Sequence[int] = _HIDDEN) -> jax.Array:
    """The net's solution u of Burgers' equation at a point (t, x)."""
    t, x = point
    net = TanhNet(tuple(hidden)).apply({"params": params}, jnp.stack([2 * t - 1, x]))
    return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * jnp.asarray(net)


def burgers_residual(
    u: Callable[[jax.Array], jax.Array], point: jax.Array, viscosity: float
) -> jax.Array:
    """u_t + u u_x − ν u_xx at a point (t, x) of a function u of the point."""
    along_t, along_x = jnp.eye(2, dtype=point.dtype)
    slope = lambda point: jax.jvp(u, (point,), (along_x,))
    (value, u_x), (_, u_xx) = jax.jvp(slope, (point,), (along_x,))
    _, u_t = jax.jvp(u, (point,), (along_t,))
    return u_t + value * u_x - viscosity * u_xx


def physics_task(
    data: Dataset,
    *,
    hidden: Sequence[int] = _HIDDEN,
    points: int = 2048,
    viscosity: float = VISCOSITY,
) -> Task:
    """Burgers' equation as a task.

    The metrics are ``loss``, half the mean square of the residuals, and ``relative_error``, the
    root mean square of the net's error divided by that of the solution on the test grid.

    Args:
      data: the points, from ``gradxform.lab.data.sets.load("burgers")``.
      hidden: units of each tanh layer.
      points: points to train on.
      viscosity: ν > 0.

    Raises:
      ModelError: there are not so many points.
    """
    if not 1 <= points <= len(data.train.x):
        raise ModelError(f"points={points}: there are {len(data.train.x)} to train on")
    assert data.test is not None  # the grid of the equation
    places = data.train.x[:points], data.test.x
    train, test = (Split(at, burgers(at, viscosity)) for at in places)
    mean_square = float(np.mean(np.square(test.y)))

    def u(params: PyTree, point: jax.Array) -> jax.Array:
        return solution(params, point, hidden=hidden)

    def residual(params: PyTree, point: jax.Array) -> jax.Array:
        return burgers_residual(lambda point: u(params, point), point, viscosity)

    at_all, rows = jax.vmap(residual, (None, 0)), by_rows(residual)

    def residuals(params: PyTree, batch: Batch, is_by_rows: bool) -> jax.Array:
        weight = batch.weight / jnp.maximum(jnp.sum(batch.weight), 1)
        return jnp.sqrt(weight) * (rows if is_by_rows else at_all)(params, batch.x)

    def loss(outputs: jax.Array, _x: jax.Array, _y: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(weight * jnp.square(outputs)) / (2 * jnp.maximum(jnp.sum(weight), 1))

    def metrics(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        error = jax.vmap(u, (None, 0))(params, batch.x) - batch.y
        squares = {
            "loss": 0.5 * jnp.square(at_all(params, batch.x)),
            "relative_error": jnp.square(error) / mean_square,
        }
        return {name: jnp.sum(batch.weight * square) for name, square in squares.items()}

    return Task(
        name=data.name,
        init=lambda key: TanhNet(tuple(hidden)).init(key, jnp.zeros(2))["params"],
        model=lambda params, x, _: at_all(params, x),
        loss=loss,
        metrics=metrics,
        roots=("relative_error",),
        unit="half the mean squared residual",
        train=train,
        validation=None,
        test=test,
        residuals=residuals,
    )
