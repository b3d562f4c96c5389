"""When a method has stalled: one rule for all methods that judge points by their values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import scalar

PATIENCE = 10  #: a method has stalled after this many accepted points in a row without progress
_SMALLER = 0.9  # a gradient below this part of the smallest so far is progress


class Progress(NamedTuple):
    """Progress over the points accepted so far."""

    lowest: jax.Array  #: lowest value among the points that were progress
    smallest: jax.Array  #: smallest "largest gradient entry" among these points
    idle: jax.Array  #: accepted points in a row that were no progress


def no_progress() -> Progress:
    """The progress before the first point."""
    return Progress(
        jnp.array(scalar(tree.largest())),
        jnp.array(scalar(tree.largest())),
        jnp.array(0, jnp.int32),
    )


def progress_after(
    progress: Progress, accept: jax.Array, value: jax.Array, largest: jax.Array
) -> Progress:
    """The progress after one more point.

    An accepted point is progress if its value is lower, or if the ``largest`` entry of its gradient
    is smaller by a tenth.
    """
    better = accept & ((value < progress.lowest) | (largest < _SMALLER * progress.smallest))
    return Progress(
        lowest=jnp.where(better, jnp.minimum(value, progress.lowest), progress.lowest),
        smallest=jnp.where(better, jnp.minimum(largest, progress.smallest), progress.smallest),
        idle=jnp.where(better, 0, progress.idle + accept.astype(jnp.int32)),
    )
