"""Learning-rate schedules of the lecture. Every other schedule is Optax's."""

import jax
import jax.numpy as jnp
import optax

from gradxform.hyperparameters import NonNegative, checked, scalar


@checked
def linear_decay(
    init_value: NonNegative, end_value: NonNegative, transition_steps: NonNegative
) -> optax.Schedule:
    """Linear decay of the learning rate until update τ, then a constant rate.

    The rate at update k is::

        ε_k = (1 − a) ε_0 + a ε_τ,   a = min(k/τ, 1)

    For τ > 0 the numbers equal those of ``optax.linear_schedule``. Here every argument may be
    traced.

    Args:
      init_value: ε_0, the rate of the first update (k = 0).
      end_value: ε_τ, the rate of update τ and of all later ones.
      transition_steps: τ, in updates; 0 gives ``end_value`` from the start.

    Returns:
      The schedule: a function from the number of updates so far to the learning rate.

    References:
      Lecture 7, "Need for Decreasing Learning Rate"; Goodfellow, Bengio & Courville, *Deep
      Learning* (2016), eq. 8.14.

    >>> import gradxform as gx
    >>> schedule = gx.linear_decay(1.0, 0.1, transition_steps=10)
    >>> [round(float(schedule(k)), 3) for k in (0, 5, 10, 99)]
    [1.0, 0.55, 0.1, 0.1]
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        start, end, tau = scalar(init_value), scalar(end_value), scalar(transition_steps)
        k = scalar(count)
        a = jnp.where(k < tau, k / jnp.where(tau > 0, tau, 1), 1)
        return (1 - a) * start + a * end

    return schedule


@checked
def inverse_time_decay(init_value: NonNegative, decay: NonNegative) -> optax.Schedule:
    """Time decay of the learning rate, as in the lecture's Keras example.

    The rate at update k (not epoch k) is::

        ε_k = ε_0 / (1 + decay · k)

    Args:
      init_value: ε_0, the rate of the first update (k = 0).
      decay: decay per update, at least 0. The rate has halved after 1/decay updates.

    Returns:
      The schedule: a function from the number of updates so far to the learning rate.

    References:
      Lecture 7, "Learning Rate Decay".

    >>> import gradxform as gx
    >>> schedule = gx.inverse_time_decay(0.01, decay=0.01)
    >>> round(float(schedule(100)), 6)
    0.005
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return scalar(init_value) / (1 + scalar(decay) * scalar(count))

    return schedule
