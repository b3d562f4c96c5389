"""Tasks: exact weighted means, scaling, penalties, fresh samples, fitting pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx
from gradxform.lab.data.sets import DataError, Dataset, Split
from gradxform.lab.tasks.task import (
    Batch,
    ModelError,
    kernel_penalty,
    make_task,
    objective,
    shift_images,
)

SMALL = {
    "logistic": {},
    "keras_mlp": {},
    "mlp": {"hidden": [16]},
    "cnn": {"channels": [3, 3, 4], "hidden": 8},
    "autoencoder": {"widths": [12, 3]},
}


def dataset(shape=(9, 9), n=40, seed=0):
    rng = np.random.default_rng(seed)

    def split(n):
        x = rng.integers(0, 256, (n, *shape), np.uint8)
        return Split(x, rng.integers(0, 10, n).astype(np.int32))

    return Dataset("noise", split(n), split(10), num_classes=10, scale=255.0)


def task_of(model, shape=(9, 9), **options):
    return jitted(make_task(dataset(shape), model, model_options=SMALL[model], **options))


def batch_of(split, indices, weights=None):
    weights = jnp.ones(len(indices)) if weights is None else jnp.asarray(weights, jnp.float32)
    indices = np.asarray(indices)
    return Batch(jnp.asarray(split.x[indices]), jnp.asarray(split.y[indices]), weights)


def jitted(task):
    """The task with its functions compiled: eager, each operation would be compiled by itself."""
    return task._replace(
        init=jax.jit(task.init),
        model=jax.jit(task.model),
        loss=jax.jit(task.loss),
        metrics=jax.jit(task.metrics),
        draw=jax.jit(task.draw),
    )


def value_and_grad(task):
    return jax.jit(
        lambda params, batch, key: jax.value_and_grad(objective(task, batch, key))(params)
    )


def started(task):
    """Parameters away from symmetric starts."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype),
        jax.eval_shape(task.init, jax.random.key(0)),
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [*((model, (9, 9)) for model in SMALL), ("cnn", (9, 9, 3)), ("autoencoder", (4, 4, 3))],
)
def test_contract(model, shape):
    task = task_of(model, shape, validation_split=0.25)
    assert task.name == f"noise/{model}"
    assert len(task.train.y) == 30
    assert task.validation is not None
    assert len(task.validation.y) == 10
    params, batch = started(task), batch_of(task.train, range(4))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    key = jax.random.key(1)
    gradient = value_and_grad(task)
    loss, grads = gradient(params, batch, key)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    slope = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads))
    step = min(1e-2 / slope, 1e-2)  # short enough for the loss to fall by step times slope
    lower, _ = gradient(jax.tree.map(lambda p, g: p - step * g, params, grads), batch, key)
    np.testing.assert_allclose(loss - lower, step * slope, rtol=0.2)
    sums = task.metrics(params, batch)
    assert set(sums) == {"loss", "error" if model == "autoencoder" else "accuracy"}
    assert all(value.shape == () for value in sums.values())


@pytest.mark.parametrize("model", ["logistic", "autoencoder"])
def test_init_is_of_the_key(model):
    task = task_of(model, (4, 4))
    a, b = (task.init(jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, abstract)
    if model == "autoencoder":
        other = jax.tree.leaves(task.init(jax.random.key(1)))
        assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), other, strict=True))


@pytest.mark.parametrize("model", ["keras_mlp", "autoencoder"])
def test_partial_batch_is_the_mean_of_its_examples(model):
    task = task_of(model)
    params, key = started(task), jax.random.key(0)
    padded = batch_of(task.train, [3, 1, 4, 0, 0], [1, 1, 1, 0, 0])
    exact = batch_of(task.train, [3, 1, 4])
    gradient = value_and_grad(task)
    (loss, _), _ = results = gradient(params, padded, key), gradient(params, exact, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)
    singles = [task.metrics(params, batch_of(task.train, [i])) for i in (3, 1, 4)]
    sums = task.metrics(params, padded)
    for name, value in sums.items():
        np.testing.assert_allclose(value, sum(s[name] for s in singles), rtol=1e-5)
    np.testing.assert_allclose(loss, sums["loss"] / 3, rtol=1e-5)


def test_cross_entropy_and_accuracy_by_hand():
    task = task_of("logistic")
    params = started(task)
    batch = batch_of(task.train, range(20))
    layer = params["Dense_0"]
    x = np.asarray(batch.x, np.float64).reshape(20, -1) / 255
    logits = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
    logits -= logits.max(axis=1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = np.asarray(batch.y)
    sums = task.metrics(params, batch)
    np.testing.assert_allclose(sums["loss"], -np.log(chances[np.arange(20), y]).sum(), rtol=1e-5)
    assert float(sums["accuracy"]) == np.sum(logits.argmax(axis=1) == y)


def test_reconstruction_error_by_hand():
    task = task_of("autoencoder")
    params = jax.tree.map(jnp.zeros_like, started(task))  # every pixel becomes 1/2
    batch = batch_of(task.train, range(5))
    errors = (np.asarray(batch.x) / 255 - 0.5) ** 2
    sums = task.metrics(params, batch)
    np.testing.assert_allclose(sums["loss"], errors.sum(), rtol=1e-5)
    np.testing.assert_array_equal(sums["error"], sums["loss"])


def test_cross_entropy_of_pixels_by_hand():
    task, squared = task_of("autoencoder", loss="cross_entropy"), task_of("autoencoder")
    params, batch, key = started(task), batch_of(task.train, range(5)), jax.random.key(0)
    x = np.asarray(batch.x, np.float64) / 255
    chance = 1 / (1 + np.exp(-np.asarray(task.model(params, batch.x, key), np.float64)))
    entropy = -np.sum(x * np.log(chance) + (1 - x) * np.log(1 - chance))
    sums = task.metrics(params, batch)
    np.testing.assert_allclose(sums["loss"], entropy, rtol=1e-5)
    np.testing.assert_allclose(objective(task, batch, key)(params), entropy / 5, rtol=1e-5)
    np.testing.assert_allclose(sums["error"], np.sum((chance - x) ** 2), rtol=1e-5)
    np.testing.assert_allclose(sums["error"], squared.metrics(params, batch)["error"], rtol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_the_loss_of_an_autoencoder_is_convex_in_its_outputs(loss):
    task = task_of("autoencoder", (2, 2), loss=loss)
    batch = batch_of(task.train, range(3))
    outputs = task.model(started(task), batch.x, jax.random.key(0))
    hessian = jax.hessian(lambda flat: task.loss(flat.reshape(outputs.shape), *batch))
    assert np.linalg.eigvalsh(hessian(outputs.ravel())).min() > 0


def test_gauss_newton_takes_the_penalty_exactly():
    """Logistic regression is linear: its Gauss–Newton matrix is its Hessian."""
    task = task_of("logistic", (2, 2), l1=0.1, l2=0.3)
    params, batch = started(task), batch_of(task.train, range(6), [1, 1, 1, 1, 1, 0])
    value_fn = objective(task, batch, jax.random.key(0))
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda flat: value_fn(unravel(flat))))(flat)
    product = gx.gauss_newton()(value_fn, params)
    matrix = jax.jit(jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0]))(jnp.eye(flat.size))
    np.testing.assert_allclose(matrix, hessian, atol=1e-6)
    free = make_task(dataset((2, 2)), "logistic")
    fit = objective(free, batch, jax.random.key(0))
    difference = hessian - jax.jit(jax.hessian(lambda flat: fit(unravel(flat))))(flat)
    kernels = ravel_pytree(jax.tree.map(lambda p: jnp.full(p.shape, p.ndim == 2), params))[0]
    np.testing.assert_allclose(difference, 2 * 0.3 * np.diag(kernels), atol=1e-6)


def test_data_given_anew_take_the_place_of_the_batch():
    task = task_of("keras_mlp")
    params, key = started(task), jax.random.key(0)
    value_fn = objective(task, batch_of(task.train, range(6)), key)
    part = batch_of(task.train, [1, 4])
    expected = objective(task, part, key)(params)
    np.testing.assert_allclose(value_fn(params, **part._asdict()), expected, rtol=1e-6)
    filling = part._replace(weight=jnp.zeros(2))
    assert float(value_fn(params, **filling._asdict())) == 0


def test_dropout_is_in_the_loss_and_not_in_the_metrics():
    task = task_of("mlp")
    params, batch = started(task), batch_of(task.train, range(4))
    a, b = (objective(task, batch, jax.random.key(key))(params) for key in (0, 1))
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(a, objective(task, batch, jax.random.key(0))(params))
    clean = jitted(make_task(dataset(), "mlp", model_options={"hidden": [16], "dropout": 0.0}))
    assert not np.allclose(a, objective(clean, batch, jax.random.key(0))(params))
    np.testing.assert_array_equal(
        task.metrics(params, batch)["loss"], clean.metrics(params, batch)["loss"]
    )


def test_penalty_is_added_to_the_loss_alone():
    plain, both = task_of("keras_mlp"), task_of("keras_mlp", l1=0.01, l2=0.02)
    params, batch, key = started(plain), batch_of(plain.train, range(4)), jax.random.key(0)
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params.values()]
    penalty = sum(0.01 * np.abs(w).sum() + 0.02 * (w**2).sum() for w in kernels)
    with_penalty, without = (objective(task, batch, key)(params) for task in (both, plain))
    difference = with_penalty - without
    np.testing.assert_allclose(difference, penalty, rtol=1e-5)
    np.testing.assert_allclose(kernel_penalty(params, 0.01, 0.02), penalty, rtol=1e-5)
    jax.tree.map(
        np.testing.assert_array_equal, both.metrics(params, batch), plain.metrics(params, batch)
    )


def test_penalty_spares_biases_and_has_the_documented_gradient():
    params = {"a": {"kernel": jnp.array([[1.0, -3.0]]), "bias": jnp.array([5.0])}}
    gradient = jax.grad(kernel_penalty)(params, 0.5, 0.25)
    np.testing.assert_allclose(gradient["a"]["kernel"], [[1.0, -2.0]])
    np.testing.assert_array_equal(gradient["a"]["bias"], 0)


def cnn_task(data):
    options = {"channels": [3], "hidden": 4}
    return jitted(make_task(data, "cnn", model_options=options, validation_split=0.5))


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 3)])
def test_cnn_inputs_are_standardised_by_the_training_part(shape):
    """An affine change of the pixels, channel by channel, changes nothing."""
    plain = dataset(shape)
    gain = np.array([2, 3, 1][: shape[2] if len(shape) == 3 else 1], np.uint8)
    small = plain._replace(
        train=plain.train._replace(x=plain.train.x // 4),
        test=plain.test._replace(x=plain.test.x // 4),
    )
    grown = small._replace(train=small.train._replace(x=small.train.x * gain + np.uint8(7)))
    losses = []
    for data in (small, grown):
        task = cnn_task(data)
        batch = batch_of(task.train, range(6))
        losses.append(task.metrics(started(task), batch)["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    # and the part held out has no say in it
    changed = small.train.x.copy()
    changed[20:] = 0
    task = cnn_task(small._replace(train=small.train._replace(x=changed)))
    sums = task.metrics(started(task), batch_of(task.train, range(6)))
    np.testing.assert_allclose(sums["loss"], losses[0], rtol=1e-6)


def test_cnn_of_constant_images_is_finite():
    data = dataset((5, 5))
    data = data._replace(train=data.train._replace(x=np.full_like(data.train.x, 9)))
    task = cnn_task(data)
    sums = task.metrics(started(task), batch_of(task.train, range(3)))
    assert np.isfinite(sums["loss"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"l2": -1.0}, ModelError, "l2=-1.0: expected a factor of at least 0"),
        ({"l1": float("nan")}, ModelError, "l1=nan: expected"),
        ({"loss": "crossentropy"}, ModelError, "loss='crossentropy': expected one of squared, "),
        ({"validation_split": 1.5}, DataError, "validation split is 1.5"),
        ({"validation_split": -0.5}, DataError, "validation split is -0.5"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        task_of("logistic", **options)


def test_a_model_that_does_not_fit_is_refused_at_once():
    with pytest.raises(ModelError, match="images of 8 x 8 are too small"):
        task_of("cnn", (8, 8))


# Fresh samples


def smooth(shape, n=3):
    """Images of a slope down and another across: any shift can be read off them."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = 6 * rows + 2 * columns
    image = image if len(shape) == 2 else image[..., None] + np.arange(shape[2])
    return np.broadcast_to(image, (n, *shape)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (28, 14, 3)])
def test_shift_moves_by_at_most_a_fourteenth(shape):
    n = 200
    batch = Batch(jnp.asarray(smooth(shape, n)), jnp.arange(n), jnp.ones(n))
    moved = jax.jit(shift_images)(jax.random.key(0), batch)
    assert moved.x.shape == batch.x.shape
    assert moved.x.dtype == jnp.uint8
    np.testing.assert_array_equal(moved.y, batch.y)
    np.testing.assert_array_equal(moved.weight, batch.weight)
    inner = (slice(None), slice(3, -3), slice(3, -3))
    change = np.asarray(moved.x, int)[inner] - np.asarray(batch.x, int)[inner]
    # On a plane a shift adds one number to all pixels, but for rounding to whole grey levels.
    change = change.reshape(n, -1)
    assert np.all(np.ptp(change, axis=1) <= 1)
    limit = (6 * shape[0] + 2 * shape[1]) / 14
    assert np.abs(change).max() <= limit + 1
    assert np.abs(change).max() > 0.7 * limit
    assert change.min() < 0 < change.max()
    assert len(np.unique(change[:, 0])) > 5  # independent for each image


def test_shift_rounds_to_the_nearest_level():
    """Dark and light are treated alike: the negative of a sample is a sample of the negative."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (20, 9, 9), np.uint8))
    batch = Batch(x, jnp.arange(20), jnp.ones(20))
    negative = shift_images(jax.random.key(0), batch._replace(x=255 - x))
    np.testing.assert_array_equal(negative.x, 255 - shift_images(jax.random.key(0), batch).x)


def test_shift_by_whole_pixels_and_at_the_border():
    from gradxform.lab.tasks.task import _interpolation

    line = jnp.array([1.0, 2.0, 4.0, 8.0])
    for shift, expected in [(0, [1, 2, 4, 8]), (1, [1, 1, 2, 4]), (-2, [4, 8, 8, 8])]:
        matrix = _interpolation(4, jnp.array([float(shift)]))[0]
        np.testing.assert_allclose(matrix @ line, expected)
    np.testing.assert_allclose(_interpolation(4, jnp.array([0.5]))[0] @ line, [1, 1.5, 3, 6])


def test_draw_is_new_with_each_key():
    task = task_of("logistic")
    batch = batch_of(task.train, range(4))
    a, b = (task.draw(jax.random.key(key), batch).x for key in (0, 1))
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, task.draw(jax.random.key(0), batch).x)
