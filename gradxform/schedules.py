"""Learning-rate schedules of the lecture. Every other schedule is Optax's."""

import jax
import jax.numpy as jnp
import optax

from gradxform.hyperparameters import NonNegative, checked, scalar


@checked
def linear_decay(
    init_value: NonNegative, end_value: NonNegative, transition_steps: NonNegative
) -> optax.Schedule:
    r"""Linear decay until update τ, constant after.

    .. math::
        \varepsilon_k = (1 - a)\,\varepsilon_0 + a\,\varepsilon_\tau, \quad a = \min(k/\tau, 1)

    The same numbers as ``optax.linear_schedule`` for τ > 0, with every argument traceable.

    Args:
      init_value: ε_0, the rate of the first update (k = 0).
      end_value: ε_τ, the rate of update τ and of all later ones.
      transition_steps: τ, in updates; 0 gives ``end_value`` from the start.

    Returns:
      A schedule: count of updates made so far, to learning rate.

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
    r"""Time decay, counted in updates as in the lecture's Keras example.

    .. math::
        \varepsilon_k = \varepsilon_0 \cdot \frac{1}{1 + \mathrm{decay} \cdot k}

    Args:
      init_value: ε_0, the rate of the first update (k = 0).
      decay: decay per update; the rate halves after 1/decay updates.

    Returns:
      A schedule: count of updates made so far, to learning rate.

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
