"""Symmetric linear systems that may be singular or indefinite, from products with the matrix.

MINRES (Paige & Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J.
Numer. Anal. 12:617, 1975). The Lanczos process makes unit vectors v with

    A v_k = β_k v_{k−1} + α_k v_k + β_{k+1} v_{k+1},    v_1 = b / ‖b‖

and plane rotations turn the tridiagonal matrix of α and β into a triangular one. The iterate x_k
has the smallest residual r = b − A x of all combinations of v_1 … v_k.

If A is singular, b may have a part that no A x has. The residual tends to this part, and A maps it
to 0. Beyond that point the iterates explode by rounding. So MINRES stops where ‖A r‖ is small, and
the part is found from A y = A r, which has a solution: it is r − y. Without this part b has a
solution too, and MINRES finds the one of least norm.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.sharding import varying_like

_ROUNDS = 4  # each solves for the error that those before it left
_STEPS = 10_000  # allowed in a round, also for few parameters
_SLACK = 10  # rounding errors allowed, in units of the precision


class _System(NamedTuple):
    """What is known of the system so far."""

    x: tree.PyTree  # the solution so far
    removed: tree.PyTree  # the part of b that no A x has, once it is known
    residual: tree.PyTree  # b − A x, without that part
    size: jax.Array  # the largest ‖A v‖ of a unit vector so far, an estimate of ‖A‖
    ended_least: jax.Array  # whether the last round ended at a small ‖A r‖
    projected: jax.Array  # whether ``b`` is in the range of A
    ended: jax.Array  # whether the last round ended before its limit
    rounds: jax.Array


class _Iterate(NamedTuple):
    """The state of MINRES before step k."""

    x: tree.PyTree  # x_{k−1}
    last: tree.PyTree  # v_{k−1}
    basis: tree.PyTree  # v_k
    older: tree.PyTree  # direction k−2
    old: tree.PyTree  # direction k−1
    beta: jax.Array  # β_k
    cosine: jax.Array  # of rotation k−1
    sine: jax.Array
    delta: jax.Array  # entry (k−1, k) of the triangular matrix, before rotation k−1
    epsilon: jax.Array  # entry (k−2, k) of the triangular matrix
    residual: jax.Array  # ‖b − A x_{k−1}‖
    target: jax.Array  # the residual that is small enough
    size: jax.Array  # largest ‖A v‖ so far
    is_least: jax.Array  # whether A maps the residual to nearly 0
    count: jax.Array  # steps made


def least_norm(
    product: Callable[[tree.PyTree], tree.PyTree], b: tree.PyTree, precision: float
) -> tree.PyTree:
    """The x of least norm among those with the smallest ‖A x − b‖, up to rounding.

    Eigenvalues of A below the rounding of its largest one count as zero. The result is NaN if the
    system is not solved after 10 n products, or 10,000 if that is more, in each of four rounds.

    Args:
      product: x → A x for a symmetric matrix A.
      b: a pytree of arrays of at least float32.
      precision: relative rounding error of ``product``.
    """
    eps = _eps(b)
    scale = tree.reciprocal(tree.max_abs(b))
    b = tree.scale(scale, b)

    def allowed(system: _System) -> jax.Array:
        return system.size * _norm(system.x) + _norm(b)

    def goes_on(system: _System) -> jax.Array:
        wrong = _norm(system.residual) > _SLACK * eps * allowed(system)
        ended = system.projected & system.ended_least
        return wrong & ~ended & (system.rounds < _ROUNDS)

    def solve_again(system: _System) -> _System:
        projects = system.ended_least
        rhs = tree.select(projects, product(system.residual), system.residual)
        exact = projects | system.projected
        # the rounding of A r is that of its largest terms
        terms = jnp.where(projects, system.size * _norm(system.residual), allowed(system))
        small = jnp.where(exact, eps**0.75, eps**0.5)
        end = _minres(product, rhs, system.size, terms, small)
        x = tree.map(lambda x, change: x + jnp.where(projects, 0, change), system.x, end.x)
        part = tree.map(jnp.subtract, system.residual, end.x)
        # not of an eigenvalue that is only small
        is_null = projects & (end.residual <= eps**0.75 * end.size * _norm(part))
        removed = tree.select(is_null, part, system.removed)
        rest = tree.map(jnp.subtract, b, removed)
        return _System(
            x=x,
            removed=removed,
            residual=tree.map(jnp.subtract, rest, product(x)),
            size=end.size,
            ended_least=end.is_least & ~projects,
            projected=exact,
            ended=~(end.residual > end.target) | end.is_least,
            rounds=system.rounds + 1,
        )

    zeros, no = tree.zeros_like(b), jnp.array(False)
    size, rounds = jnp.zeros_like(_norm(b)), jnp.zeros((), jnp.int32)
    start = _System(zeros, zeros, b, size, no, no, ~no, rounds)
    end = jax.lax.while_loop(goes_on, solve_again, varying_like(start, b))
    along = tree.divide(tree.vdot(end.x, end.removed), tree.vdot(end.removed, end.removed))
    x = tree.map(lambda x, part: x - along * part, end.x, end.removed)
    # a solve that reached its limit must prove that it is right; another one may meet rounding
    allowance = jnp.where(end.ended, max(precision, eps) ** 0.5, eps**0.75)
    close = _norm(end.residual) <= allowance * allowed(end)
    return tree.map(lambda x: jnp.where(close, x / scale, jnp.nan), x)


def _minres(
    product: Callable[[tree.PyTree], tree.PyTree],
    b: tree.PyTree,
    size: jax.Array,
    terms: jax.Array,
    small: jax.Array,
) -> _Iterate:
    """MINRES from 0 until the residual is rounding error, or until ‖A r‖ ≤ ``small`` ‖A‖ ‖r‖."""
    eps, most = _eps(b), max(10 * tree.count_int32(b), _STEPS)
    length = _norm(b)

    def goes_on(at: _Iterate) -> jax.Array:
        # false for NaN
        return (at.residual > at.target) & ~at.is_least & (at.count < min(most, 2**31 - 1))

    def step(at: _Iterate) -> _Iterate:
        image = product(at.basis)
        alpha = tree.vdot(at.basis, image)
        image = tree.map(lambda p, v, u: p - alpha * v - at.beta * u, image, at.basis, at.last)
        beta = _norm(image)
        size = jnp.maximum(at.size, jnp.hypot(jnp.hypot(at.beta, alpha), beta))
        # column k of the triangular matrix: rotation k−1, then rotation k
        above = at.cosine * at.delta + at.sine * alpha
        corner = at.sine * at.delta - at.cosine * alpha
        delta = -at.cosine * beta
        diagonal = jnp.hypot(corner, beta)
        cosine, sine = tree.divide(corner, diagonal), tree.divide(beta, diagonal)
        direction = tree.map(
            lambda v, old, older: tree.divide(v - above * old - at.epsilon * older, diagonal),
            *(at.basis, at.old, at.older),
        )
        # ‖A r‖ / ‖r‖ at x_{k−1}, and 1 / ‖d‖, because A maps the direction d to a unit vector
        is_least = jnp.hypot(corner, delta) <= small * size
        is_least |= _norm(direction) * small * size >= 1
        along = jnp.where(is_least, 0, cosine * at.residual)
        x = tree.map(lambda x, d: x + along * d, at.x, direction)
        return _Iterate(
            x=x,
            last=at.basis,
            basis=tree.map(lambda p: tree.divide(p, beta), image),
            older=at.old,
            old=direction,
            beta=beta,
            cosine=cosine,
            sine=sine,
            delta=delta,
            epsilon=at.sine * beta,
            residual=sine * at.residual,
            target=_SLACK * eps * (size * _norm(x) + terms),
            size=size,
            is_least=is_least,
            count=at.count + 1,
        )

    zeros, zero = tree.zeros_like(b), jnp.zeros_like(length)
    start = _Iterate(
        x=zeros,
        last=zeros,
        basis=tree.map(lambda b: tree.divide(b, length), b),
        older=zeros,
        old=zeros,
        beta=zero,
        cosine=zero - 1,
        sine=zero,
        delta=zero,
        epsilon=zero,
        residual=length,
        target=zero,
        size=size,
        is_least=jnp.array(False),
        count=jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(goes_on, step, varying_like(start, b))


def _norm(x: tree.PyTree) -> jax.Array:
    """‖x‖, also where the squares of its entries would overflow or vanish."""
    size = tree.max_abs(x)
    part = tree.scale(tree.reciprocal(size), x)
    return size * jnp.sqrt(tree.vdot(part, part))


def _eps(x: tree.PyTree) -> float:
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x)), default=0.0)
