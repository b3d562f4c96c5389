"""Curvature pairs, what BFGS and L-BFGS learn from: s = θ − θ_old and y = g − g_old."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.info import diagnostics
from gradxform.kernels import max_abs, vdots


@diagnostics
class QuasiNewtonInfo(NamedTuple):
    """What became of the curvature pairs."""

    pairs: jax.Array  #: pairs taken into the memory
    skipped: jax.Array  #: pairs left out: not positive enough, or not finite


def flattened(values: tree.PyTree, ravel: bool) -> tree.PyTree:
    """``values`` in at least float32, with ``ravel`` as one vector."""
    values = jax.tree.map(tree.promote, values)
    return tree.ravel(values)[0] if ravel else values


class Pair(NamedTuple):
    """s and y over a common factor that brings sᵀy near 1.

    The factor leaves the BFGS update as it is, and keeps products of small gradients from
    underflowing. If the pair is left out, s, y and their products are 0.
    """

    s: tree.PyTree
    y: tree.PyTree
    sy: jax.Array  #: sᵀy
    yy: jax.Array  #: yᵀy
    rho: jax.Array  #: ρ = 1 / sᵀy
    is_useful: jax.Array  #: whether H learns from it
    is_skipped: jax.Array  #: whether it is left out although the point is another one


def curvature_pair(s: tree.PyTree, y: tree.PyTree, started: jax.Array) -> Pair:
    """The pair of two changes, if there was an update before."""
    # no result depends on the size taken, so its derivative, which 0 does not have, is left out
    longest = max_abs(*jax.lax.stop_gradient((s, y)))
    factor = tree.reciprocal(jnp.sqrt(longest[0]) * jnp.sqrt(longest[1]))
    s, y = tree.scale(factor, s), tree.scale(factor, y)
    sy, ss, yy = vdots((s, y), (s, s), (y, y))
    # relative to ‖s‖‖y‖: an objective in other units has the same pairs
    least = jnp.finfo(sy.dtype).eps ** 2 * (ss * yy)
    is_useful = started & (sy > 0) & (sy**2 > least)
    rho = is_useful.astype(sy.dtype) / jnp.where(is_useful, sy, 1)
    is_useful = rho > 0
    is_same_point = (longest[0] == 0) & (longest[1] == 0)
    return Pair(
        s=tree.select(is_useful, s, jax.tree.map(jnp.zeros_like, s)),
        y=tree.select(is_useful, y, jax.tree.map(jnp.zeros_like, y)),
        sy=jnp.where(is_useful, sy, 0),
        yy=jnp.where(is_useful, yy, 0),
        rho=rho,
        is_useful=is_useful,
        is_skipped=started & ~is_same_point & ~is_useful,
    )


def counted(info: QuasiNewtonInfo, pair: Pair) -> QuasiNewtonInfo:
    """``info`` with one more pair."""
    return QuasiNewtonInfo(
        tree.add_count(info.pairs, pair.is_useful.astype(jnp.int32)),
        tree.add_count(info.skipped, pair.is_skipped.astype(jnp.int32)),
    )


def no_pairs() -> QuasiNewtonInfo:
    """Before any pair."""
    return QuasiNewtonInfo(jnp.array(0, jnp.int32), jnp.array(0, jnp.int32))
