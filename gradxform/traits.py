"""What the loop of :func:`gradxform.minimize` must know of a method, found by trying it."""

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal as Constant

from gradxform import tree
from gradxform.info import reported
from gradxform.objective import Composed
from gradxform.wrappers.projection import subgradient_of


def is_costly(state: optax.OptState) -> bool:
    """Whether an update makes evaluations or curvature products of its own."""
    work = ("evaluations", "curvature_products", "num_linesearch_steps")
    return any(reported(state, name) for name in work)


class _Bowl(Composed):
    """½ ‖θ‖² as an objective of any number of examples."""

    @property
    def examples(self) -> int:
        return 2**30

    @property
    def has_examples(self) -> bool:
        return True

    def spread(self, size: int) -> Composed:
        return self


def is_penalised(
    tx: optax.GradientTransformationExtraArgs, params: tree.PyTree, state: optax.OptState
) -> jax.Array:
    """Whether the method contains a penalty, such as weight decay or L1, or a projection.

    A proximal step or projection is seen in the state. Any other penalty moves parameters of zero
    gradient, and differently for positive and negative ones. Noise moves both alike. Methods that
    search by values are not checked.
    """
    if subgradient_of(state, params) is not None:
        return jnp.array(True)
    if reported(state, "stalled") or reported(state, "num_linesearch_steps"):
        return jnp.array(False)
    zeros = jax.tree.map(jnp.zeros_like, params)
    bowl = _Bowl(lambda p: 0.5 * tree.vdot(p, p), lambda p: p, {})

    def update_at(point: tree.PyTree) -> tree.PyTree:
        start = tx.init(point)
        return tx.update(zeros, start, point, value=bowl(point), grad=zeros, value_fn=bowl)[0]

    point = jax.tree.map(lambda p: jnp.abs(p) + 1, params)
    positive, negative = update_at(point), update_at(jax.tree.map(jnp.negative, point))
    rounding = [16 * jnp.finfo(p.dtype).eps for p in jax.tree.leaves(point)]
    leaves = zip(*map(jax.tree.leaves, (positive, negative, point)), rounding, strict=True)
    apart = [jnp.any(jnp.abs(a - b) > eps * p) for a, b, p, eps in leaves if jnp.size(p)]
    return jnp.any(jnp.stack(apart)) if apart else jnp.array(False)


def frozen_leaves(
    tx: optax.GradientTransformationExtraArgs, params: tree.PyTree, state: optax.OptState
) -> list[bool]:
    """For each leaf, whether its update is a constant, as with ``optax.set_to_zero``."""
    masks = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MaskedState))
    if not any(isinstance(x, optax.MaskedState) for x in masks):
        return [False] * len(jax.tree.leaves(params))
    bowl = _Bowl(lambda p: 0.5 * tree.vdot(p, p), lambda p: p, {})

    def update(grads: tree.PyTree, state: optax.OptState, params: tree.PyTree) -> tree.PyTree:
        return tx.update(grads, state, params, value=bowl(params), grad=grads, value_fn=bowl)[0]

    jaxpr = jax.make_jaxpr(update)(params, state, params).jaxpr
    moving = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Constant) and x in moving for x in equation.invars):
            moving.update(equation.outvars)
    return [isinstance(x, Constant) or x not in moving for x in jaxpr.outvars]
