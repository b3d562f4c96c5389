from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import gradxform as gx
from tests.methods import nested_params, step


def test_identity_returns_the_same_object() -> None:
    params = nested_params()
    for tx in (gx.adam(), optax.adamw(0.1), optax.chain(optax.clip(1.0), gx.momentum(0.1))):
        assert gx.eval_params(tx.init(params), params) is params


def test_through_deep_nesting() -> None:
    params = {"a": jnp.asarray([1.0, 2.0]), "b": {"c": jnp.asarray(3.0)}}
    inner = optax.inject_hyperparams(gx.nesterov)(learning_rate=0.1)
    tx = optax.chain(
        optax.clip(10.0),
        optax.apply_if_finite(
            optax.masked(
                optax.MultiSteps(inner, 1).gradient_transformation(), {"a": True, "b": False}
            ),
            3,
        ),
    )
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    evaluated = gx.eval_params(state, params)
    np.testing.assert_allclose(evaluated["a"], [0.9, 1.9], rtol=1e-6)  # θ = θ_0 - 0.1 g
    np.testing.assert_allclose(params["a"], [0.81, 1.81], rtol=1e-6)  # θ̃ = θ + 0.9 v
    assert evaluated["b"]["c"] is params["b"]["c"]


def test_in_a_container_of_ones_own() -> None:
    class TrainState(NamedTuple):
        opt_state: Any
        step: int

    params = nested_params()
    tx = gx.nesterov(0.1)
    params, opt_state = step(tx, params, tx.init(params))
    direct = gx.eval_params(opt_state, params)
    for container in (TrainState(opt_state, 1), {"opt": [opt_state]}, FrozenDict(opt=opt_state)):
        np.testing.assert_array_equal(
            gx.eval_params(container, params)["dense"]["kernel"], direct["dense"]["kernel"]
        )


def test_a_state_of_ones_own_joins_in() -> None:
    class ShiftedState(NamedTuple):
        shift: jax.Array

    @gx.eval_params.register
    def _(state: ShiftedState, params: Any) -> Any:
        return jax.tree.map(lambda p: p - state.shift, params)

    state = (optax.EmptyState(), ShiftedState(jnp.asarray(2.0)))
    assert gx.eval_params(state, {"x": jnp.asarray(5.0)})["x"] == 3.0


def test_under_jit_and_vmap() -> None:
    tx = gx.nesterov(0.1)

    def evaluated(x: jax.Array) -> jax.Array:
        updates, state = tx.update(x, tx.init(x), x)
        return gx.eval_params(state, x + updates)

    x = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(evaluated))(x), 0.9 * x, rtol=1e-6)


def test_python_floats_and_other_structures() -> None:
    for tx in (gx.nesterov(0.1), gx.polyak_average(gx.sgd(0.1))):
        assert gx.eval_params(tx.init(1.0), 1.0) == 1.0
        with pytest.raises(ValueError, match=r"different structures.*nnx\.as_pure"):
            gx.eval_params(tx.init({"w": 1.0}), {"v": 1.0})


def test_swapped_arguments_are_an_error() -> None:
    params = {"w": jnp.ones(2)}
    for tx in (gx.lbfgs(), optax.chain(optax.clip(1.0), gx.nesterov(0.1))):
        with pytest.raises(ValueError, match=r"call eval_params\(state, params\)"):
            gx.eval_params(params, tx.init(params))
