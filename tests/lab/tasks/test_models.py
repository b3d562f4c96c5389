"""The models: shapes, sizes, starts, dropout, and clear refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx
from gradxform.lab.tasks import models
from gradxform.lab.tasks.models import MODELS, ModelError, build, sparse_normal

SMALL = {
    "logistic": {},
    "keras_mlp": {},
    "linear": {},
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
    ("name", "shape"),
    [*((name, (9, 9)) for name in MODELS if name != "transformer"), ("cnn", (9, 9, 3))],
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
        (
            "transformer",
            (64,),
            (10 + 64) * 64  # characters and positions
            + 2 * (4 * 64 + 65 * 192 + 65 * 64 + 65 * 256 + 257 * 64)  # blocks
            + 2 * 64 + 65 * 10,  # the last norm and the head
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


def small_transformer(length=6, layers=2):
    """A transformer of two heads, with parameters away from its start, and characters for it."""
    module = build("transformer", 5, width=4, layers=layers, heads=2)
    x = jax.random.randint(jax.random.key(1), (3, length), 0, 5).astype(jnp.uint8)
    init = jax.jit(lambda key: module.init(key, x, train=False)["params"])
    params = jax.tree.map(
        lambda p: p + 0.1 * np.random.default_rng(p.size).normal(size=p.shape).astype(p.dtype),
        init(jax.random.key(0, impl="rbg")),
    )
    return module, params, x


def test_transformer_sees_only_what_came_before():
    module, params, x = small_transformer()
    changed = (x[0] + jnp.eye(6, dtype=jnp.uint8)) % 5  # one at each place
    outputs = apply(module, params, jnp.concatenate([x, changed]))
    assert outputs.shape == (9, 6, 5)
    for place, after in enumerate(outputs[3:]):
        np.testing.assert_array_equal(after[:place], outputs[0, :place])
        assert np.all(np.any(after[place:] != outputs[0, place:], axis=-1))


def test_transformer_by_hand():
    """In NumPy, head by head and position by position."""
    module, params, x = small_transformer()
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(h, name):
        centred = h - h.mean()
        return centred / np.sqrt(h.var() + 1e-6) * p[name]["scale"] + p[name]["bias"]

    def dense(h, name):
        return h @ p[name]["kernel"] + p[name]["bias"]

    def gelu(h):
        return h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    h = [p["Embed_0"]["embedding"][c] + p["positions"][i] for i, c in enumerate(x[0])]
    for block in range(2):
        dense_names = [f"Dense_{4 * block + i}" for i in range(4)]
        rows = [dense(norm(v, f"LayerNorm_{2 * block}"), dense_names[0]) for v in h]
        q, k, v = (np.array(rows)[:, at : at + 4] for at in (0, 4, 8))
        for i in range(len(h)):
            read = np.zeros(4)
            for head in (slice(0, 2), slice(2, 4)):
                weights = np.exp(k[: i + 1, head] @ q[i, head] / np.sqrt(2))
                read[head] = weights @ v[: i + 1, head] / weights.sum()
            h[i] = h[i] + dense(read, dense_names[1])
        for i in range(len(h)):
            inner = gelu(dense(norm(h[i], f"LayerNorm_{2 * block + 1}"), dense_names[2]))
            h[i] = h[i] + dense(inner, dense_names[3])
    expected = [dense(norm(v, "LayerNorm_4"), "Dense_8") for v in h]
    np.testing.assert_allclose(apply(module, params, x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gauss_newton_of_a_transformer_is_the_dense_one():
    module, params, x = small_transformer(length=3, layers=1)
    flat, unravel = ravel_pytree(jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params))
    y = jnp.roll(x, -1, axis=1).astype(jnp.int32)

    def model(params, x):
        return jnp.asarray(module.apply({"params": params}, x, train=False))

    def loss(outputs, y):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))

    @jax.jit
    def matrices(flat):
        value_fn = gx.compose(loss, lambda flat, x: model(unravel(flat), x), x=x, y=y)
        product, bend = (c(value_fn, flat) for c in (gx.gauss_newton(), gx.hessian()))
        jacobian = jax.jacrev(lambda flat: model(unravel(flat), x).ravel())(flat)
        logits = model(unravel(flat), x)
        outer = jax.hessian(lambda z: loss(z.reshape(logits.shape), y))(logits.ravel())
        return (
            (jax.vmap(product)(jnp.eye(flat.size)), jacobian.T @ outer @ jacobian),
            (bend(flat), jax.grad(lambda p: jnp.vdot(jax.grad(value_fn)(p), flat))(flat)),
        )

    for products, exact in matrices(flat):
        np.testing.assert_allclose(products, exact, atol=1e-12 * np.abs(exact).max())


def test_heads_of_a_transformer_share_its_width():
    with pytest.raises(ModelError, match="transformer: width=30 is no multiple of heads=4"):
        abstract_size("transformer", (8,), width=30)


def test_cnn_needs_room():
    with pytest.raises(ModelError, match=r"cnn: images of 8 x 8 are too small .* at least 9 x 9"):
        abstract_size("cnn", (8, 8))
    assert abstract_size("cnn", (9, 9)) > 0
    assert abstract_size("cnn", (8, 8), channels=[4, 4]) > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("keras_mpl", {}, "'keras_mpl'; there are linear, .*; did you mean keras_mlp?"),
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
        ("transformer", {"depth": 2}, "transformer has no option 'depth'; .* width, layers, heads"),
        ("transformer", {"heads": 0}, "transformer.heads=0: expected an integer of at least 1"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ModelError, match=message):
        build(name, 10, **options)


@pytest.mark.parametrize("size", [(5, 5), (2, 4)])
def test_convolution_by_matrices_is_the_convolution(size):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), (*size, 3, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(models._by_matrices(x, kernel), expected, rtol=1e-4, atol=1e-5)
