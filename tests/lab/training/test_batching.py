"""Minibatches: every pass visits each example once; an online stream draws independently."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradxform.lab.training.batching import ORDERS, epoch_batches, steps_per_epoch

PASSES = ("reshuffle", "shuffle_once", "sequential")


def visited(batches):
    indices, weights = np.asarray(batches.indices), np.asarray(batches.weights)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    return indices[weights == 1]


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    epoch=st.integers(0, 2**31 - 1),
    order=st.sampled_from(PASSES),
)
def test_a_pass_visits_each_example_once(size, batch_size, epoch, order):
    batches = epoch_batches(jax.random.key(3), epoch, size=size, batch_size=batch_size, order=order)
    np.testing.assert_array_equal(np.sort(visited(batches)), np.arange(size))
    steps = steps_per_epoch(size, batch_size)
    assert batches.indices.shape == batches.weights.shape == (steps, min(batch_size, size))
    assert batches.indices.dtype == jnp.int32
    assert batches.weights.dtype == jnp.float32
    # Only the last batch is partial, and never empty; what fills it up can be looked up.
    counts = np.asarray(batches.weights).sum(axis=1)
    np.testing.assert_array_equal(counts[:-1], min(batch_size, size))
    assert counts[-1] >= 1
    assert np.all((np.asarray(batches.indices) >= 0) & (np.asarray(batches.indices) < size))


def epochs(order, size=50, batch_size=8, key=0):
    draw = partial(epoch_batches, size=size, batch_size=batch_size, order=order)
    return [visited(draw(jax.random.key(key), epoch)) for epoch in range(3)]


def test_orders_of_the_epochs():
    a, b, c = epochs("reshuffle")
    assert not np.array_equal(a, b)
    assert not np.array_equal(b, c)
    a, b, c = epochs("shuffle_once")
    assert not np.array_equal(a, np.arange(50))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(b, c)
    for one in epochs("sequential"):
        np.testing.assert_array_equal(one, np.arange(50))


@pytest.mark.parametrize("order", ["reshuffle", "shuffle_once", "online"])
def test_the_key_decides(order):
    np.testing.assert_array_equal(epochs(order, key=1), epochs(order, key=1))
    assert not np.array_equal(epochs(order, key=1), epochs(order, key=2))


def test_every_position_is_as_likely():
    draw = jax.jit(
        lambda epoch: epoch_batches(
            jax.random.key(0), epoch, size=5, batch_size=2, order="reshuffle"
        ).indices.reshape(-1)[:5]
    )
    orders = np.asarray(jax.vmap(draw)(jnp.arange(4000)))
    counts = np.stack([np.bincount(column, minlength=5) for column in orders.T])
    # 800 expected, standard deviation 25.
    np.testing.assert_allclose(counts, 800, atol=125)


def test_online_draws_with_replacement_and_uniformly():
    batches = epoch_batches(jax.random.key(0), 0, size=10, batch_size=4000, order="online")
    assert batches.indices.shape == (1, 4000)
    assert np.all(np.asarray(batches.weights) == 1)
    counts = np.bincount(np.asarray(batches.indices).ravel(), minlength=10)
    np.testing.assert_allclose(counts, 400, atol=100)  # standard deviation 19
    a, b, _ = epochs("online")
    assert not np.array_equal(a, b)
    assert len(a) == 7 * 8
    assert len(np.unique(a)) < 50


@pytest.mark.parametrize("order", ORDERS)
def test_one_program_for_all_epochs(order):
    traces = []

    @jax.jit
    def draw(key, epoch):
        traces.append(epoch)
        return epoch_batches(key, epoch, size=11, batch_size=4, order=order)

    key = jax.random.key(5)
    for epoch in range(3):
        eager = epoch_batches(key, epoch, size=11, batch_size=4, order=order)
        jax.tree.map(np.testing.assert_array_equal, draw(key, epoch), eager)
    assert len(traces) == 1


@pytest.mark.parametrize(("size", "batch", "steps"), [(128, 128, 1), (129, 128, 2), (3, 8, 1)])
def test_steps_per_epoch(size, batch, steps):
    assert steps_per_epoch(size, batch) == steps


def test_refusals():
    with pytest.raises(ValueError, match="order='shuffle' is not one of reshuffle, shuffle_once"):
        epoch_batches(jax.random.key(0), 0, size=3, batch_size=2, order="shuffle")
    for size, batch_size in [(0, 1), (1, 0)]:
        with pytest.raises(ValueError, match=f"size={size} and batch_size={batch_size}"):
            steps_per_epoch(size, batch_size)
