"""Draws minibatches inside the compiled program, as random indices into the data."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Order = Literal["reshuffle", "shuffle_once", "sequential", "online"]

ORDERS: tuple[str, ...] = get_args(Order)


class Batches(NamedTuple):
    """The minibatches of one epoch, as indices into a data set."""

    indices: jax.Array  #: int32 (steps, batch)
    weights: jax.Array  #: float32 (steps, batch), 0 for filling in the last batch, else 1


def steps_per_epoch(size: int, batch_size: int) -> int:
    """The number of batches in an epoch; the last may be partial, as in Keras.

    Args:
      size: the number of examples.
      batch_size: examples in a batch.

    Raises:
      ValueError: an argument is below 1.

    >>> steps_per_epoch(54_000, 128)
    422
    """
    if size < 1 or batch_size < 1:
        raise ValueError(f"size={size} and batch_size={batch_size} must be at least 1")
    return -(-size // batch_size)


def epoch_batches(
    key: jax.Array, epoch: jax.Array | int, *, size: int, batch_size: int, order: Order
) -> Batches:
    """The minibatches of one epoch.

    ``reshuffle`` visits every example once, in a new random order for each epoch. ``shuffle_once``
    uses the same random order in every epoch, like a data set that is stored shuffled.
    ``sequential`` uses the order of storage. ``online`` makes no passes: it draws each index
    independently, and an epoch has as many full batches as a pass would need.

    Args:
      key: the random key of the run, the same for all its epochs.
      epoch: the epoch's number; may be traced.
      size: the number of examples; static.
      batch_size: examples in a batch; static. If ``size`` is smaller, a pass is one batch.
      order: one of :data:`ORDERS`; static.

    Raises:
      ValueError: an unknown order, or a size below 1.

    >>> key = jax.random.key(0)
    >>> epoch_batches(key, 0, size=5, batch_size=2, order="sequential")
    Batches(indices=Array([[0, 1], [2, 3], [4, 0]], dtype=int32),
            weights=Array([[1., 1.], [1., 1.], [1., 0.]], dtype=float32))
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}")
    steps = steps_per_epoch(size, batch_size)
    epoch_key = jax.random.fold_in(key, epoch)
    if order == "online":
        indices = jax.random.randint(epoch_key, (steps, batch_size), 0, size, jnp.int32)
        return Batches(indices, jnp.ones((steps, batch_size), jnp.float32))
    indices = jnp.arange(size, dtype=jnp.int32)
    if order != "sequential":
        shuffle_key = key if order == "shuffle_once" else epoch_key
        # One sort by random keys takes half the time of jax.random.permutation. 32 bits suffice: of
        # 90,000 keys one pair is expected to be equal, and this pair just keeps its order.
        keys = jax.random.bits(shuffle_key, (size,))
        _, indices = jax.lax.sort((keys, indices), num_keys=1)
    batch = min(batch_size, size)
    filling = (0, steps * batch - size)
    weights = jnp.pad(jnp.ones(size, jnp.float32), filling)
    return Batches(jnp.pad(indices, filling).reshape(steps, batch), weights.reshape(steps, batch))
