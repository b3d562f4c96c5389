"""The quadratic model of an objective along two directions, and its minimum.

For the directions d₁, d₂, the gradient g, the Gauss–Newton matrix G and the damping λ::

    q(α, μ) = bᵀc + ½ cᵀ M c,    c = (α, μ),    bᵢ = gᵀdᵢ,    Mᵢⱼ = dᵢᵀ (G + λI) dⱼ
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order.kronecker_factors import Linear


class Model(NamedTuple):
    """The model along two directions. The pairs (1, 1), (1, 2), (2, 2) have one entry each."""

    slopes: jax.Array  #: b
    curvature: jax.Array  #: dᵢᵀ G dⱼ
    products: jax.Array  #: dᵢᵀ dⱼ


def model_along(at: Linear, g: tree.PyTree, *directions: tree.PyTree) -> Model:
    """The model along two directions."""
    pushed = [at.push(d) for d in directions]
    bent = [tree.scale(at.scale, at.bend(y)) for y in pushed]
    pairs = (0, 0), (0, 1), (1, 1)
    return Model(
        jnp.stack([tree.vdot(g, d) for d in directions]),
        jnp.stack([tree.vdot(pushed[i], bent[j]) for i, j in pairs]),
        jnp.stack([tree.vdot(directions[i], directions[j]) for i, j in pairs]),
    )


def minimum(
    model: Model, damping: Scalar, rate: Scalar | None, momentum: Scalar | None
) -> tuple[jax.Array, jax.Array]:
    """(α, μ) with the least q. A number that is given keeps its value."""
    m = model.curvature + scalar(damping) * model.products
    b = model.slopes
    if rate is not None and momentum is not None:
        return scalar(rate), scalar(momentum)
    if rate is not None:
        return scalar(rate), -tree.divide(b[1] + m[1] * scalar(rate), m[2])
    if momentum is not None:
        return -tree.divide(b[0] + m[1] * scalar(momentum), m[0]), scalar(momentum)
    # scaled to a unit diagonal, with a ridge in case that the directions are parallel
    sizes = tree.sqrt(jnp.maximum(m[0], 0)), tree.sqrt(jnp.maximum(m[2], 0))
    off = tree.divide(tree.divide(m[1], sizes[0]), sizes[1])
    slope = tree.divide(b[0], sizes[0]), tree.divide(b[1], sizes[1])
    ridge = 1 + 1e-6
    determinant = ridge**2 - jnp.square(off)
    alpha = -tree.divide((ridge * slope[0] - off * slope[1]) / determinant, sizes[0])
    mu = -tree.divide((ridge * slope[1] - off * slope[0]) / determinant, sizes[1])
    usable = jnp.isfinite(alpha) & jnp.isfinite(mu) & (determinant > 0)
    return jnp.where(usable, alpha, -tree.divide(b[0], m[0])), jnp.where(usable, mu, 0)


def predicted(model: Model, alpha: jax.Array, mu: jax.Array) -> jax.Array:
    """The change of the objective by the step αd₁ + μd₂, without damping."""
    bent = model.curvature
    curved = alpha**2 * bent[0] + 2 * alpha * mu * bent[1] + mu**2 * bent[2]
    return alpha * model.slopes[0] + mu * model.slopes[1] + 0.5 * curved
