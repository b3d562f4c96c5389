"""Matrices with rows sharded like the parameters: leaves of ``(*shape, columns)``."""

import itertools

import jax
import jax.numpy as jnp
from jax.core import Tracer

from gradxform.sharding import is_sharded, sharded_like
from gradxform.tree import Array, PyTree, promote, ravel


def rows_like(matrix: Array, like: PyTree) -> PyTree:
    """A matrix as leaves ``(*shape, columns)``, its rows sharded like the entries of ``like``."""
    _, unravel = ravel(like)
    return _rows_sharded_like(jax.vmap(unravel, in_axes=-1, out_axes=-1)(matrix), like)


def identity_rows(like: PyTree) -> PyTree:
    """The identity matrix in at least float32; each device computes only its own rows."""
    leaves, structure = jax.tree.flatten(jax.tree.map(promote, like))
    *starts, size = itertools.accumulate((x.size for x in leaves), initial=0)

    def ones(start: int, x: Array) -> Array:
        row = jnp.arange(start, start + x.size).reshape(*x.shape, 1)
        column = jnp.arange(size).reshape(*[1] * x.ndim, size)
        return (row == column).astype(x.dtype)

    rows = [ones(i, x) for i, x in zip(starts, leaves, strict=True)]
    return _rows_sharded_like(jax.tree.unflatten(structure, rows), like)


def _rows_sharded_like(rows: PyTree, like: PyTree) -> PyTree:
    if not any(isinstance(x, Tracer) or is_sharded(x) for x in jax.tree.leaves(like)):
        return rows
    places = jax.tree.map(lambda x, rows: jnp.broadcast_to(x[..., None], rows.shape), like, rows)
    return sharded_like(rows, places)


def outer(x: Array, row: Array) -> Array:
    """The outer product of a leaf ``x`` and a ravelled vector ``row``: ``x[..., None] * row``."""
    return x[..., None] * jnp.expand_dims(row, range(x.ndim))


def rows_dot(rows: PyTree, vector: PyTree) -> PyTree:
    """The matrix times a vector, both in the structure of the parameters."""
    flat, _ = ravel(vector)
    return jax.tree.map(lambda x: jnp.tensordot(x, flat, 1), rows)
