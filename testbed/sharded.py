"""A net whose parameters are divided among devices, and the programs of its steps."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gradxform as gx
from gradxform.objective import bind


def net(params: Any, x: jax.Array) -> jax.Array:
    for layer in params:
        w, b = jax.tree.map(_gathered, layer)
        x = jnp.tanh(x @ w + b)
    return x


def _gathered(x: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim))
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((outputs - y) ** 2)


OBJECTIVE = gx.compose(squared_error, net)


def parameters(sizes: Sequence[int], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, m)) / n**0.5, np.zeros(m)) for n, m in itertools.pairwise(sizes)]


def mesh_of(count: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((count,), ("data",), (kind,), devices=jax.devices()[:count])


def fully_sharded(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Along the first axis that the devices divide; whole on each where there is none."""
    spec: list[str | None] = [None] * len(shape)
    for axis, size in enumerate(shape):
        if size and size % mesh.size == 0:
            spec[axis] = "data"
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """One turn of a stock training loop."""

    def turn(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(OBJECTIVE)(params, x=x, y=y)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=OBJECTIVE, x=x, y=y
        )
        return optax.apply_updates(params, updates), state

    return turn


# -- compiled programs


class Abstract(NamedTuple):
    """The arguments of a step, as shapes with shardings."""

    params: Any
    state: Any
    x: Any
    y: Any


def abstract(tx: Any, mesh: Mesh, sizes: Sequence[int], examples: int = 1024) -> Abstract:
    """What ``init`` makes under ``jax.jit`` of parameters that are only described."""

    def described(shape: Sequence[int], sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=sharding)

    params = jax.tree.map(
        lambda p: described(p.shape, fully_sharded(mesh, p.shape)), parameters(sizes)
    )
    program = jax.jit(tx.init).lower(params).compile()
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        program.output_shardings,
    )
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    x, y = (described((examples, size), by_example) for size in (sizes[0], sizes[-1]))
    return Abstract(params, state, x, y)


def compiled_step(tx: Any, given: Abstract) -> Any:
    return jax.jit(step(tx), donate_argnums=(0, 1)).lower(*given).compile()


def compiled_gradient(given: Abstract) -> Any:
    shardings = jax.tree.map(lambda p: p.sharding, given.params)
    gradient = lambda params, x, y: jax.grad(OBJECTIVE)(params, x=x, y=y)
    compiled = jax.jit(gradient, out_shardings=shardings)
    return compiled.lower(given.params, given.x, given.y).compile()


def compiled_products(curvature: Any, given: Abstract) -> Any:
    """A loop of products and nothing else."""

    def loop(params: Any, v: Any, x: jax.Array, y: jax.Array) -> Any:
        product = curvature(bind(OBJECTIVE, {"x": x, "y": y}), params)
        return jax.lax.fori_loop(0, 5, lambda _, v: product(v), v)

    return jax.jit(loop).lower(given.params, given.params, given.x, given.y).compile()


def bytes_on_a_device(tree: Any) -> int:
    """Of arrays, or of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
