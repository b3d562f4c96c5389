"""Arithmetic on parameter pytrees, shared by every method.

Optimiser state is kept, and every update computed, in at least float32: moments of bfloat16 or
float16 gradients lose their small terms, and ``b2 = 0.999`` is 1 in bfloat16. float64 stays
float64. An update is handed back in the dtype of the gradient it came from.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array


def promote(x: Array) -> Array:
    """``x`` in at least float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def map(f: Callable[..., Array], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` computed in at least float32 and returned in the dtypes of ``tree``.

    >>> g = jnp.asarray([0.1], jnp.bfloat16)
    >>> map(lambda v, g: 0.9 * v - g, jnp.zeros(1, jnp.float32), g).dtype
    dtype('float32')
    """
    return jax.tree.map(
        lambda x, *xs: f(promote(x), *(promote(y) for y in xs)).astype(jnp.asarray(x).dtype),
        tree,
        *rest,
    )


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(jnp.asarray(y).dtype), tree, like)


def map_unmasked(f: Callable[..., Array], params: PyTree, tree: PyTree) -> PyTree:
    """``map(f, params, tree)``, leaving alone what a mask took out of ``tree``."""

    def is_masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        return jax.tree.map(
            lambda x, p: p if is_masked(x) else map(f, p, x), tree, params, is_leaf=is_masked
        )
    except ValueError as error:
        raise ValueError(
            "the parameters and the optimiser state have different structures; give the parameters "
            "that init was given (of Flax NNX, nnx.as_pure of both; under optax.flatten, ravelled)"
        ) from error


def has_holes(params: PyTree) -> bool:
    """Whether a mask took leaves out of ``params``."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def unflatten(vector: PyTree, like: PyTree) -> PyTree:
    """The tree that ``vector`` was ravelled from; any other tree as it is."""
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(like))
    is_vector = getattr(vector, "shape", None) == (size,)
    if not is_vector or jnp.shape(vector) == getattr(like, "shape", None):
        return vector
    return ravel_pytree(jax.tree.map(promote, like))[1](vector)


def check_floating(params: PyTree) -> None:
    """Raises a TypeError that names the first leaf which is not a real floating-point array."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(p)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}; gradxform optimises real "
                "floating-point parameters: convert the leaf, or leave it out with gx.masked"
            )


def zeros_like(params: PyTree) -> PyTree:
    """Zeros of the shape and sharding of ``params``, in at least float32: a fresh accumulator.

    Raises:
      TypeError: a leaf is not a real floating-point array.
    """
    check_floating(params)
    return jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(jnp.result_type(p), jnp.float32)),
        params,
    )


def copy(params: PyTree) -> PyTree:
    """A copy of ``params`` in at least float32, in buffers of its own: both can be donated."""
    return jax.tree.map(lambda zero, p: zero + jnp.asarray(p), zeros_like(params), params)


def max_abs(tree: PyTree) -> Array:
    """The largest absolute entry, ``‖tree‖_∞``; 0 for a tree without entries, NaN if one is NaN."""
    entries = [jnp.max(jnp.abs(promote(x))) for x in jax.tree.leaves(tree) if jnp.size(x)]
    return jnp.max(jnp.stack(entries)) if entries else jnp.zeros((), jnp.float32)


def sqrt(x: Array) -> Array:
    """``√x`` with derivative 0 at ``x = 0``.

    The square root's own derivative there is infinite, and infinity times the zero derivative of
    ``g²`` makes a gradient taken *through* an update NaN wherever the inner gradient is zero.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), x)


def divide(x: Array, y: Array) -> Array:
    """``x / y``, and 0 where ``y = 0``: a coordinate that never had a gradient does not move."""
    zero = y == 0
    return jnp.where(zero, 0, x / jnp.where(zero, 1, y))


def add_count(count: Array, more: Array | int) -> Array:
    """``count + more``, staying at the largest integer instead of overflowing."""
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count > largest - more, largest, count + more)


def vdot(a: PyTree, b: PyTree) -> Array:
    """The inner product Σ aᵢ bᵢ, accumulated in at least float32."""
    terms = jax.tree.map(lambda x, y: jnp.sum(promote(x) * promote(y)), a, b)
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), jnp.result_type(float)))


def scale(factor: Array, tree: PyTree) -> PyTree:
    """``factor`` times ``tree``, in the dtypes of ``tree``."""
    return map(lambda x: factor * x, tree)


def select(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where ``condition`` holds, else ``old``, in the dtypes of ``old``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y).astype(y.dtype), new, old)


def reciprocal(x: Array) -> Array:
    """``1 / x``, and 1 where that is not finite."""
    return jnp.where((x > 0) & jnp.isfinite(1 / x), 1 / x, 1)
