import inspect
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.methods import nested_params, run, step
from tests.wrappers.cases import FREEZE, LABELS, MASK, START, close, coupled, described

PART_METHODS = {
    "nesterov": lambda: gx.nesterov(0.05),
    "polyak_average": lambda: gx.polyak_average(gx.nesterov(0.05)),
    "coordinate_descent": lambda: gx.coordinate_descent("greedy"),
    "bfgs": gx.bfgs,
    "optax_lbfgs": optax.lbfgs,
}
every_part_method = pytest.mark.parametrize("build", PART_METHODS.values(), ids=PART_METHODS.keys())


@every_part_method
def test_a_part_takes_the_steps_it_takes_alone(build: Any) -> None:
    alone_value = lambda part: coupled({"on": part, "off": START["off"]})
    expected, expected_state = START["on"], build().init(START["on"])
    alone = jax.jit(lambda p, s: step(build(), p, s, alone_value))

    tx = gx.partition({"train": build(), "freeze": FREEZE}, LABELS)
    params, state = START, tx.init(START)
    together = jax.jit(lambda p, s: step(tx, p, s, coupled))
    for _ in range(5):
        expected, expected_state = alone(expected, expected_state)
        params, state = together(params, state)
        close(params["on"], expected)
        chex.assert_trees_all_equal(params["off"], START["off"])
    assert coupled(params) < 0.8 * coupled(START)
    evaluated = gx.eval_params(state, params)
    close(evaluated, {"on": gx.eval_params(expected_state, expected), "off": START["off"]})


def test_with_optax_masks_the_methods_that_evaluate_value_fn_say_what_to_use() -> None:
    half = {"kernel": True, "bias": False}
    for tx in (
        optax.masked(gx.coordinate_descent(), MASK),
        optax.partition({"train": gx.coordinate_descent(), "freeze": FREEZE}, LABELS),
        gx.masked(optax.masked(gx.coordinate_descent(), {"on": half, "off": False}), MASK),
        optax.masked(gx.masked(gx.coordinate_descent(), {"on": half, "off": False}), MASK),
    ):
        with pytest.raises(ValueError, match=r"hides.*gx\.masked"):
            step(tx, START, tx.init(START), coupled)


def test_masks_within_masks() -> None:
    within = {"on": {"kernel": False, "bias": True}, "off": False}
    tx = gx.masked(gx.masked(gx.coordinate_descent(), within), MASK)
    value, grads = jax.value_and_grad(coupled)(START)
    updates, _ = tx.update(grads, tx.init(START), START, value=value, value_fn=coupled)
    once = gx.masked(gx.coordinate_descent(), within)
    expected, _ = once.update(grads, once.init(START), START, value=value, value_fn=coupled)
    close(updates, expected)
    close(updates["on"]["kernel"], grads["on"]["kernel"])


def test_what_the_inner_method_sees() -> None:
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra, updates=updates, params=params)
        return jax.tree.map(jnp.negative, updates), state

    tx = gx.masked(optax.GradientTransformationExtraArgs(lambda p: (), update), MASK)
    grads = jax.tree.map(lambda x: 2 * x, START)
    data = jnp.ones(3)
    value_fn = lambda params, data, *, factor=1.0: factor * coupled(params) + jnp.sum(data)
    arguments = {"value": 3.0, "grad": START, "value_fn": value_fn, "tags": START, "data": data}
    updates, _ = tx.update(grads, tx.init(START), START, **arguments)
    close(jax.tree.leaves(seen["updates"]), jax.tree.leaves(grads["on"]))
    close(jax.tree.leaves(seen["grad"]), jax.tree.leaves(START["on"]))
    assert seen["value"] == 3.0
    assert seen["tags"] is START
    assert list(inspect.signature(seen["value_fn"]).parameters) == ["params", "data", "factor"]
    close(seen["value_fn"](seen["params"], data, factor=2.0), 2 * coupled(START) + 3)
    close(updates, {"on": jax.tree.map(jnp.negative, grads["on"]), "off": grads["off"]})

    tx.update(grads, tx.init(START))  # and without any of it
    assert seen["params"] is None
    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = gx.masked(inner, MASK, mask_compatible_extra_args=True)
    tx.update(grads, tx.init(START), START, tags=START)
    close(jax.tree.leaves(seen["tags"]), jax.tree.leaves(START["on"]))


def test_data_reach_value_fn_through_a_mask() -> None:
    fit = lambda params, x, y: jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
    x = jax.random.normal(jax.random.key(0), (8, 2))
    y = x @ jnp.asarray([1.0, -1.0])
    params = {"w": jnp.zeros(2), "b": jnp.asarray(0.5)}
    tx = gx.partition({1: gx.coordinate_descent(), 2: FREEZE}, {"w": 1, "b": 2})
    state = tx.init(params)

    @jax.jit
    def turn(params: Any, state: Any) -> Any:
        grads = jax.grad(fit)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=fit, x=x, y=y)
        return optax.apply_updates(params, updates), state

    for _ in range(30):
        params, state = turn(params, state)
    least_squares = np.linalg.lstsq(np.asarray(x), np.asarray(y) - 0.5, rcond=None)[0]
    np.testing.assert_allclose(params["w"], least_squares, atol=1e-4)


def test_masked_is_optax_masked_where_value_fn_is_not_used() -> None:
    by_shape = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    params = nested_params()
    for mask in (by_shape, by_shape(params), {**dict.fromkeys(params, True), "missing": None}):
        ours, theirs = gx.masked(gx.adam(0.1), mask), optax.masked(gx.adam(0.1), mask)
        ours_end, ours_state = run(ours, params, 3)
        theirs_end, theirs_state = run(theirs, params, 3)
        close(ours_end, theirs_end)
        close(jax.tree.leaves(ours_state), jax.tree.leaves(theirs_state))
        assert isinstance(ours_state, optax.MaskedState)


def test_state_functions_work_through_masks() -> None:
    parts = {"train": gx.lbfgs(ravel=False), "freeze": gx.momentum(0.1), "unused": gx.bfgs()}
    tx = gx.partition(parts, LABELS)
    state = tx.init(START)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    trained = doubled.inner_states["train"].inner_state
    close(trained.accepted.params["on"], jax.tree.map(lambda x: x + 1, START["on"]))
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    abstract = jax.eval_shape(tx.init, START)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    params, state = run(tx, START, 2)
    assert described(state) == described(tx.init(START))
    assert bool(jnp.isfinite(coupled(params)))


def test_masks_and_labels_that_do_not_fit_are_named() -> None:
    for mask, error, message in (
        ({"on": True}, ValueError, "prefix"),
        ({"on": True, "off": 1.0}, TypeError, r"mask\['off'\] is 1.0, expected True or False"),
    ):
        with pytest.raises(error, match=message):
            gx.masked(gx.sgd(0.1), mask).init(START)
    tx = gx.partition({"train": gx.sgd(0.1)}, LABELS)
    with pytest.raises(ValueError, match=r"label 'freeze'; transforms has 'train'"):
        tx.init(START)
    with pytest.raises(ValueError, match="prefix"):
        gx.partition({"train": gx.sgd(0.1)}, {"on": "train"}).init(START)
