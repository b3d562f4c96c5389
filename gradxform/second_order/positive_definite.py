"""Inverses of positive definite matrices, made of matrix products.

Gauss and Jordan's method, block by block, for A with the blocks of row and column k::

    P = A_kk⁻¹
    A ← A − A_·k P A_k·    for all other blocks
    A_k· ← P A_k·,    A_·k ← −A_·k P,    A_kk ← P

After the last block A holds its inverse. Compilers and devices are fastest with products. LAPACK's
solves are not only slower: the threads they start on a CPU keep the cores busy afterwards.
"""

import functools

import jax
import jax.numpy as jnp

_BLOCK, _LEAF = 64, 8

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def inverse(a: jax.Array) -> jax.Array:
    """The inverses of a stack of positive definite matrices, (k, n, n).

    >>> a = jnp.asarray([[[2.0, 1.0], [1.0, 2.0]]])
    >>> bool(jnp.allclose(inverse(a) @ a, jnp.eye(2), atol=1e-5))
    True
    """
    return jax.vmap(_inverse)(a)


def _inverse(a: jax.Array) -> jax.Array:
    n = len(a)
    block = min(_BLOCK, _LEAF * -(-n // _LEAF))
    size = block * -(-n // block)
    beyond = (jnp.arange(size) >= n).astype(a.dtype)
    a = jnp.pad(a, (0, size - n)) + jnp.diag(beyond)
    if size == block:
        return _inverse_of_block(a)[:n, :n]

    def eliminated(k: jax.Array, a: jax.Array) -> jax.Array:
        at = k * block
        column = jax.lax.dynamic_slice_in_dim(a, at, block, axis=1)
        p = _inverse_of_block(jax.lax.dynamic_slice_in_dim(column, at, block))
        row = _dot(p, jax.lax.dynamic_slice_in_dim(a, at, block))
        is_own = jnp.arange(size)[:, None] // block == k
        column = jnp.where(is_own, 0, column)
        a = a - _dot(column, row)
        a = jax.lax.dynamic_update_slice_in_dim(a, -_dot(column, p), at, axis=1)
        row = jax.lax.dynamic_update_slice_in_dim(row, p, at, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(a, row, at, axis=0)

    return jax.lax.fori_loop(0, size // block, eliminated, a)[:n, :n]


def _inverse_of_block(a: jax.Array) -> jax.Array:
    """A⁻¹ = L⁻ᵀ L⁻¹ with Cholesky's L, for a side of at most 64."""
    w = _inverse_of_lower(jax.lax.linalg.cholesky(a, symmetrize_input=False))
    return _dot(w.T, w)


def _inverse_of_lower(lower: jax.Array) -> jax.Array:
    """The inverse of a lower triangular matrix: first of its blocks of 8 x 8, then of the rest.

    With D for the blocks on the diagonal, D⁻¹L = I + N, and N⁸ = 0 because there are at most 8.
    """
    n = len(lower)
    leaf = jnp.arange(n) // _LEAF
    tiled = lower.reshape(-1, _LEAF, n // _LEAF, _LEAF)
    leaves = jnp.moveaxis(jnp.diagonal(tiled, axis1=0, axis2=2), -1, 0)
    leaves = jax.vmap(_inverse_of_leaf)(leaves)
    places = jnp.eye(n // _LEAF, dtype=lower.dtype)[:, None, :, None]
    inverse = (places * leaves[:, :, None, :]).reshape(n, n)
    rest = jnp.where(leaf[:, None] == leaf[None, :], 0, _dot(inverse, lower))
    return _dot(_inverse_of_unit(rest), inverse)


def _inverse_of_leaf(lower: jax.Array) -> jax.Array:
    scale = jnp.diagonal(lower)
    return _inverse_of_unit(jnp.tril(lower / scale[:, None], -1)) / scale[None, :]


def _inverse_of_unit(n: jax.Array) -> jax.Array:
    """(I + N)⁻¹ = (I − N)(I + N²)(I + N⁴) for N with N⁸ = 0."""
    square = _dot(n, n)
    found = jnp.eye(len(n), dtype=n.dtype) - n
    found = found + _dot(found, square)
    return found + _dot(found, _dot(square, square))
