"""The history of a run on the device: a ring buffer of its last accepted points.

Each evaluation writes a row at the place of the next accepted point. The place moves on when the
method accepts the point; otherwise the next evaluation overwrites the row. So nothing is selected
and nothing waits. One row is one vector, so that writing it takes one kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform.hyperparameters import scalar
from gradxform.kernels import vector
from gradxform.solution import History


class Recorder(NamedTuple):
    """The ring buffer; its length is the number of points to keep."""

    rows: jax.Array  #: value, largest gradient entry and evaluations of each point
    place: jax.Array  #: the row of the next accepted point
    accepted: jax.Array  #: number of points accepted so far
    counted: jax.Array  #: the same, and the last point evaluated if it is the one to return


def new_recorder(length: int) -> Recorder:
    """A recorder for the last ``length`` points."""
    none = jnp.zeros((), jnp.int32)
    return Recorder(jnp.zeros((length, 3), scalar(0).dtype), none, none, none)


def written(
    recorder: Recorder,
    value: jax.Array,
    grad_norm: jax.Array,
    evaluations: jax.Array,
    is_returned: jax.Array,
) -> Recorder:
    """The recorder after an evaluation at a point, which may be the one to return."""
    row = vector([value, grad_norm, evaluations.astype(value.dtype)])
    return recorder._replace(
        rows=jax.lax.dynamic_update_index_in_dim(recorder.rows, row, recorder.place, 0),
        counted=recorder.accepted + is_returned.astype(jnp.int32),
    )


def moved_on(recorder: Recorder, accepts: jax.Array) -> Recorder:
    """The recorder after an update that has accepted the point, or not."""
    accepted = recorder.accepted + accepts.astype(jnp.int32)
    place = recorder.place + accepts.astype(jnp.int32)
    return recorder._replace(
        place=jnp.where(place == recorder.rows.shape[0], 0, place),
        accepted=accepted,
        counted=jnp.maximum(recorder.counted, accepted),
    )


def in_order(recorder: Recorder) -> History:
    """The points, oldest first."""
    length = recorder.rows.shape[0]
    count = jnp.minimum(recorder.counted, length)
    place = jnp.minimum(jnp.arange(length, dtype=jnp.int32), jnp.maximum(count - 1, 0))
    value, grad_norm, evaluations = recorder.rows[(recorder.counted - count + place) % length].T
    return History(value, grad_norm, evaluations.astype(jnp.int32), count)
