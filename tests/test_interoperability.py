"""The methods in the training loops that people have."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import gradxform as gx

X = jax.random.normal(jax.random.key(0), (64, 3))
Y = jnp.sin(X.sum(axis=1, keepdims=True))
METHODS = {
    "nesterov": lambda: gx.nesterov(0.05),
    "adam": lambda: gx.adam(0.02),
    "rmsprop_nesterov": lambda: gx.rmsprop(0.005, momentum=0.9, nesterov=True),
    "polyak_average": lambda: gx.polyak_average(gx.momentum(0.05), decay=0.9),
}
every_method = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())


@every_method
def test_linen_train_state(build) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))

    net = Net()
    state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(1), X), tx=build())
    loss = lambda params: jnp.mean((net.apply(params, X) - Y) ** 2)

    @jax.jit
    def train_step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    before = loss(state.params)
    for _ in range(60):
        state = train_step(state)
    assert loss(gx.eval_params(state.opt_state, state.params)) < 0.5 * before


@every_method
def test_nnx_optimizer(build) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.hidden = nnx.Linear(3, 8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(jnp.tanh(self.hidden(x)))

    model = Net(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, build(), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(X) - Y) ** 2)

    @nnx.jit
    def train_step(model: Net, optimizer: nnx.Optimizer) -> jax.Array:
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value)
        return value

    before = train_step(model, optimizer)
    for _ in range(60):
        train_step(model, optimizer)
    graphdef, params = nnx.split(model, nnx.Param)
    opt_state = nnx.as_pure(optimizer.opt_state)
    theta = gx.eval_params(opt_state, nnx.as_pure(params))
    evaluated = nnx.merge(graphdef, theta)
    assert loss(evaluated) < 0.5 * before


@every_method
def test_equinox(build) -> None:
    model = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(1))
    tx = build()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda params: jnp.mean((jax.vmap(eqx.combine(params, static))(X) - Y) ** 2)

    @eqx.filter_jit
    def train_step(params: eqx.Module, state: optax.OptState):
        value, grads = eqx.filter_value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return eqx.apply_updates(params, updates), state

    before, state = loss(params), tx.init(params)
    for _ in range(60):
        params, state = train_step(params, state)
    assert loss(gx.eval_params(state, params)) < 0.5 * before


def test_coordinate_descent_in_nnx() -> None:
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(model)
    optimizer = nnx.Optimizer(model, gx.coordinate_descent(), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(X) - X @ jnp.asarray([[1.0], [2.0], [3.0]])) ** 2)

    @nnx.jit
    def train_step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        _, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value_fn=lambda state: loss(nnx.merge(graphdef, state)))

    for _ in range(30):
        train_step(model, optimizer)
    np.testing.assert_allclose(model.kernel[...][:, 0], [1.0, 2.0, 3.0], atol=0.05)
