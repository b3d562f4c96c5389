"""The quadratic model of an objective along two directions, and its minimum.

For the directions d₁, d₂, the gradient g, the Gauss–Newton matrix G and the damping λ::

    q(α, μ) = bᵀc + ½ cᵀ M c,    c = (α, μ),    bᵢ = gᵀdᵢ,    Mᵢⱼ = dᵢᵀ (G + λI) dⱼ
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order.joined_leaves import joined
from gradxform.second_order.random_passes import Linear

_RIDGE = 1e-6  # relative to the curvature along the last step
_MOST = 1  # |μ|
_WEIGHT = 0.1  # of a new sub-batch in the running mean


class Model(NamedTuple):
    """The model along two directions. The pairs (1, 1), (1, 2), (2, 2) have one entry each."""

    slopes: jax.Array  #: b
    curvature: jax.Array  #: dᵢᵀ G dⱼ
    products: jax.Array  #: dᵢᵀ dⱼ


def model_along(at: Linear, g: tree.PyTree, *directions: tree.PyTree) -> Model:
    """The model along two directions."""

    def seen(d: tree.PyTree) -> tuple[tree.PyTree, tree.PyTree]:
        pushed = at.push(d)
        return pushed, tree.scale(at.scale, at.bend(pushed))

    # one after the other: at once they can need more memory than the gradient
    pushed, bent = jax.lax.map(seen, jax.tree.map(lambda *ds: jnp.stack(ds), *directions))
    of = lambda images, i: jax.tree.map(lambda x: x[i], images)
    d = [joined(direction) for direction in directions]
    g = joined(g)
    pairs = (0, 0), (0, 1), (1, 1)
    return Model(
        jnp.stack([tree.vdot(g, one) for one in d]),
        jnp.stack([tree.vdot(of(pushed, i), of(bent, j)) for i, j in pairs]),
        jnp.stack([tree.vdot(d[i], d[j]) for i, j in pairs]),
    )


def without_second(model: Model, is_without: jax.Array) -> Model:
    """The model along the first direction alone, if ``is_without``: the second counts as 0."""
    first = lambda x: jnp.where(is_without & (jnp.arange(len(x)) > 0), 0, x)
    return Model(*map(first, model))


class Memory(NamedTuple):
    """What earlier sub-batches said about the curvature."""

    relative: jax.Array  #: running mean of d₁ᵀ G d₁ / gᵀd₁; 0 before the first update
    last: jax.Array  #: d₂ᵀ G d₂ of the last step, as the model had it


def first_memory() -> Memory:
    return Memory(scalar(0.0), scalar(0.0))


def averaged(model: Model, memory: Memory) -> tuple[Model, jax.Array]:
    """The model with the larger of this sub-batch's curvature and that of the earlier ones.

    A sub-batch may lack the few examples that curve the objective along a direction, while the
    gradient contains them. Also returns the running mean of the relative curvature.
    """
    one, off, two = model.curvature
    slope = jnp.abs(model.slopes[0])
    now = tree.divide(one, slope)
    mean = jnp.where(memory.relative > 0, memory.relative + _WEIGHT * (now - memory.relative), now)
    larger = jnp.maximum(one, mean * slope), jnp.maximum(two, 0.5 * (two + memory.last))
    cosine = tree.divide(tree.divide(off, tree.sqrt(one)), tree.sqrt(two))
    off = jnp.clip(cosine, -1, 1) * tree.sqrt(larger[0] * larger[1])
    return model._replace(curvature=jnp.stack([larger[0], off, larger[1]])), mean


def minimum(
    model: Model, damping: Scalar, alpha: Scalar | None, mu: Scalar | None
) -> tuple[jax.Array, jax.Array]:
    """(α, μ) with the least q and |μ| ≤ 1. A number that is given keeps its value.

    A last step that is in the span of few examples may show almost no curvature in a sub-batch.
    Without the bound on μ one such update can undo a hundred others.
    """
    m = model.curvature + scalar(damping) * model.products
    b = model.slopes
    if mu is None and alpha is None:
        # α eliminated; the ridge is for parallel directions
        part = tree.divide(m[1], m[0])
        left = (1 + _RIDGE) * m[2] - part * m[1]
        mu = jnp.clip(-tree.divide(b[1] - part * b[0], left), -_MOST, _MOST)
    elif mu is None and alpha is not None:
        mu = -tree.divide(b[1] + m[1] * scalar(alpha), m[2])
    momentum = scalar(0 if mu is None else mu)
    if alpha is None:
        alpha = -tree.divide(b[0] + m[1] * momentum, m[0])
    return scalar(alpha), momentum


def curvature_of_step(model: Model, alpha: jax.Array, mu: jax.Array) -> jax.Array:
    """sᵀGs for the step s = αd₁ + μd₂."""
    bent = model.curvature
    return alpha**2 * bent[0] + 2 * alpha * mu * bent[1] + mu**2 * bent[2]


def predicted(model: Model, alpha: jax.Array, mu: jax.Array) -> jax.Array:
    """The change of the objective by the step αd₁ + μd₂, without damping."""
    curved = curvature_of_step(model, alpha, mu)
    return alpha * model.slopes[0] + mu * model.slopes[1] + 0.5 * curved
