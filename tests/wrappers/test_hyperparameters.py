from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.configuration import configuration_key
from tests.methods import METHODS, nested_params, run, step
from tests.wrappers.cases import close, described


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adam", "bfloat16"),
        ("rmsprop_nesterov", "float32"),
        ("coordinate_descent", "float32"),
        ("lbfgs", "float32"),
    ],
)
def test_injected_is_the_method_itself(name: str, dtype: str) -> None:
    method = METHODS[name]
    params = nested_params(jnp.dtype(dtype))
    tx = gx.inject_hyperparams(method.factory)(**method.arguments)
    injected, state = run(tx, params, 4)
    plain, plain_state = run(method.build(), params, 4)
    close(injected, plain)
    close(gx.eval_params(state, injected), gx.eval_params(plain_state, plain))
    assert set(state.hyperparams) == {
        name for name, x in method.arguments.items() if isinstance(x, float)
    }
    assert all(x.dtype == jnp.float32 for x in state.hyperparams.values())


def test_hyperparameters_can_be_read_and_set() -> None:
    tx = gx.inject_hyperparams(gx.momentum)(0.1, momentum=0.9)
    theta = jnp.asarray(1.0)
    state = tx.init(theta)
    assert {k: round(float(x), 6) for k, x in state.hyperparams.items()} == {
        "learning_rate": 0.1,
        "momentum": 0.9,
    }
    update = jax.jit(tx.update)
    for state_now in (
        optax.tree.set(state, learning_rate=0.5),
        state._replace(hyperparams={**state.hyperparams, "learning_rate": 0.5}),
    ):
        updates, after = update(theta, state_now, theta)
        np.testing.assert_allclose(updates, -0.5)
        assert described(after) == described(state)


def test_schedules_and_whole_numbers() -> None:
    tx = gx.inject_hyperparams(gx.momentum)(lambda count: 1 / (1 + count), momentum=0.0)
    theta = jnp.asarray(1.0)
    state = tx.init(theta)
    for k in range(3):
        updates, state = tx.update(theta, state, theta)
        np.testing.assert_allclose(updates, -1 / (1 + k), rtol=1e-6)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], 1 / (1 + k), rtol=1e-6)

    build = gx.inject_hyperparams(gx.lbfgs)
    state = build(memory_size=3, max_trials=jnp.asarray(7), decrease=0.2).init(jnp.ones(4))
    assert "memory_size" not in state.hyperparams
    assert state.hyperparams["max_trials"].dtype == jnp.int32
    assert set(state.hyperparams) == {"max_trials", "decrease", "curvature", "noise"}


def test_a_stateful_schedule_sees_the_extra_arguments() -> None:
    class Halving(optax.schedules.StatefulSchedule):
        def init(self) -> Any:
            return jnp.asarray(1.0)

        def update(self, state: Any, **extra: Any) -> Any:
            return jnp.where(extra["value"] > 1, state / 2, state)

        def __call__(self, state: Any, **extra: Any) -> Any:
            return state

    tx = gx.inject_hyperparams(gx.sgd)(Halving())
    theta = jnp.asarray(1.0)
    state = tx.init(theta)
    moved = []
    for value in (3.0, 0.0, 3.0):
        updates, state = tx.update(theta, state, theta, value=jnp.asarray(value))
        moved.append(float(updates))
    assert moved == [-1.0, -0.5, -0.5]


def test_injected_optax_methods_keep_their_dtypes_and_the_precision() -> None:
    """Optax's own wrapper rounds b2 = 0.999 to 1 here and divides 0 by 0."""
    params = {"w": jnp.asarray([1.0, -2.0], jnp.bfloat16)}
    tx = gx.inject_hyperparams(optax.adam)(0.1, b2=0.999)
    state = tx.init(params)
    (end, last) = jax.jit(lambda p: run(tx, p, 3))(params)
    assert described(last) == described(state)
    assert end["w"].dtype == jnp.bfloat16
    assert float(jnp.sum(jnp.abs(end["w"]))) < 3.0
    np.testing.assert_allclose(last.hyperparams["b2"], 0.999, rtol=1e-6)


def test_injected_in_minimize_vmap_and_donation() -> None:
    bowl = lambda x: jnp.sum((x - 1) ** 2)
    build = gx.inject_hyperparams(gx.adam)
    assert configuration_key(build(0.1)) is not None
    assert configuration_key(build(0.1)) == configuration_key(build(0.1))
    assert configuration_key(build(0.1)) != configuration_key(build(0.2))
    solution = gx.minimize(bowl, jnp.zeros(3), build(0.1), tol=1e-3)
    assert int(solution.status) == gx.Status.converged

    rates = jnp.asarray([0.1, 0.3])
    swept = jax.vmap(lambda rate: run(build(rate), jnp.ones(3), 3)[0])(rates)
    close(swept[1], run(gx.adam(0.3), jnp.ones(3), 3)[0])

    rate = jnp.asarray(0.1)
    tx = gx.inject_hyperparams(gx.rmsprop)(rate, decay=rate, eps=1e-3)
    donating = jax.jit(lambda p, s: step(tx, p, s), donate_argnums=(0, 1))
    donating(jnp.ones(3), tx.init(jnp.ones(3)))
    assert float(rate) == pytest.approx(0.1)


def test_inject_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="memory"):
        gx.inject_hyperparams(gx.lbfgs, "memory")
    with pytest.raises(TypeError, match=r"list it in static_args=\"preconditioner\""):
        gx.inject_hyperparams(lambda preconditioner: gx.sgd(0.1))(lambda a, b: a)
    with pytest.raises(TypeError, match=r"list it in static_args=\"direction\""):
        gx.inject_hyperparams(lambda direction: gx.sgd(0.1))(lambda count: "down")
    with pytest.raises(ValueError, match=r"adam\(b2=1.5\)"):
        gx.inject_hyperparams(gx.adam)(0.1, b2=1.5)
    default = lambda rate, solve=jnp.dot: gx.sgd(rate)
    assert set(gx.inject_hyperparams(default)(0.1).init(jnp.ones(2)).hyperparams) == {"rate"}
