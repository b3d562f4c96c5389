"""What a method does with its hyperparameters.

Each one may be a Python number, an array or a tracer; a learning rate may also be a schedule. No
Python ``if`` looks at one inside ``update``, so that one compiled program can sweep any of them
under ``jax.vmap``. Python numbers are checked when the method is built.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Scalar: TypeAlias = float | jax.Array
Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]
LearningRate: TypeAlias = Scalar | Schedule


def scalar(value: jax.typing.ArrayLike) -> jax.Array:
    """``value`` in at least float32, whatever dtype a wrapper rounded it to, and strongly typed."""
    return jnp.asarray(value, dtype=jnp.result_type(float))


def below_one(decay: jax.typing.ArrayLike) -> jax.Array:
    """A decay rate, at most one unit of rounding below 1: a wrapper may have rounded it to 1.

    Bias-corrected means are then plain means, the limit, where 1 itself would give 0/0.
    """
    value = scalar(decay)
    return jnp.minimum(value, 1 - jnp.finfo(value.dtype).eps)


def rate(learning_rate: LearningRate, count: jax.Array) -> jax.Array:
    """ε_k: the learning rate at update ``count`` (0 for the first)."""
    return scalar(learning_rate(count) if callable(learning_rate) else learning_rate)


def check(method: str, **values: tuple[object, float, float]) -> None:
    """Checks ``name=(value, low, high)``: Python numbers must be in [low, high), arrays pass.

    Raises:
      TypeError: a value is neither a number nor an array.
      ValueError: a number is NaN, infinite or outside its interval.
    """
    for name, (value, low, high) in values.items():
        given = f"{method}({name}={value!r})"
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            if not low <= float(value) < high:
                below = f"below {high:g}" if high < math.inf else "finite"
                raise ValueError(f"{given}: {name} must be at least {low:g} and {below}")
        elif not hasattr(value, "dtype"):
            raise TypeError(f"{given}: expected a number or an array")


def check_learning_rate(method: str, learning_rate: LearningRate) -> None:
    """Checks that ``learning_rate`` is a schedule, an array or a finite number of at least 0."""
    if not callable(learning_rate):
        check(method, learning_rate=(learning_rate, 0.0, math.inf))


def check_choice(method: str, **values: tuple[str, Sequence[str]]) -> None:
    """Checks ``name=(value, allowed)``; raises a ValueError that lists what is allowed."""
    for name, (value, allowed) in values.items():
        if value not in allowed:
            options = ", ".join(map(repr, allowed))
            raise ValueError(f"{method}({name}={value!r}): {name} must be one of {options}")


def check_static(method: str, **values: int) -> None:
    """Checks that each value is a Python integer, since it sets shapes; raises a TypeError."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"{method}({name}={value!r}): {name} sets the shape of the state, so it must be a "
                f'Python integer; under optax.inject_hyperparams list it in static_args="{name}"'
            )
