"""SOAP as an Optax transformation: Adam in the eigenbasis of Shampoo's two factors. A rival only.

For a matrix W with the gradient G, after Vyas et al. (2024), algorithm 3::

    M ← β₁ M + (1 − β₁) G,    G' = Q_Lᵀ G Q_R,    V ← β₂ V + (1 − β₂) G' ⊙ G'
    W ← W − η Q_L (Q_Lᵀ M̂ Q_R / (√V̂ + ε)) Q_Rᵀ
    L ← β₂ L + (1 − β₂) G Gᵀ,    R ← β₂ R + (1 − β₂) Gᵀ G
    every f steps:    Q_L ← the Q of QR(L Q_L),    Q_R ← the Q of QR(R Q_R)

The first gradient gives the first bases, by eigenvectors. The hats are Adam's corrections for the
start at zero. Leaves of more than two axes are matrices whose rows are all axes but the last.
Vectors and numbers have Q = I, which is Adam, and so has a side longer than ``max_dim``.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Side(NamedTuple):
    """One side of a matrix that is not too long."""

    factor: jax.Array  #: L or R
    basis: jax.Array  #: Q_L or Q_R


class SoapState(NamedTuple):
    """The lists hold one item for each leaf; all numbers are in at least float32."""

    count: jax.Array  #: updates made so far
    first_moment: list[jax.Array]  #: M, with the shape of a matrix
    second_moment: list[jax.Array]  #: V, in the bases
    sides: list[tuple[Side | None, ...]]  #: of the rows and of the columns


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    precondition_frequency: int = 10,
    max_dim: int = 10_000,
) -> optax.GradientTransformation:
    """SOAP's direction, without rate and sign. ``precondition_frequency`` is f."""

    def init(params: Any) -> Any:
        zeros = [jnp.zeros_like(_matrix(p)) for p in jax.tree.leaves(params)]
        sides = [tuple(_side(p, k, max_dim) for k in range(2)) for p in jax.tree.leaves(params)]
        return SoapState(jnp.zeros((), jnp.int32), zeros, [0 * z for z in zeros], sides)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SoapState]:
        leaves, structure = jax.tree.flatten(updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        results = []
        for leaf, m, v, sides in zip(leaves, *state[1:], strict=True):
            g = _matrix(leaf)
            grams = _dot(g, g.T) if sides[0] else None, _dot(g.T, g) if sides[1] else None
            sides = [_started(s, gram, count) for s, gram in zip(sides, grams, strict=True)]
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(_into(sides, g))
            mean, square = _into(sides, m) / (1 - b1**count), v / (1 - b2**count)
            step = _back(sides, mean / (jnp.sqrt(square) + eps))
            is_due = count % precondition_frequency == 0
            sides = tuple(_learnt(s, a, b2, is_due) for s, a in zip(sides, grams, strict=True))
            results.append((step.reshape(leaf.shape).astype(leaf.dtype), m, v, sides))
        steps, *rest = ([r[i] for r in results] for i in range(4))
        return jax.tree.unflatten(structure, steps), SoapState(count, *rest)

    return optax.GradientTransformation(init, update)


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3, *, weight_decay: float = 0.0, **options: Any
) -> optax.GradientTransformation:
    """SOAP, with the options of :func:`scale_by_soap` and AdamW's decay of the weights."""
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(scale_by_soap(**options), *decay, rate)


def _matrix(leaf: Any) -> jax.Array:
    """The leaf as a matrix in at least float32; a vector is one row."""
    x = jnp.asarray(leaf)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)


def _side(leaf: Any, axis: int, max_dim: int) -> Side | None:
    length, dtype = _matrix(leaf).shape[axis], _matrix(leaf).dtype
    if jnp.ndim(leaf) < 2 or length > max_dim:
        return None
    return Side(jnp.zeros((length, length), dtype), jnp.eye(length, dtype=dtype))


def _started(side: Side | None, gram: Any, count: jax.Array) -> Side | None:
    if side is None:
        return None
    vectors = lambda: jnp.linalg.eigh(gram)[1][:, ::-1]
    return side._replace(basis=jax.lax.cond(count == 1, vectors, lambda: side.basis))


def _learnt(side: Side | None, gram: Any, b2: float, is_due: jax.Array) -> Side | None:
    if side is None:
        return None
    factor = b2 * side.factor + (1 - b2) * gram
    turned = lambda: jnp.linalg.qr(_dot(factor, side.basis))[0]
    return Side(factor, jax.lax.cond(is_due, turned, lambda: side.basis))


def _into(sides: Any, x: jax.Array) -> jax.Array:
    x = _dot(sides[0].basis.T, x) if sides[0] else x
    return _dot(x, sides[1].basis) if sides[1] else x


def _back(sides: Any, x: jax.Array) -> jax.Array:
    x = _dot(sides[0].basis, x) if sides[0] else x
    return _dot(x, sides[1].basis.T) if sides[1] else x
