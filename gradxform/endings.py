"""How the loop of :func:`gradxform.minimize` sees that a run is over."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.info import reported

RUNNING = -1  #: the status of a run that is not over
PATIENCE = 100  #: a run ends after this many evaluations in a row without any change
# a decrease of so many units of rounding is hidden by rounding
_DIGITS = 100
# a change of the value by this part, for parameters changed by their own size, is little
_PART = 0.1


class Limits(NamedTuple):
    """The numbers that end a run; each may be traced."""

    atol: jax.Array  #: bound on the gradient
    rtol: jax.Array  #: bound on the gradient, relative to value and gradient at the start
    max_steps: jax.Array  #: largest number of updates

    def tol(self, value: jax.Array, grad_norm: jax.Array) -> jax.Array:
        """The bound on the gradient, from value and gradient at the start."""
        return jnp.minimum(self.atol, self.rtol * jnp.maximum(jnp.abs(value), grad_norm))


class Extent(NamedTuple):
    """The scale of the problem, from the start and the first step that changed the value."""

    value: jax.Array  # scale of the value
    params: jax.Array  # scale of the parameters
    is_known: jax.Array  # whether a step has changed the value


def extent_after(
    old: Extent, first: jax.Array, value: jax.Array, last: jax.Array, size: jax.Array
) -> Extent:
    """The scale of the problem after an evaluation.

    Args:
      old: the scale before.
      first: whether this is the start.
      value: the value at this point.
      last: the value at the point before.
      size: the largest absolute parameter.
    """
    changed = ~first & ~old.is_known & (value != last)
    stepped = Extent(
        jnp.maximum(old.value, jnp.abs(value - last)),
        jnp.maximum(old.params, size),
        jnp.array(True),
    )
    initial = Extent(jnp.abs(value), size, jnp.array(False))
    return tree.select(first, initial, tree.select(changed, stepped, old))


def is_low(value: jax.Array, lowest: jax.Array, start: jax.Array) -> jax.Array:
    """Whether a value is the lowest so far, up to rounding."""
    noise = 4 * jnp.finfo(value.dtype).eps * jnp.abs(lowest)
    return value <= jnp.minimum(lowest + noise, start)


def hidden_change(value: jax.Array) -> jax.Array:
    """The size of a change of the value that rounding may hide."""
    return _DIGITS * jnp.finfo(value.dtype).eps * jnp.abs(value)


def is_unbounded(value: jax.Array, size: jax.Array, start: jax.Array, extent: Extent) -> jax.Array:
    """Whether the value falls without bound.

    It does if both value and parameters exceed the scale of the start so far that rounding hides
    the start, or if the value is close to the largest negative number.
    """
    digits = jnp.finfo(value.dtype)
    far = size * digits.eps > extent.params
    deep = (start - value) * digits.eps > extent.value
    enormous = value < -(float(digits.max) ** 0.75)
    return (extent.is_known & far & deep) | enormous


def is_at_precision(
    state: optax.OptState,
    spacing: float,
    value: jax.Array,
    grad_norm: jax.Array,
    first_grad_norm: jax.Array,
    size: jax.Array,
) -> jax.Array:
    """Whether rounding is the cause that a run makes no progress any more.

    It is if it would hide the decrease that the method expects of its step, and if the gradient has
    become small: both compared with the start, and so small that changing the parameters by their
    own size would change the value by little. At a kink, on a far plateau, or where the gradient is
    wrong, it is not.

    Args:
      state: the state of the method.
      spacing: relative spacing of the floating-point numbers of value and parameters.
      value: the value of the point to return.
      grad_norm: largest absolute gradient entry at that point.
      first_grad_norm: the same at the start.
      size: largest absolute parameter at that point.
    """
    scale = jnp.maximum(first_grad_norm, tree.divide(jnp.abs(value), size))
    is_small = (grad_norm <= spacing**0.25 * scale) & (grad_norm * size <= _PART * jnp.abs(value))
    for expected in reported(state, "expected"):
        is_small &= expected <= _DIGITS * spacing * jnp.abs(value)
    return is_small
