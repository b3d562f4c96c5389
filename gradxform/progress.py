"""When a method makes no progress any more: one rule for all that judge points by their values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import scalar

PATIENCE = 10  #: accepted points in a row without progress until a method is stalled
_SMALLER = 0.9  # a largest gradient entry below this part of the smallest so far is progress


class Progress(NamedTuple):
    """Over the points accepted so far."""

    lowest: jax.Array  #: value of a point that was progress
    smallest: jax.Array  #: largest gradient entry of such a point
    idle: jax.Array  #: points accepted in a row that were none


def no_progress() -> Progress:
    """Before any point."""
    return Progress(
        jnp.array(scalar(tree.largest())),
        jnp.array(scalar(tree.largest())),
        jnp.array(0, jnp.int32),
    )


def progress_after(
    progress: Progress, accept: jax.Array, value: jax.Array, largest: jax.Array
) -> Progress:
    """With one more point, where it is accepted: a lower value is progress, and so is a gradient
    whose ``largest`` entry is smaller by a tenth."""
    better = accept & ((value < progress.lowest) | (largest < _SMALLER * progress.smallest))
    return Progress(
        lowest=jnp.where(better, jnp.minimum(value, progress.lowest), progress.lowest),
        smallest=jnp.where(better, jnp.minimum(largest, progress.smallest), progress.smallest),
        idle=jnp.where(better, 0, progress.idle + accept.astype(jnp.int32)),
    )
