"""The history of a run on the device: a ring buffer of its last accepted points.

Each evaluation writes a row at the place of the next accepted point. The place moves on when the
method accepts the point; otherwise the next evaluation overwrites the row. So nothing is selected
and nothing waits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform.hyperparameters import scalar
from gradxform.solution import History


class Recorder(NamedTuple):
    """The ring buffer; its length is the number of points to keep."""

    values: jax.Array
    grad_norms: jax.Array
    evaluations: jax.Array
    accepted: jax.Array  #: number of points accepted so far; the next row goes behind them
    counted: jax.Array  #: the same, and the last point evaluated if it is the one to return


def new_recorder(length: int) -> Recorder:
    """A recorder for the last ``length`` points."""
    zeros = jnp.zeros(length, scalar(0).dtype)
    none = jnp.zeros((), jnp.int32)
    return Recorder(zeros, zeros, jnp.zeros(length, jnp.int32), none, none)


def written(
    recorder: Recorder,
    value: jax.Array,
    grad_norm: jax.Array,
    evaluations: jax.Array,
    is_returned: jax.Array,
) -> Recorder:
    """The recorder after an evaluation at a point, which may be the one to return."""
    row = recorder.accepted % recorder.values.shape[0]
    return Recorder(
        recorder.values.at[row].set(value),
        recorder.grad_norms.at[row].set(grad_norm),
        recorder.evaluations.at[row].set(evaluations),
        recorder.accepted,
        recorder.accepted + is_returned.astype(jnp.int32),
    )


def moved_on(recorder: Recorder, accepts: jax.Array) -> Recorder:
    """The recorder after an update that has accepted the point, or not."""
    accepted = recorder.accepted + accepts.astype(jnp.int32)
    return recorder._replace(accepted=accepted, counted=jnp.maximum(recorder.counted, accepted))


def in_order(recorder: Recorder) -> History:
    """The points, oldest first."""
    length = recorder.values.shape[0]
    count = jnp.minimum(recorder.counted, length)
    first = recorder.counted - count
    place = jnp.minimum(jnp.arange(length, dtype=jnp.int32), jnp.maximum(count - 1, 0))
    rows = (first + place) % length
    return History(
        recorder.values[rows], recorder.grad_norms[rows], recorder.evaluations[rows], count
    )
