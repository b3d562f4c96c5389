"""The curvature pairs of BFGS and L-BFGS: s = θ − θ_old and y = g − g_old."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.info import diagnostics
from gradxform.kernels import max_abs, vdots


@diagnostics
class QuasiNewtonInfo(NamedTuple):
    """How many curvature pairs were used, over all updates."""

    pairs: jax.Array  #: number of pairs used
    skipped: jax.Array  #: number of pairs skipped: sᵀy was too small, negative or not finite


def flattened(values: tree.PyTree, ravel: bool) -> tree.PyTree:
    """``values`` in at least float32; with ``ravel``, as one vector."""
    values = jax.tree.map(tree.promote, values)
    return tree.ravel(values)[0] if ravel else values


class Pair(NamedTuple):
    """s and y, scaled by a common factor that brings sᵀy near 1.

    The BFGS update does not depend on the factor. It keeps products of small gradients from
    underflowing. If the pair is skipped, s, y and their products are 0.
    """

    s: tree.PyTree  #: the scaled change of θ
    y: tree.PyTree  #: the scaled change of the gradient
    sy: jax.Array  #: sᵀy
    yy: jax.Array  #: yᵀy
    rho: jax.Array  #: ρ = 1 / sᵀy
    is_useful: jax.Array  #: whether H is updated with the pair
    is_skipped: jax.Array  #: whether the pair is skipped although the point has changed


def curvature_pair(
    s: tree.PyTree,
    y: tree.PyTree,
    started: jax.Array,
    longest: Sequence[jax.Array] | None = None,
) -> Pair:
    """The pair of a change of θ and a change of g; skipped before the first update.

    ``longest`` are their largest entries, if they are known.
    """
    if longest is None:
        # The result does not depend on the scale, so its derivative (undefined at 0) is dropped.
        longest = max_abs(*jax.lax.stop_gradient((s, y)))
    factor = tree.reciprocal(jnp.sqrt(longest[0]) * jnp.sqrt(longest[1]))
    s, y = tree.scale(factor, s), tree.scale(factor, y)
    sy, ss, yy = vdots((s, y), (s, s), (y, y))
    # relative to ‖s‖‖y‖, so that the units of the objective do not matter
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
    """``info`` after one more pair."""
    return QuasiNewtonInfo(
        tree.add_count(info.pairs, pair.is_useful.astype(jnp.int32)),
        tree.add_count(info.skipped, pair.is_skipped.astype(jnp.int32)),
    )


def no_pairs() -> QuasiNewtonInfo:
    """The counts before the first pair."""
    return QuasiNewtonInfo(jnp.array(0, jnp.int32), jnp.array(0, jnp.int32))
