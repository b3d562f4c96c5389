"""Polyak averaging: report the average of the parameters over time, not the last ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import Fraction, NonNegative, below_one, checked, scalar
from gradxform.leaves import map_unmasked
from gradxform.protocol import require_params, transformation


class PolyakAverageState(NamedTuple):
    """State of :func:`polyak_average`."""

    count: jax.Array  #: updates made so far
    average: tree.PyTree  #: θ̄, the average so far, in at least float32
    inner_state: optax.OptState  #: the state of the averaged method


@checked
def polyak_average(
    tx: optax.GradientTransformation, *, decay: Fraction | None = None, start: NonNegative = 0
) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters over the updates of ``tx``; the updates do not change.

    θ_t are the parameters after update t (with a method like Nesterov's, its ``eval_params``). The
    average θ̄ is::

        θ̄_t = θ̄_{t−1} + w_t (θ_t − θ̄_{t−1})
        w_t = 1 / t                       without decay
        w_t = (1 − ρ) / (1 − ρ^t)         with decay ρ

    Without ``decay`` it is the mean of θ_1 … θ_t (Polyak–Ruppert), suited to convex problems. With
    ``decay`` it is an exponentially decaying mean without bias towards the start, usual for deep
    nets. The loop holds θ_t; :func:`gradxform.eval_params` gives θ̄_t in the dtype of the
    parameters.

    Args:
      tx: the method to average.
      decay: ρ in [0, 1); ``None`` for the plain mean.
      start: number of updates before the average begins. Until then θ̄ is θ_t; t counts from there.

    Returns:
      The transformation. ``update`` needs ``params`` and what ``tx`` needs. Put it last in a chain,
      because it averages the parameters after its own update.

    Raises:
      ValueError: ``decay`` or ``start`` is out of range, or ``update`` is not given ``params``.

    References:
      Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control
      Optim. 30:838 (1992). Goodfellow et al., *Deep Learning* (2016), §8.7.3.

    >>> import jax.numpy as jnp, optax, gradxform as gx
    >>> tx = gx.polyak_average(gx.sgd(0.5))
    >>> theta = jnp.asarray(8.0)
    >>> state = tx.init(theta)
    >>> for _ in range(2):  # the gradient of θ²/2 is θ
    ...     updates, state = tx.update(theta, state, theta)
    ...     theta = optax.apply_updates(theta, updates)
    >>> float(theta), float(gx.eval_params(state, theta))  # the mean of 4 and 2
    (2.0, 3.0)
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: tree.PyTree) -> PolyakAverageState:
        return PolyakAverageState(jnp.zeros((), jnp.int32), tree.copy(params), inner.init(params))

    def update(
        updates: tree.PyTree,
        state: PolyakAverageState,
        params: tree.PyTree = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, PolyakAverageState]:
        params = require_params("polyak_average", params, updates)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        theta = eval_params(inner_state, optax.apply_updates(params, updates))

        count = tree.add_count(state.count, 1)
        t = jnp.maximum(scalar(count) - scalar(start), 1)
        if decay is None:
            weight = 1 / t
        else:
            rho = below_one(decay)
            weight = (1 - rho) / (1 - rho**t)
        average = tree.map(lambda a, p: a + weight * (p - a), state.average, theta)
        return updates, PolyakAverageState(count, average, inner_state)

    return transformation(init, update, takes_complex=True)


@eval_params.register
def _(state: PolyakAverageState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda _, average: average, params, state.average)
