"""Gradient descent. With gradients of minibatches it is stochastic gradient descent (SGD)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import LearningRate, checked, rate
from gradxform.protocol import transformation


class SgdState(NamedTuple):
    """State of :func:`sgd`."""

    count: jax.Array  #: k, updates made so far


@checked
def sgd(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    """Gradient descent: θ ← θ − ε g.

    With gradients of minibatches this is stochastic gradient descent.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: ``learning_rate`` is not a number ≥ 0, an array or a schedule.

    References:
      Lecture 7, "SGD Follows Gradient Estimate Downhill".

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.sgd(0.1)
    >>> theta = {"w": jnp.asarray([1.0, 2.0])}
    >>> updates, state = tx.update(theta, tx.init(theta), theta)
    >>> updates["w"]
    Array([-0.1, -0.2], dtype=float32)
    """

    def init(params: tree.PyTree) -> SgdState:
        del params
        return SgdState(jnp.zeros((), jnp.int32))

    def update(
        grads: tree.PyTree, state: SgdState, params: tree.PyTree | None = None, **extra_args: Any
    ) -> tuple[tree.PyTree, SgdState]:
        del params, extra_args
        eps = rate(learning_rate, state.count)
        updates = tree.map(lambda g: -eps * g, grads)
        return updates, SgdState(tree.add_count(state.count, 1))

    return transformation(init, update, takes_complex=True)
