"""Sharding: find out how an array is divided over devices, and place another like it."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array


def is_explicit(x: Any) -> bool:
    """Whether ``x`` is sharded along explicit mesh axes, which JAX shows in its type."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is known to be sharded. For a tracer only explicit mesh axes are known."""
    is_array = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    sharding = x.sharding if is_array else jax.typeof(x).sharding
    return not sharding.is_fully_replicated


def check_whole(method: str, params: PyTree) -> None:
    """Raises a ValueError that names the first leaf known to be sharded."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if is_sharded(p):
            raise ValueError(
                f"{method}(ravel=True): params{jax.tree_util.keystr(path)} is sharded, and one "
                "vector of all parameters would be copied to every device; pass ravel=False"
            )


def whole(x: Array) -> NamedSharding | None:
    """The replicated sharding for a sum over ``x``; None where JAX chooses it."""
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()) if is_explicit(x) else None


def sharded_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` sharded like ``like``, which has the same shapes."""
    return jax.tree.map(_sharded_like, tree, like)


def _sharded_like(x: Array, like: Any) -> Array:
    if is_explicit(like):
        return jax.sharding.reshard(x, jax.typeof(like).sharding)
    if isinstance(like, Tracer):
        if jax.device_count() == 1:
            return x
        # The compiler finds the sharding. An operation on the entries of both gives both the same.
        return jnp.where(like > jnp.inf, jnp.zeros((), x.dtype), x)
    return jax.device_put(x, like.sharding) if is_sharded(like) and not isinstance(x, Tracer) else x


def varying_like(values: PyTree, like: PyTree) -> PyTree:
    """``values``, marked as varying over the same mesh axes as ``like``.

    Inside ``jax.shard_map`` the type of an array says over which mesh axes it may vary. A loop must
    start and end with the same types, so the constants it starts with are marked. Outside
    ``jax.shard_map`` this does nothing.
    """
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(like)]
    axes = frozenset[Any]().union(*(t.varying for t in types))
    if not axes:
        return values

    def mark(x: Any) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying")

    return jax.tree.map(mark, values)
