"""The models: shapes, sizes, starts, dropout, and clear refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradxform.lab.models import MODELS, ModelError, build, sparse_normal

SMALL = {
    "logistic": {},
    "keras_mlp": {},
    "mlp": {"hidden": [16, 8]},
    "cnn": {"channels": [4, 4, 6], "hidden": 12},
    "autoencoder": {"widths": [20, 10, 3]},
}


@functools.cache
def make(name, shape=(9, 9)):
    module = build(name, 10, **SMALL[name])
    x = jnp.zeros((1, *shape))
    key = jax.random.key(0, impl="rbg")  # compiles in half the time
    return module, jax.jit(lambda key: module.init(key, x, train=False)["params"])(key)


def apply(module, params, x, key=None):
    """The outputs: in training with a key for the dropout, else not."""

    def outputs(params, x, key):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x, train=key is not None, rngs=rngs)

    return np.asarray(jax.jit(outputs)(params, x, key))


def shapes(params):
    return {
        jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)
    }


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (9, 9)) for name in MODELS), ("cnn", (9, 9, 3))]
)
def test_outputs(name, shape):
    module, params = make(name, shape)
    x = jax.random.uniform(jax.random.key(1), (2, *shape))
    outputs = apply(module, params, x)
    assert outputs.shape == ((2, *shape) if name == "autoencoder" else (2, 10))
    assert outputs.dtype == jnp.float32
    assert type(params) is dict
    # Each example on its own: no statistics of the batch.
    changed = apply(module, params, x.at[0].set(0))
    np.testing.assert_array_equal(changed[1], outputs[1])


def abstract_size(name, shape, **options):
    module = build(name, 10, **options)
    x = jnp.zeros((1, *shape))
    params = jax.eval_shape(
        lambda key: module.init(key, x, train=False)["params"], jax.random.key(0)
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("logistic", (28, 28), 785 * 10),
        ("keras_mlp", (28, 28), 785 * 32 + 33 * 10),
        ("mlp", (28, 28), 785 * 1000 + 1001 * 1000 + 1001 * 10),
        (
            "cnn",
            (32, 32, 3),
            (75 + 1) * 64 + (1600 + 1) * 64 + (1600 + 1) * 128 + (4 * 4 * 128 + 1) * 1000 + 10_010,
        ),
        (
            "autoencoder",
            (28, 28),
            785 * 1000 + 1001 * 500 + 501 * 250 + 251 * 30  # down
            + 31 * 250 + 251 * 500 + 501 * 1000 + 1001 * 784,  # and up
        ),
    ],
)  # fmt: skip
def test_sizes_of_the_published_nets(name, shape, size):
    assert abstract_size(name, shape) == size


def test_keras_start():
    _, params = make("keras_mlp", (28, 28))
    for layer, (inputs, outputs) in [("Dense_0", (784, 32)), ("Dense_1", (32, 10))]:
        kernel = np.asarray(params[layer]["kernel"])
        limit = math.sqrt(6 / (inputs + outputs))
        assert kernel.shape == (inputs, outputs)
        assert np.abs(kernel).max() <= limit
        assert np.abs(kernel).max() > 0.95 * limit
        assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert not np.any(params[layer]["bias"])


def test_keras_net_is_what_the_lecture_says():
    module, params = make("keras_mlp", (4, 4))
    x = np.asarray(jax.random.uniform(jax.random.key(1), (3, 4, 4)))
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = 1 / (1 + np.exp(-(x.reshape(3, 16) @ first["kernel"] + first["bias"])))
    expected = hidden @ second["kernel"] + second["bias"]
    outputs = apply(module, params, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_logistic_starts_at_equal_chances():
    module, params = make("logistic")
    np.testing.assert_array_equal(apply(module, params, jnp.ones((1, 9, 9))), 0)


def test_autoencoder_mirrors():
    _, params = make("autoencoder", (9, 9))
    kernels = [shape for name, shape in shapes(params).items() if "kernel" in name]
    assert kernels == [(81, 20), (20, 10), (10, 3), (3, 10), (10, 20), (20, 81)]


def test_sparse_start():
    kernel = np.asarray(sparse_normal(jax.random.key(0), (200, 300)))
    np.testing.assert_array_equal(np.count_nonzero(kernel, axis=0), 15)
    assert np.count_nonzero(kernel, axis=1).std() > 1  # not the same inputs for all units
    values = kernel[kernel != 0]
    assert values.mean() == pytest.approx(0, abs=0.05)
    assert values.std() == pytest.approx(1, abs=0.05)
    few = np.asarray(sparse_normal(jax.random.key(0), (4, 6)))
    assert np.count_nonzero(few) == 24


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_dropout_is_on_in_training_only(name):
    x = jax.random.uniform(jax.random.key(1), (4, 9, 9))
    _, params = make(name)

    def outputs(key=None, **options):
        module = build(name, 10, **(SMALL[name] | options))
        return apply(module, params, x, None if key is None else jax.random.key(key, impl="rbg"))

    clean = outputs()
    assert not np.allclose(outputs(0), outputs(1))
    np.testing.assert_array_equal(outputs(0, input_dropout=0, dropout=0), clean)
    assert not np.allclose(outputs(0, input_dropout=0), clean)
    assert not np.allclose(outputs(0, dropout=0), clean)


def test_cnn_needs_room():
    with pytest.raises(ModelError, match=r"cnn: images of 8 x 8 are too small .* at least 9 x 9"):
        abstract_size("cnn", (8, 8))
    assert abstract_size("cnn", (9, 9)) > 0
    assert abstract_size("cnn", (8, 8), channels=[4, 4]) > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("keras_mpl", {}, "'keras_mpl'; there are logistic, .*; did you mean keras_mlp?"),
        ("mlp", {"droput": 0.1}, "mlp has no option 'droput'; .*; did you mean dropout?"),
        ("mlp", {"parent": None}, "mlp has no option 'parent'"),
        ("logistic", {"hidden": 3}, "logistic has no option 'hidden'; it has none"),
        ("mlp", {"dropout": 1.0}, r"mlp.dropout=1.0: expected a rate of at least 0 and below 1"),
        ("mlp", {"dropout": True}, "mlp.dropout=True: expected a rate"),
        ("mlp", {"dropout": "half"}, "mlp.dropout='half': expected a rate"),
        ("mlp", {"hidden": 100}, "mlp.hidden=100: expected a list of integers of at least 1"),
        ("mlp", {"hidden": []}, r"mlp.hidden=\[\]: expected a list"),
        ("mlp", {"hidden": [10, 0]}, r"mlp.hidden=\[10, 0\]: expected a list"),
        ("keras_mlp", {"hidden": 0}, "keras_mlp.hidden=0: expected an integer of at least 1"),
        ("keras_mlp", {"hidden": 2.5}, "keras_mlp.hidden=2.5: expected an integer"),
        ("autoencoder", {"widths": "30"}, "autoencoder.widths='30': expected a list"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ModelError, match=message):
        build(name, 10, **options)
