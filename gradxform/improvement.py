"""When a method has stalled: one rule for all methods that judge points by their values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import scalar

PATIENCE = 10  #: a method has stalled after this many accepted points in a row without improvement
_SMALLER = 0.9  # a gradient below this part of the smallest so far is an improvement


class Improvement(NamedTuple):
    """The best over the points accepted so far."""

    lowest: jax.Array  #: lowest value among the points that were an improvement
    smallest: jax.Array  #: smallest "largest gradient entry" among these points
    idle: jax.Array  #: accepted points in a row that were no improvement


def no_improvement() -> Improvement:
    """Before the first point."""
    return Improvement(
        jnp.array(scalar(tree.largest())),
        jnp.array(scalar(tree.largest())),
        jnp.array(0, jnp.int32),
    )


def improvement_after(
    before: Improvement, accept: jax.Array, value: jax.Array, largest: jax.Array
) -> Improvement:
    """After one more point.

    An accepted point is an improvement if its value is lower, or if the ``largest`` entry of its
    gradient is smaller by a tenth.
    """
    better = accept & ((value < before.lowest) | (largest < _SMALLER * before.smallest))
    return Improvement(
        lowest=jnp.where(better, jnp.minimum(value, before.lowest), before.lowest),
        smallest=jnp.where(better, jnp.minimum(largest, before.smallest), before.smallest),
        idle=jnp.where(better, 0, before.idle + accept.astype(jnp.int32)),
    )
