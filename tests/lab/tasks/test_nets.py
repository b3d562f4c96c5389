"""Nets of the user's own, and tasks of numbers."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import gradxform as gx
import gradxform.lab as lab
from gradxform.lab.data.own import split
from gradxform.lab.data.sets import Dataset, Split
from gradxform.lab.experiment import registry
from gradxform.lab.experiment.load import parse_config
from gradxform.lab.tasks.models import ModelError
from gradxform.lab.tasks.surfaces import surface_of
from gradxform.lab.tasks.task import Batch, make_task, objective
from gradxform.lab.training.race import race

eqx = pytest.importorskip("equinox")


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    yield
    registry.forget()


def numbers(outputs: int | None = None, scale: float = 1.0) -> Dataset:
    x = np.random.default_rng(0).normal(size=(40, 3))
    y = scale * (x @ [1.0, -2.0, 3.0] + 5)
    y = y if outputs is None else np.stack([y] * outputs, axis=1)
    train, test = split(Split(x.astype(np.float32), y), 0.25, seed=0)
    return Dataset("numbers", train, test, num_classes=0, scale=1.0)


class Linen(nn.Module):
    outputs: int
    width: int = 4
    drop: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(nn.Dense(self.width)(x))
        return nn.Dense(self.outputs)(nn.Dropout(self.drop, deterministic=not train)(x))


class Nnx(nnx.Module):
    def __init__(self, shape, outputs, rngs, width: int = 4, drop=0.0):
        self.first = nnx.Linear(shape[0], width, rngs=rngs)
        self.drop = nnx.Dropout(drop, rngs=rngs)
        self.last = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.first(x))))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, shape, outputs, key, width: int = 4, drop=0.0):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(shape[0], width, key=one)
        self.last = eqx.nn.Linear(width, outputs, key=two)
        self.drop = eqx.nn.Dropout(drop)

    def __call__(self, x, key=None):
        return self.last(self.drop(jnp.tanh(self.first(x)), key=key))


def pair(shape, outputs, width: int = 4, drop=0.0):
    def init(key):
        one, two = jax.random.split(key)
        return jax.random.normal(one, (*shape, width)), jax.random.normal(two, (width, outputs))

    def apply(params, x, key):
        x = jnp.tanh(x @ params[0])
        if key is not None:
            x = jnp.where(jax.random.uniform(key, x.shape) < drop, 0, x / (1 - drop))
        return x @ params[1]

    return init, apply


FORMS = {"linen": Linen, "nnx": Nnx, "equinox": Equinox, "pair": pair}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_net_is_a_task(form):
    lab.model("net")(FORMS[form])
    task = make_task(numbers(2), "net", model_options={"width": 5, "drop": 0.5}, l2=0.1)
    params, other = (jax.jit(task.init)(jax.random.key(seed)) for seed in (0, 1))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes[-2:] == [10, 15]  # kernels of width 5
    assert any(
        bool(jnp.any(a != b))
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    )
    batch = Batch(jnp.array(task.train.x[:8]), jnp.array(task.train.y[:8]), jnp.ones(8))
    values = [
        float(jax.jit(objective(task, batch, jax.random.key(seed)))(params)) for seed in (1, 1, 2)
    ]
    assert values[0] == values[1] != values[2]  # dropout, by the key alone
    sums = task.sums(params, batch)
    assert sums == task.sums(params, batch)  # and none in an evaluation
    without = make_task(numbers(2), "net", model_options={"width": 5, "drop": 0.5})
    plain = float(objective(without, batch, jax.random.key(1))(params))
    kernels = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim == 2)
    np.testing.assert_allclose(values[0] - plain, 0.1 * kernels, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_net_can_be_trained(form):
    lab.model("net")(FORMS[form])
    task = make_task(numbers(), "net", model_options={"width": 8}, standardise=True)
    batch = Batch(jnp.array(task.train.x), jnp.array(task.train.y), jnp.ones(30))
    value_fn = objective(task, batch, jax.random.key(0))
    params = task.init(jax.random.key(0))
    solution = gx.minimize(value_fn, params, gx.lbfgs(), max_steps=60)
    assert float(solution.value) < 0.1 * float(value_fn(params))


def broken(**arguments):
    raise RuntimeError("no such luck")


def with_batch_norm(outputs):
    return nn.Sequential([nn.Dense(outputs), nn.BatchNorm(use_running_average=False)])


class NormedNnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (broken, "model net: test_nets.py, line "),
        (broken, "RuntimeError: no such luck"),
        (lambda: 3, "should return a Flax module, an Equinox module, or a pair of functions"),
        (
            lambda: nn.Dense(7),
            "for inputs of shape (2, 3) the outputs should have the shape (2, 1)",
        ),
        (with_batch_norm, "it holds batch_stats, which no loss trains"),
        (NormedNnx, "it holds BatchStat, which no loss trains"),
        (lambda: (lambda key: {}, lambda params, x: x[:, :1]), "it has no parameters"),
        (
            lambda: (lambda key: jnp.arange(3), lambda params, x: x @ params),
            "should be real numbers",
        ),
        (lambda: (lambda key: jnp.ones(4), lambda params, x: x @ params), "TypeError: "),
    ],
)
def test_what_is_wrong_with_a_net_is_told_in_one_line(make, told):
    lab.model("net")(make)
    with pytest.raises(ModelError) as caught:
        make_task(numbers(), "net")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_our_models_need_images_for_convolutions():
    with pytest.raises(ModelError, match="cnn: needs images"):
        make_task(numbers(), "cnn")


@pytest.mark.parametrize(("loss", "delta"), [("squared", 1.0), ("huber", 0.5)])
def test_a_regression_measures_its_loss_and_the_error_in_units_of_the_target(loss, delta):
    data = numbers(scale=1000.0)
    task = make_task(data, "linear", loss=loss, delta=delta, standardise=True)
    for part in (task.train.x, task.train.y):
        np.testing.assert_allclose(part.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(part.std(axis=0), 1, rtol=1e-5)
    batch = Batch(jnp.array(task.test.x), jnp.array(task.test.y), jnp.ones(10))
    params = task.init(jax.random.key(0))  # zeros: predicts the mean
    sums = task.sums(params, batch)
    y = np.asarray(task.test.y)
    each = y**2 if loss == "squared" else np.asarray(optax.losses.huber_loss(y, delta=delta))
    np.testing.assert_allclose(sums["loss"], each.sum(), rtol=1e-5)
    error = data.test.y - data.train.y.mean()
    np.testing.assert_allclose(sums["rmse"], (error**2).sum(), rtol=1e-4)
    assert task.roots == ("rmse",)


def own_task(noise=0.0):
    x = jnp.linspace(-1, 1, 8)[:, None]

    def loss(outputs, x, y, weight):
        return jnp.sum(weight * (outputs - y) ** 2) / jnp.maximum(jnp.sum(weight), 1)

    def model(params, x, key):
        return x[:, 0] * params

    return lab.Task(
        init=lambda key: jnp.zeros(()), model=model, loss=loss, train=(x, 3 * x[:, 0] + noise)
    )


def config(task, optimizers=None, **sections):
    return parse_config(
        {"name": "x", "task": task, "training": {"epochs": 3, "batch_size": "full"}}
        | {"optimizers": optimizers or {"Newton": {"method": "newton"}}}
        | sections
    )


def test_a_task_of_the_users_own_is_raced():
    lab.task("line")(own_task)
    result = race(config({"kind": "line", "noise": 0.5}), None)
    assert result.name == "line"
    np.testing.assert_allclose(result.histories[0].params, 3.0, rtol=1e-5)
    np.testing.assert_allclose(result.histories[0].rows[-1]["train_loss"], 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: 3, "task mine: should return a gradxform.lab.Task, found int"),
        (lambda: own_task()._replace(train=(np.ones(3), np.ones(2))), "equally many rows"),
        (lambda: own_task()._replace(loss=lambda *_: jnp.ones(3)), "loss should return one real"),
        (lambda: own_task()._replace(metrics=lambda *_: {"a b": 1.0}), "metrics: 'a b' should be"),
        (lambda: own_task()._replace(metrics=lambda *_: {"error": 1.0}), "should have a loss"),
        (lambda: own_task(1 / 0), "test_nets.py, line "),
    ],
)
def test_what_is_wrong_with_a_task_is_told_in_one_line(make, told):
    lab.task("mine")(make)
    with pytest.raises(ModelError) as caught:
        race(config({"kind": "mine"}), None)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_surface_of_the_users_own():
    bounds = ((-1, 1), (-1, 1))
    lab.surface("bowl", start=(1.0, 0.5), bounds=bounds)(lambda x: jnp.sum(x**2))
    lab.surface("plane", start=(1.0, 0.5), bounds=bounds)(lambda x: x)
    assert surface_of("bowl").lowest == float("inf")
    result = race(
        parse_config(
            {"name": "x", "task": {"kind": "surface", "surface": "bowl"}}
            | {"training": {"steps": 2}, "optimizers": {"Newton": {"method": "newton"}}}
        )
    )
    assert result.histories[0].rows[-1]["value"] < 1e-20
    with pytest.raises(ModelError, match=r"surface plane: test_nets\.py, line \d+: ValueError: "):
        surface_of("plane")


def test_a_method_of_the_users_own_is_raced_and_its_errors_are_its_own():
    def mine(rate, power: int = 1):
        if power > 2:
            raise ValueError("too much")
        return gx.sgd(rate)

    lab.method("mine")(mine)
    lab.method("nothing")(lambda: None)
    lab.task("line")(own_task)
    optimizers = {
        "a": {"method": "mine", "rate": 0.5},
        "b": {"method": "sgd", "learning_rate": 0.5},
    }
    ours = race(config({"kind": "line"}, optimizers), None).histories
    assert [row["train_loss"] for row in ours[0].rows] == [r["train_loss"] for r in ours[1].rows]
    for table, told in [
        ({"method": "mine", "rate": 0.5, "power": 3}, r"test_nets\.py, line \d+: ValueError: too "),
        ({"method": "nothing"}, "nothing should return a gradient transformation, found None"),
    ]:
        with pytest.raises(Exception, match=told):
            race(config({"kind": "line"}, {"a": table}), None)
