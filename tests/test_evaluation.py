from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import gradxform as gx
from tests.methods import nested_params, objective, run, step


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


# -- Optax's own methods whose loop holds other parameters than those to use

SCHEDULE_FREE = {
    "sgd": lambda: optax.contrib.schedule_free_sgd(0.05, b1=0.8),
    "adamw": lambda: optax.contrib.schedule_free_adamw(0.02, weight_decay=0.01),
    "over ours": lambda: optax.contrib.schedule_free(gx.rmsprop(0.02), 0.02, b1=0.95),
}
NESTINGS = {
    "alone": lambda build: build(),
    "chain": lambda build: optax.chain(optax.clip_by_global_norm(5.0), build()),
    "MultiSteps": lambda build: optax.MultiSteps(build(), 2).gradient_transformation(),
    "apply_if_finite": lambda build: optax.apply_if_finite(optax.chain(build()), 3),
    "accumulate": lambda build: gx.accumulate(build(), 2),
}


def state_of(kind: type, state: Any) -> Any:
    """The one state of this class in a state, at any depth."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    (found,) = (x for x in leaves if isinstance(x, kind))
    return found


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("base", SCHEDULE_FREE)
def test_schedule_free_is_optaxs_own_function(base: str, nesting: str) -> None:
    tx = NESTINGS[nesting](SCHEDULE_FREE[base])
    params, state = run(tx, nested_params(), 5)
    own = state_of(optax.contrib.ScheduleFreeState, state)
    expected = optax.contrib.schedule_free_eval_params(own, params)
    evaluated = gx.eval_params(state, params)
    chex.assert_trees_all_close(evaluated, expected, rtol=1e-6)
    assert float(jnp.abs(evaluated["scale"] - params["scale"])) > 1e-3  # x is not y


def test_schedule_free_with_injected_hyperparameters_and_under_a_mask() -> None:
    inject = optax.inject_hyperparams(optax.contrib.schedule_free_sgd)
    params, state = run(inject(learning_rate=0.05), nested_params(), 4)
    own = state_of(optax.contrib.ScheduleFreeState, state)
    expected = optax.contrib.schedule_free_eval_params(own, params)
    chex.assert_trees_all_close(gx.eval_params(state, params), expected, rtol=1e-6)

    start = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(3.0)}
    mask = {"a": True, "b": False}
    params, state = run(optax.masked(optax.contrib.schedule_free_sgd(0.05), mask), start, 4)
    evaluated = gx.eval_params(state, params)
    alone = state_of(optax.contrib.ScheduleFreeState, state)
    expected = (params["a"] - (1 - alone.b1) * alone.z["a"]) / alone.b1
    np.testing.assert_allclose(evaluated["a"], expected, rtol=1e-6)
    assert evaluated["b"] is params["b"]


def test_schedule_free_keeps_the_dtype_of_the_parameters() -> None:
    tx = optax.contrib.schedule_free_sgd(0.05, state_dtype=jnp.float32)
    start = nested_params(jnp.bfloat16)
    dtypes = jax.eval_shape(lambda p: gx.eval_params(tx.init(p), p), start)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(dtypes))


def test_minimize_returns_the_best_point_that_schedule_free_evaluated() -> None:
    tx = optax.contrib.schedule_free_sgd(0.05)
    solution = gx.minimize(objective, nested_params(), tx, max_steps=40)
    np.testing.assert_allclose(objective(solution.params), solution.value, rtol=1e-5)
    assert solution.value < 0.5 * objective(nested_params())
    average = gx.eval_params(solution.loop.state, solution.loop.params)
    own = state_of(optax.contrib.ScheduleFreeState, solution.loop.state)
    expected = optax.contrib.schedule_free_eval_params(own, solution.loop.params)
    chex.assert_trees_all_close(average, expected, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_lookahead_evaluates_the_slow_parameters(wrap: Any) -> None:
    tx = optax.with_extra_args_support(wrap(optax.lookahead(optax.adam(0.1), 3, 0.5)))
    params = optax.LookaheadParams.init_synced(nested_params())
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.grad(objective)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
        evaluated = gx.eval_params({"opt": state}, params)
        chex.assert_trees_all_equal(evaluated, params.slow)
    assert float(jnp.abs(params.fast["scale"] - params.slow["scale"])) > 1e-3
    with pytest.raises(ValueError, match=r"^eval_params: optax\.lookahead .*LookaheadParams"):
        gx.eval_params(state, params.fast)


def test_sam_evaluates_the_undisturbed_parameters() -> None:
    outer, disturbance = gx.nesterov(0.02), optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    tx = optax.contrib.sam(outer, disturbance, sync_period=2)
    start = params = nested_params()
    state = tx.init(params)
    plain, outer_state = start, outer.init(start)
    for _ in range(3):
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)  # disturbed
        expected = gx.eval_params(outer_state, plain)
        chex.assert_trees_all_close(gx.eval_params(state, params), expected, rtol=1e-5)
        assert float(jnp.abs(params["scale"] - expected["scale"])) > 1e-2

        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, outer_state = outer.update(grads, outer_state, plain)
        plain = optax.apply_updates(plain, updates)
        expected = gx.eval_params(outer_state, plain)
        chex.assert_trees_all_close(gx.eval_params(state, params), expected, rtol=1e-5)
