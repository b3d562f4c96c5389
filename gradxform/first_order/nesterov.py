"""Nesterov momentum: the gradient is taken at the interim point θ + αv."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import Fraction, LearningRate, checked, rate, scalar
from gradxform.leaves import map_unmasked
from gradxform.protocol import transformation


class NesterovState(NamedTuple):
    """State of :func:`nesterov`. The loop holds θ̃ = θ + αv."""

    count: jax.Array  #: k, updates made so far
    momentum: jax.Array  #: the α of the interim point in the loop
    velocity: tree.PyTree  #: v, in at least float32


@checked
def nesterov(
    learning_rate: LearningRate, momentum: Fraction = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with Nesterov momentum, in the form of the lecture.

    The gradient is taken at the interim point θ̃::

        θ̃ = θ + α v
        g = ∇J(θ̃)
        v ← α v − ε g
        θ ← θ + v

    **The loop holds θ̃,** so the gradient that a training loop computes is the right one. Evaluate
    and deploy ``gx.eval_params(state, params)``, which is θ.

    With a constant rate the loop holds the same parameters as with ``optax.sgd(learning_rate,
    momentum, nesterov=True)``, which cannot give θ. With a schedule they differ: Optax multiplies
    all of the velocity by the newest rate, but here each gradient keeps its own rate.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      momentum: α in [0, 1), the part of the velocity that is kept in an update. It may change from
        update to update (``gx.inject_hyperparams``); θ stays exact.

    Returns:
      The transformation. ``update`` needs only the gradient. Put it last in a chain: a later method
      that rescales the update would also move the interim point.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Lecture 7, "SGD with Nesterov Momentum". Nesterov, Soviet Math. Dokl. 27:372 (1983). Sutskever
      et al., "On the importance of initialization and momentum in deep learning", ICML 2013.

    >>> import jax.numpy as jnp, optax, gradxform as gx
    >>> tx = gx.nesterov(learning_rate=0.1, momentum=0.5)
    >>> params = jnp.asarray(1.0)
    >>> updates, state = tx.update(jnp.asarray(1.0), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> round(float(params), 6), round(float(gx.eval_params(state, params)), 6)
    (0.85, 0.9)
    """

    def init(params: tree.PyTree) -> NesterovState:
        return NesterovState(jnp.zeros((), jnp.int32), scalar(momentum), tree.zeros_like(params))

    def update(
        grads: tree.PyTree,
        state: NesterovState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, NesterovState]:
        del params, extra_args
        eps, alpha = rate(learning_rate, state.count), scalar(momentum)
        velocity = tree.map(lambda v, g: alpha * v - eps * g, state.velocity, grads)
        # from θ̃ = θ + α_old v_old to the next θ̃ = (θ + v) + α v
        updates = tree.map(
            lambda _, v, v_old: v + alpha * v - state.momentum * v_old,
            grads,
            velocity,
            state.velocity,
        )
        return updates, NesterovState(tree.add_count(state.count, 1), alpha, velocity)

    return transformation(init, update, takes_complex=True)


@eval_params.register
def _(state: NesterovState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda p, v: p - state.momentum * v, params, state.velocity)
