"""Singular values of many small matrices at once, by vector operations over the batch.

A library call for each matrix of a ``jax.vmap`` takes longer than the arithmetic. Householder's
triangle comes first (Golub & Van Loan, *Matrix Computations*, 4th edition, Algorithm 5.2.1), then
the one-sided Jacobi method (Algorithm 8.6.1 there; de Rijk 1989): rotate pairs of columns of A by V
until all are orthogonal. The lengths of the columns of A V are then the singular values::

    for each pair of columns a, b:
        ζ ← (bᵀb − aᵀa) / 2 aᵀb,    t ← sign(ζ) / (|ζ| + √(1 + ζ²))
        c ← 1 / √(1 + t²),          s ← c t
        a, b ← c a − s b, s a + c b              and the same columns of V
"""

import itertools
from typing import TypeAlias

import jax
import jax.numpy as jnp

from gradxform import tree

LARGEST = 8  #: columns up to which these functions are worth it
_SWEEPS = 12  # each pair is met once in a sweep; six are usually enough

# the columns of A and of V, whether a pair was rotated, and the number of sweeps
_State: TypeAlias = tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]


def triangle_of(matrix: jax.Array) -> jax.Array:
    """R of the QR factorisation, with min(m, n) rows."""
    m, n = matrix.shape
    for k in range(min(m - 1, n)):
        column = jnp.where(jnp.arange(m) < k, 0, matrix[:, k])
        size = tree.max_abs(column)
        v = column * tree.reciprocal(size)
        length = tree.norm(v)
        v = v.at[k].add(jnp.where(v[k] < 0, -length, length))
        weights = tree.divide(2 * (v @ matrix), v @ v)
        matrix = matrix - v[:, None] * weights[None, :]
    return jnp.triu(matrix[: min(m, n)])


def orthogonalised(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A V with orthogonal columns, the shortest first, and V, for a square A."""
    n = matrix.shape[1]
    rows = [*matrix.T], [*jnp.eye(n, dtype=matrix.dtype)]  # the columns of A and of V

    def sweep(state: _State) -> _State:
        columns, axes, _, count = list(state[0]), list(state[1]), *state[2:]
        turned = jnp.array(False)
        for i, j in itertools.combinations(range(n), 2):
            (c, s), (p, q), skewed = _rotation(columns[i], columns[j])
            for x in (columns, axes):
                x[i], x[j] = c * x[i] - s * x[j], p * x[i] + q * x[j]
            turned |= skewed
        return columns, axes, turned, count + 1

    unfinished = lambda state: state[2] & (state[3] < _SWEEPS)
    start = *rows, jnp.array(True), jnp.array(0, jnp.int32)
    columns, axes, _, _ = jax.lax.while_loop(unfinished, sweep, start)
    return jnp.stack(columns, axis=1), jnp.stack(axes, axis=1)


_Pair: TypeAlias = tuple[jax.Array, jax.Array]


def _rotation(a: jax.Array, b: jax.Array) -> tuple[_Pair, _Pair, jax.Array]:
    """(c, s) and (p, q) for which c a − s b and p a + q b are orthogonal; whether a and b were not.

    The first of the two is the shorter one, so the columns come in ascending order.
    """
    aa, bb, ab = jnp.sum(a * a), jnp.sum(b * b), jnp.sum(a * b)
    skewed = jnp.abs(ab) > jnp.finfo(a.dtype).eps * jnp.sqrt(aa) * jnp.sqrt(bb)
    zeta = jnp.where(skewed, (bb - aa) / jnp.where(skewed, 2 * ab, 1), 1)
    t = jnp.where(zeta < 0, -1, 1) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta * zeta))
    t = jnp.where(skewed, t, 0)
    c = 1 / jnp.sqrt(1 + t * t)
    s, is_longer = c * t, aa - t * ab > bb + t * ab
    return (
        (jnp.where(is_longer, s, c), jnp.where(is_longer, -c, s)),
        (jnp.where(is_longer, c, s), jnp.where(is_longer, -s, c)),
        skewed,
    )
