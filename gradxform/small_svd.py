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

import jax
import jax.numpy as jnp
import numpy as np

from gradxform import tree

LARGEST = 16  #: columns up to which these functions are worth it
_SWEEPS = 12  # each pair is met once in a sweep; six are usually enough


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
    """A V with orthogonal columns, and V, for a square A."""
    n = matrix.shape[1]
    if n == 1:
        return matrix, jnp.ones_like(matrix)
    pairs = jnp.asarray(_rounds(n))
    together = jnp.concatenate([matrix, jnp.eye(n, dtype=matrix.dtype)])  # V turns with A
    small = jnp.finfo(matrix.dtype).eps

    def turn(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        both, turned = state
        first, second = pairs[k, 0], pairs[k, 1]
        x, y = both[:, first], both[:, second]
        a, b = x[: len(matrix)], y[: len(matrix)]
        aa, bb, ab = (jnp.sum(p * q, axis=0) for p, q in ((a, a), (b, b), (a, b)))
        skewed = jnp.abs(ab) > small * jnp.sqrt(aa) * jnp.sqrt(bb)
        zeta = jnp.where(skewed, (bb - aa) / jnp.where(skewed, 2 * ab, 1), 1)
        t = jnp.where(zeta < 0, -1, 1) / (jnp.abs(zeta) + jnp.hypot(1, zeta))
        t = jnp.where(skewed, t, 0)
        c = 1 / jnp.sqrt(1 + t * t)
        both = both.at[:, first].set(c * x - c * t * y).at[:, second].set(c * t * x + c * y)
        return both, turned | jnp.any(skewed)

    def sweep(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        both, _, count = state
        both, turned = jax.lax.fori_loop(0, len(pairs), turn, (both, jnp.array(False)))
        return both, turned, count + 1

    unfinished = lambda state: state[1] & (state[2] < _SWEEPS)
    start = together, jnp.array(True), jnp.array(0, jnp.int32)
    both, _, _ = jax.lax.while_loop(unfinished, sweep, start)
    return both[: len(matrix)], both[len(matrix) :]


def _rounds(n: int) -> np.ndarray:
    """All pairs of n columns in rounds of disjoint pairs: (rounds, 2, pairs)."""
    odd = n % 2
    players = list(range(n + odd))
    rounds = []
    for _ in range(n + odd - 1):
        half = len(players) // 2
        met = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([sorted(pair) for pair in met if max(pair) < n])
        players = [players[0], players[-1], *players[1:-1]]
    return np.asarray(rounds, np.int32).transpose(0, 2, 1)
