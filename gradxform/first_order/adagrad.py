"""AdaGrad: the rate of each parameter shrinks with the sum of its squared gradients."""

from typing import Any, NamedTuple

import optax

from gradxform import tree
from gradxform.first_order.sgd import sgd
from gradxform.hyperparameters import LearningRate, NonNegative, checked, scalar
from gradxform.protocol import transformation


class ScaleByAdagradState(NamedTuple):
    """State of :func:`scale_by_adagrad`."""

    sum_of_squares: tree.PyTree  #: r, the sum of the squares |g|², in at least float32


@checked
def scale_by_adagrad(eps: NonNegative = 1e-7) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`adagrad`, without rate or sign: g / (δ + √r).

    Args:
      eps: δ ≥ 0, outside the root. With 0, a parameter that never had a gradient does not move.

    Returns:
      The transformation. ``update`` needs only the gradient.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.scale_by_adagrad()
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([ 1., -1.], dtype=float32)
    """

    def init(params: tree.PyTree) -> ScaleByAdagradState:
        return ScaleByAdagradState(tree.squares_like(params))

    def update(
        grads: tree.PyTree,
        state: ScaleByAdagradState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByAdagradState]:
        del params, extra_args
        grads = tree.square_bounded(grads)
        delta = scalar(eps)
        r = tree.map(lambda r, g: r + tree.product(g, g), state.sum_of_squares, grads)
        direction = tree.map(lambda g, r: tree.divide(g, delta + tree.sqrt(r)), grads, r)
        return direction, ScaleByAdagradState(r)

    return transformation(init, update, takes_complex=True)


@checked
def adagrad(
    learning_rate: LearningRate, eps: NonNegative = 1e-7
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad: the rate of each parameter shrinks with the sum of its squared gradients.

    With r = 0 at the start, entry by entry::

        r ← r + g²
        θ ← θ − ε g / (δ + √r)

    For complex parameters g² is ``|g|²``. ``optax.adagrad`` puts δ inside the root and starts r at
    0.1, so it cannot express this rule. The two agree only if both constants are 0.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      eps: δ ≥ 0, outside the root.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Lecture 7, "AdaGrad". Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning
      and stochastic optimization", JMLR 12:2121 (2011).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.adagrad(0.1)
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([-0.1,  0.1], dtype=float32)
    """
    return optax.chain(scale_by_adagrad(eps), sgd(learning_rate))
