"""Momentum: the velocity accumulates past gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import Fraction, LearningRate, checked, rate, scalar
from gradxform.protocol import transformation


class MomentumState(NamedTuple):
    """State of :func:`momentum`."""

    count: jax.Array  #: k, updates made so far
    velocity: tree.PyTree  #: v, in at least float32


@checked
def momentum(
    learning_rate: LearningRate, momentum: Fraction = 0.9
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with momentum: the velocity v accumulates past gradients.

    With v = 0 at the start::

        v ← α v − ε g
        θ ← θ + v

    The learning rate is inside the velocity, as in the lecture, so each gradient keeps its own
    rate. With a constant rate this equals ``optax.sgd(learning_rate, momentum)``. With a schedule
    it does not, because Optax multiplies all of the velocity by the newest rate; then it equals
    ``optax.chain(optax.scale_by_learning_rate(schedule), optax.trace(momentum))``.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      momentum: α in [0, 1), the part of the velocity that is kept in an update.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Lecture 7, "SGD Algorithm with Momentum". Polyak, "Some methods of speeding up the convergence
      of iteration methods", USSR Comput. Math. Math. Phys. 4(5):1 (1964).

    >>> import jax.numpy as jnp, optax, gradxform as gx
    >>> tx = gx.momentum(learning_rate=0.1, momentum=0.5)
    >>> theta = jnp.asarray(1.0)
    >>> state = tx.init(theta)
    >>> for _ in range(2):  # v = -0.1, then 0.5 · -0.1 - 0.1
    ...     updates, state = tx.update(jnp.asarray(1.0), state, theta)
    ...     theta = optax.apply_updates(theta, updates)
    >>> float(theta.round(6))
    0.75
    """

    def init(params: tree.PyTree) -> MomentumState:
        return MomentumState(jnp.zeros((), jnp.int32), tree.zeros_like(params))

    def update(
        grads: tree.PyTree,
        state: MomentumState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, MomentumState]:
        del params, extra_args
        eps, alpha = rate(learning_rate, state.count), scalar(momentum)
        velocity = tree.map(lambda v, g: alpha * v - eps * g, state.velocity, grads)
        updates = tree.cast_like(velocity, grads)
        return updates, MomentumState(tree.add_count(state.count, 1), velocity)

    return transformation(init, update, takes_complex=True)
