"""RMSProp: AdaGrad with a decaying mean, also with momentum and Nesterov momentum."""

from typing import Any, NamedTuple

import optax

from gradxform import tree
from gradxform.first_order.momentum import momentum as _momentum
from gradxform.first_order.nesterov import nesterov as _nesterov
from gradxform.first_order.sgd import sgd
from gradxform.hyperparameters import Fraction, LearningRate, NonNegative, checked, scalar
from gradxform.protocol import transformation


class ScaleByRmspropState(NamedTuple):
    """State of :func:`scale_by_rmsprop`."""

    mean_square: tree.PyTree  #: r, the decaying mean of the squares |g|², in at least float32


@checked
def scale_by_rmsprop(
    decay: Fraction = 0.9, eps: NonNegative = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`rmsprop`, without rate or sign: g / √(δ + r).

    Args:
      decay: ρ in [0, 1), the part of the mean square that is kept in an update.
      eps: δ ≥ 0, inside the root. With 0, a parameter that never had a gradient does not move.

    Returns:
      The transformation. ``update`` needs only the gradient.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.scale_by_rmsprop(decay=0.75)
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([ 2., -2.], dtype=float32)
    """

    def init(params: tree.PyTree) -> ScaleByRmspropState:
        return ScaleByRmspropState(tree.squares_like(params))

    def update(
        grads: tree.PyTree,
        state: ScaleByRmspropState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByRmspropState]:
        del params, extra_args
        grads = tree.square_bounded(grads)
        rho, delta = scalar(decay), scalar(eps)
        r = tree.map(
            lambda r, g: rho * r + tree.product((1 - rho) * g, g), state.mean_square, grads
        )
        direction = tree.map(lambda g, r: tree.divide(g, tree.sqrt(delta + r)), grads, r)
        return direction, ScaleByRmspropState(r)

    return transformation(init, update, takes_complex=True)


@checked
def rmsprop(
    learning_rate: LearningRate,
    decay: Fraction = 0.9,
    eps: NonNegative = 1e-6,
    momentum: Fraction | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp: the gradient divided by its root mean square, with optional momentum.

    With r = 0 at the start, entry by entry::

        r ← ρ r + (1 − ρ) g²
        θ ← θ − ε g / √(δ + r)

    For complex parameters g² is ``|g|²``. With momentum the second line becomes::

        v ← α v − ε g / √(δ + r)
        θ ← θ + v

    With Nesterov momentum g is the gradient at the interim point θ̃ = θ + αv, which the loop then
    holds; ``gx.eval_params`` gives θ (see :func:`gradxform.nesterov`). The lecture's slide of this
    form has no δ, which is ``eps=0``. A parameter that never had a gradient then does not move.

    Without Nesterov momentum it equals ``optax.rmsprop(learning_rate, decay, eps,
    eps_in_sqrt=True, momentum=momentum)``.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      decay: ρ in [0, 1), the part of the mean square that is kept in an update.
      eps: δ ≥ 0, inside the root.
      momentum: α in [0, 1); ``None`` for no momentum.
      nesterov: True takes the gradient at the interim point. This needs ``momentum``.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, or ``nesterov`` is
        True without ``momentum``.

    References:
      Lecture 7, "The RMSProp Algorithm" and "RMSProp Combined with Nesterov". Hinton, Srivastava &
      Swersky, *Neural Networks for Machine Learning*, lecture 6e (2012).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.rmsprop(0.1, decay=0.75)
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([-0.2,  0.2], dtype=float32)
    """
    direction = scale_by_rmsprop(decay, eps)
    if nesterov:
        if momentum is None:
            raise ValueError("rmsprop(nesterov=True) needs momentum=…, for instance momentum=0.9")
        return optax.chain(direction, _nesterov(learning_rate, momentum))
    if momentum is not None:
        return optax.chain(direction, _momentum(learning_rate, momentum))
    return optax.chain(direction, sgd(learning_rate))
