"""The formulas for β of nonlinear conjugate gradients, and when to restart.

With a preconditioner P, inner products of two gradients have P between them, and those of two
directions have its inverse (Hager & Zhang 2013, §2). The papers write d for the direction of
descent. Optax's methods return directions of ascent, so p = −d here.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree

Beta = Literal["polak_ribiere", "fletcher_reeves", "hestenes_stiefel", "dai_yuan", "hager_zhang"]


class Products(NamedTuple):
    """Inner products of the new gradient g, the old one, y = g − g_old and p."""

    g_g: jax.Array  #: gᵀP g
    old_old: jax.Array  #: g_oldᵀP g_old
    g_old: jax.Array  #: gᵀP g_old
    g_y: jax.Array  #: gᵀP y
    p_y: jax.Array  #: pᵀy
    g_p: jax.Array  #: gᵀp
    y_y: jax.Array  #: yᵀP y, for ``hager_zhang``
    old_p: jax.Array  #: g_oldᵀp, for ``hager_zhang``
    p_p: jax.Array  #: pᵀP⁻¹p, for ``hager_zhang``


def beta_of(formula: Beta, q: Products, truncation: jax.Array) -> jax.Array:
    """β, so that the next direction of ascent is P g + β p."""
    if formula == "fletcher_reeves":
        return tree.divide(q.g_g, q.old_old)
    if formula == "polak_ribiere":
        return jnp.maximum(tree.divide(q.g_y, q.old_old), 0)
    if formula == "hestenes_stiefel":
        return tree.divide(q.g_y, -q.p_y)
    if formula == "dai_yuan":
        return tree.divide(q.g_g, -q.p_y)
    least = -truncation * tree.divide(q.old_p, q.p_p)
    return jnp.maximum(tree.divide(q.g_y - 2 * q.y_y * tree.divide(q.g_p, q.p_y), -q.p_y), least)


def restart_is_due(
    b: jax.Array,
    q: Products,
    since: jax.Array,
    *,
    cycle: int,
    nu: jax.Array,
) -> jax.Array:
    """Whether the next direction is P g alone.

    It is after ``cycle`` updates, by Powell's test with ν = ``nu``, and where P g + β p does not
    ascend. ``since`` counts the updates since the last restart; it is 0 before the first.
    """
    far = jnp.abs(q.g_old) > nu * q.g_g
    return (since == 0) | (since >= cycle) | far | ~(q.g_g + b * q.g_p > 0) | ~jnp.isfinite(b)
