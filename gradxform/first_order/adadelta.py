"""AdaDelta: RMSProp with a rate equal to the size of its own recent steps."""

from typing import Any, NamedTuple

import jax
import optax

from gradxform import tree
from gradxform.first_order.sgd import sgd
from gradxform.hyperparameters import Fraction, LearningRate, NonNegative, checked, scalar
from gradxform.protocol import transformation


class ScaleByAdadeltaState(NamedTuple):
    """State of :func:`scale_by_adadelta`; both in at least float32."""

    mean_square_grad: tree.PyTree  #: E[g²], the decaying mean of the squared gradients
    mean_square_step: tree.PyTree  #: E[Δx²], the decaying mean of the squared steps


@checked
def scale_by_adadelta(
    rho: Fraction = 0.95, eps: NonNegative = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`adadelta`, without rate or sign: −Δx.

    Args:
      rho: ρ in [0, 1), the part of both mean squares that is kept in an update.
      eps: ε > 0, inside both roots; it sets the size of the first steps.

    Returns:
      The transformation. ``update`` needs only the gradient.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.scale_by_adadelta(rho=0.75, eps=0.01)
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([ 0.2  , -0.186], dtype=float32)
    """

    def init(params: tree.PyTree) -> ScaleByAdadeltaState:
        return ScaleByAdadeltaState(tree.squares_like(params), tree.squares_like(params))

    def update(
        grads: tree.PyTree,
        state: ScaleByAdadeltaState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByAdadeltaState]:
        del params, extra_args
        grads = tree.square_bounded(grads)
        decay, delta = scalar(rho), scalar(eps)

        def mean_square(mean: jax.Array, x: jax.Array) -> jax.Array:
            return decay * mean + tree.product((1 - decay) * x, x)

        g2 = tree.map(mean_square, state.mean_square_grad, grads)  # Zeiler 2012, eq. 10
        step = tree.map(  # eq. 14, in the precision of the state
            lambda g, x2, g2: tree.divide(tree.sqrt(x2 + delta), tree.sqrt(g2 + delta)) * g,
            jax.tree.map(tree.promote, grads),
            state.mean_square_step,
            g2,
        )
        x2 = tree.map(mean_square, state.mean_square_step, step)
        return tree.cast_like(step, grads), ScaleByAdadeltaState(g2, x2)

    return transformation(init, update, takes_complex=True)


@checked
def adadelta(
    learning_rate: LearningRate = 1.0, rho: Fraction = 0.95, eps: NonNegative = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """AdaDelta: RMSProp with a rate equal to the size of its own recent steps.

    With E[g²] = E[Δx²] = 0 at the start, entry by entry (Zeiler's Algorithm 1)::

        E[g²] ← ρ E[g²] + (1 − ρ) g²
        Δx = −√(E[Δx²] + ε) / √(E[g²] + ε) · g
        E[Δx²] ← ρ E[Δx²] + (1 − ρ) Δx²
        x ← x + Δx

    The paper's ``learning_rate`` is 1; another one multiplies Δx in the last line only. It equals
    ``optax.adadelta(1.0, rho, eps)``. (Without a learning rate, Optax's goes uphill.) For complex
    parameters g² is ``|g|²`` and Δx² is ``|Δx|²``, which Optax's does not have.

    Args:
      learning_rate: factor of the step: a number, an array or a schedule of the update count.
      rho: ρ in [0, 1), the part of both mean squares that is kept in an update.
      eps: ε > 0, inside both roots; it sets the size of the first steps.

    Returns:
      The transformation. ``update`` needs only the gradient.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

    References:
      Zeiler, "ADADELTA: an adaptive learning rate method", arXiv 1212.5701 (2012), Algorithm 1.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.adadelta(rho=0.75, eps=0.01)
    >>> g = jnp.asarray([3.0, -0.5])
    >>> tx.update(g, tx.init(g))[0].round(3)
    Array([-0.2  ,  0.186], dtype=float32)
    """
    return optax.chain(scale_by_adadelta(rho, eps), sgd(learning_rate))
