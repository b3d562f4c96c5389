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
SEARCHES = {"bfgs": gx.bfgs, "lbfgs": gx.lbfgs, "nonlinear_cg": gx.nonlinear_cg}
EVERYTHING = {**METHODS, **SEARCHES}
without_search = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())
every_search = pytest.mark.parametrize("build", SEARCHES.values(), ids=SEARCHES.keys())
every_method = pytest.mark.parametrize("build", EVERYTHING.values(), ids=EVERYTHING.keys())


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


def nnx_loss(model: Net) -> jax.Array:
    return jnp.mean((model(X) - Y) ** 2)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


def linen_loss(params: dict) -> jax.Array:
    return jnp.mean((LinenNet().apply(params, X) - Y) ** 2)


def linen_state(tx: optax.GradientTransformation) -> TrainState:
    net = LinenNet()
    return TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(1), X), tx=tx)


@without_search
def test_linen_train_state(build) -> None:
    state = linen_state(build())

    @jax.jit
    def train_step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.grad(linen_loss)(state.params))

    before = linen_loss(state.params)
    for _ in range(60):
        state = train_step(state)
    assert linen_loss(gx.eval_params(state.opt_state, state.params)) < 0.5 * before


@every_search
def test_linen_train_state_hands_no_value_to_a_search(build) -> None:
    """``apply_gradients`` has no way to, so the step is written out, behind clipping here."""
    state = linen_state(optax.chain(optax.clip_by_global_norm(100.0), build()))
    with pytest.raises(ValueError, match=r"needs value=…: call tx\.update"):
        state.apply_gradients(grads=jax.grad(linen_loss)(state.params))

    @jax.jit
    def train_step(state: TrainState) -> TrainState:
        value, grads = jax.value_and_grad(linen_loss)(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )

    before = linen_loss(state.params)
    for _ in range(60):
        state = train_step(state)
    assert linen_loss(gx.eval_params(state.opt_state, state.params)) < 0.5 * before


@every_method
def test_nnx_optimizer(build) -> None:
    model = Net(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, build(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Net, optimizer: nnx.Optimizer) -> jax.Array:
        value, grads = nnx.value_and_grad(nnx_loss)(model)
        optimizer.update(model, grads, value=value)
        return value

    before = train_step(model, optimizer)
    for _ in range(60):
        train_step(model, optimizer)
    graphdef, params = nnx.split(model, nnx.Param)
    opt_state = nnx.as_pure(optimizer.opt_state)
    theta = gx.eval_params(opt_state, nnx.as_pure(params))
    evaluated = nnx.merge(graphdef, theta)
    assert nnx_loss(evaluated) < 0.5 * before


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


@pytest.mark.parametrize("labels", ["function", "prefix"])
def test_a_part_of_an_nnx_module_by_value_fn(labels: str) -> None:
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    parts = {"kernel": gx.coordinate_descent(), "bias": optax.set_to_zero()}
    by_name = lambda tree: jax.tree.map_with_path(lambda path, _: path[0].key, tree)
    prefix = nnx.State({"kernel": "kernel", "bias": "bias"})
    tx = gx.partition(parts, by_name if labels == "function" else prefix)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(X) - X @ jnp.asarray([[1.0], [2.0], [3.0]])) ** 2)

    @nnx.jit
    def train_step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        value_fn = gx.nnx_value_fn(model, loss)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)

    for _ in range(30):
        train_step(model, optimizer)
    np.testing.assert_allclose(model.kernel[...][:, 0], [1.0, 2.0, 3.0], atol=0.05)
    assert model.bias[...] == 0


def multi_steps(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    steps = optax.MultiSteps(tx, 1)  # what its gradient_transformation() gives takes no value
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"x": True}),
    "partition": lambda tx: optax.partition({"all": tx}, {"x": "all"}),
    "flatten": optax.flatten,
    "multi_steps": multi_steps,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(0.1),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_optax_wrappers_around_a_search(wrap) -> None:
    """Whole solves, with trial points that are not finite; the contract suite has single steps."""
    objective = lambda params: jnp.sum(params["x"] - jnp.log(params["x"]))  # NaN below 0
    start = {"x": jnp.asarray([8.0, 0.01])}
    solution = gx.minimize(objective, start, wrap(gx.bfgs()), tol=1e-4)
    assert int(solution.status) == gx.Status.converged
    np.testing.assert_allclose(solution.params["x"], 1.0, atol=1e-3)
    state, params = solution.loop.state, solution.loop.params
    theta = gx.eval_params(state, params)
    np.testing.assert_allclose(theta["x"], 1.0, atol=1e-2)
