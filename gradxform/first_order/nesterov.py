"""Nesterov momentum: the gradient is taken at the interim point."""

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

    count: jax.Array  #: updates made so far, k
    momentum: jax.Array  #: α of the interim point that the loop holds
    velocity: tree.PyTree  #: v, in at least float32


@checked
def nesterov(
    learning_rate: LearningRate, momentum: Fraction = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with Nesterov momentum, from the interim point of the lecture.

    .. math::
        \tilde\theta &\leftarrow \theta + \alpha v \\
        g &= \nabla J(\tilde\theta) \\
        v &\leftarrow \alpha v - \varepsilon_k \, g \\
        \theta &\leftarrow \theta + v

    **The parameters in the loop are** :math:`\tilde\theta`, so the one gradient a training loop
    takes is the lecture's. Evaluate and deploy ``gx.eval_params(state, params)``, which is θ.

    At a constant rate the parameters in the loop walk the path of ``optax.sgd(learning_rate,
    momentum, nesterov=True)``, which has no way to give θ. Under a schedule they do not: Optax
    multiplies the accumulated velocity by the newest rate, here each gradient keeps its own.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      momentum: α in [0, 1), how much velocity survives an update. It may change from one update to
        the next (``optax.inject_hyperparams``): θ is still followed exactly.

    Returns:
      The transformation; ``update`` needs the gradient alone. It must come last in a chain: what
      rescales its update also moves the interim point.

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

    return transformation(init, update)


@eval_params.register
def _(state: NesterovState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda p, v: p - state.momentum * v, params, state.velocity)
