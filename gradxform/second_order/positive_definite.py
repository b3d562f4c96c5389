"""Inverses of positive definite matrices, made of matrix products.

Gauss and Jordan's method, block by block, for A with the blocks of row and column k::

    P = A_kk⁻¹
    A ← A − A_·k P A_k·    for all other blocks
    A_k· ← P A_k·,    A_·k ← −A_·k P,    A_kk ← P

After the last block A holds its inverse. P is made by the same method with blocks of one entry.
Compilers and devices are fastest with products, and the program is short. LAPACK's solves are not
only slower: the threads they start on a CPU keep the cores busy afterwards.
"""

import functools

import jax
import jax.numpy as jnp

_BLOCK = 64

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def inverse(a: jax.Array) -> jax.Array:
    """The inverses of a stack of positive definite matrices, (k, n, n); not finite for others.

    >>> a = jnp.asarray([[[2.0, 1.0], [1.0, 2.0]]])
    >>> bool(jnp.allclose(inverse(a) @ a, jnp.eye(2), atol=1e-5))
    True
    """
    n = a.shape[-1]
    size = _BLOCK * -(-n // _BLOCK) if n > _BLOCK else n
    if size > n:
        beyond = (jnp.arange(size) >= n).astype(a.dtype)
        a = jnp.pad(a, ((0, 0), (0, size - n), (0, size - n))) + jnp.diag(beyond)
    return _inverse(a, min(_BLOCK, size))[:, :n, :n]


def _inverse(a: jax.Array, block: int) -> jax.Array:
    """The inverses of matrices whose side is a multiple of ``block``."""
    size = a.shape[-1]
    if size == 1:
        return jnp.where(a > 0, 1 / a, jnp.nan)
    block = block if block < size else 1

    def eliminated(k: jax.Array, a: jax.Array) -> jax.Array:
        own = jnp.arange(size) // block == k
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=k * block, slice_size=block
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=k * block)
        row, column = take(a, axis=1), take(a, axis=2)
        p = _inverse(take(row, axis=2), 1)
        row = put(_dot(p, row), p, axis=2)
        a = put(put(a, jnp.zeros_like(column), axis=2), row, axis=1)
        return a - _dot(jnp.where(own[:, None], 0, column), row)

    return jax.lax.fori_loop(0, size // block, eliminated, a)
