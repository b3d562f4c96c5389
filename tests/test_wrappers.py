"""The wrappers: a part of the parameters, hyperparameters in the state, batches in pieces."""

import functools
import inspect
import sys
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradxform as gx
from gradxform.configuration import configuration_key
from tests.methods import METHODS, nested_params, objective, run, step

PART_METHODS = {
    "nesterov": lambda: gx.nesterov(0.05),
    "polyak_average": lambda: gx.polyak_average(gx.nesterov(0.05)),
    "coordinate_descent": lambda: gx.coordinate_descent("greedy"),
    "bfgs": gx.bfgs,
    "optax_lbfgs": optax.lbfgs,
}
every_part_method = pytest.mark.parametrize("build", PART_METHODS.values(), ids=PART_METHODS.keys())
close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-7)


def coupled(params: Any) -> jax.Array:
    """Two parts that depend on each other: the minimum over "on" is not at a minimum of "off"."""
    both = jnp.sum(params["on"]["kernel"]) - 2 * jnp.sum(params["off"])
    return objective(params) + 0.5 * jnp.square(both)


START = {"on": nested_params()["dense"] | {"bias": jnp.ones(2)}, "off": jnp.asarray([1.0, 2.0])}
MASK = {"on": True, "off": False}
LABELS = {"on": "train", "off": "freeze"}
FREEZE = optax.set_to_zero()


def described(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# -- masked and partition


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
    close(trained.params["on"], jax.tree.map(lambda x: x + 1, START["on"]))
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


# -- inject_hyperparams


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


# -- accumulate

X = jax.random.normal(jax.random.key(1), (12, 3))
Y = jnp.sin(X.sum(axis=1))


def fit(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


FIT_START = {"w": jnp.asarray([0.3, -0.2, 0.1]), "b": jnp.asarray(0.2)}


@pytest.mark.parametrize(
    "build",
    [lambda: gx.adam(0.05), gx.bfgs, lambda: optax.adam(0.05), lambda: gx.nesterov(0.1)],
    ids=["adam", "bfgs", "optax_adam", "nesterov"],
)
def test_pieces_are_the_large_batch(build: Any) -> None:
    k = 3
    tx, whole = gx.accumulate(build(), k), build()
    params, state = FIT_START, tx.init(FIT_START)
    expected, expected_state = FIT_START, whole.init(FIT_START)

    @jax.jit
    def turn(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        return step(tx, params, state, lambda p: fit(p, x, y))

    large = jax.jit(lambda p, s: step(whole, p, s, lambda p: fit(p, X, Y)))
    for _ in range(4):
        for x, y in zip(jnp.split(X, k), jnp.split(Y, k), strict=True):
            before = params
            params, state = turn(params, state, x, y)
            if int(state.mini_step):
                chex.assert_trees_all_equal(params, before)
        expected, expected_state = large(expected, expected_state)
        close(params, expected, rtol=1e-5, atol=1e-6)
        close(
            gx.eval_params(state, params),
            gx.eval_params(expected_state, expected),
            rtol=1e-5,
            atol=1e-6,
        )
    assert int(state.gradient_step) == 4


def counting() -> optax.GradientTransformationExtraArgs:
    """Counts its calls, and hands on what it was given."""

    def init(params: Any) -> Any:
        return {"calls": jnp.array(0), "value": jnp.array(0.0), "grad": jnp.zeros_like(params)}

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any) -> Any:
        return updates, {"calls": state["calls"] + 1, "value": value, "grad": grad}

    return optax.GradientTransformationExtraArgs(init, update)


def feed(tx: Any, state: Any, gradients: Any, values: Any = None) -> Any:
    """The updates and states of one call for each gradient, and of the value that goes with it."""

    def body(state: Any, row: Any) -> Any:
        grad, value = row
        updates, state = tx.update(grad, state, jnp.zeros(()), grad=grad, value=value)
        return state, (updates, state)

    gradients = jnp.asarray(gradients)
    values = gradients + 1 if values is None else jnp.asarray(values)
    return jax.lax.scan(body, state, (gradients, values))[1]


def test_the_method_runs_only_when_it_moves() -> None:
    tx = gx.accumulate(counting(), 3)
    start = tx.init(jnp.zeros(()))
    updates, states = feed(tx, start, [1.0, 2.0, 6.0, 4.0, 5.0, 9.0])
    close(updates, jnp.asarray([0.0, 0.0, 3.0, 0.0, 0.0, 6.0]))
    assert states.inner_opt_state["calls"].tolist() == [0, 0, 1, 1, 1, 2]
    close(states.inner_opt_state["value"][jnp.asarray([2, 5])], jnp.asarray([4.0, 7.0]))
    close(states.inner_opt_state["grad"][5], jnp.asarray(6.0))
    assert states.mini_step.tolist() == [1, 2, 0, 1, 2, 0]

    one = lambda state: tx.update(jnp.ones(()), state, jnp.zeros(()), grad=jnp.ones(()), value=1.0)
    jaxpr = str(jax.make_jaxpr(one)(start))
    assert "cond[" in jaxpr  # what is not taken is not computed


def test_sums_and_schedules_of_k() -> None:
    tx = gx.accumulate(counting(), lambda n: 1 + n, use_grad_mean=False)
    updates, states = feed(tx, tx.init(jnp.zeros(())), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    close(updates, jnp.asarray([1.0, 0.0, 5.0, 0.0, 0.0, 15.0]))
    close(states.inner_opt_state["value"][5], jnp.asarray(18.0))
    ks = jnp.asarray([1, 2])
    last = jax.vmap(
        lambda k: feed(
            gx.accumulate(counting(), k),
            gx.accumulate(counting(), k).init(jnp.zeros(())),
            [1.0, 3.0],
        )[0]
    )(ks)
    close(last, jnp.asarray([[1.0, 3.0], [0.0, 2.0]]))


def test_skipped_minibatches_leave_no_trace() -> None:
    nan = float("nan")
    build = lambda: gx.accumulate(gx.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    theta = jnp.zeros(())
    updates, states = feed(build(), build().init(theta), [1.0, nan, 3.0, nan, 2.0])
    clean, clean_states = feed(build(), build().init(theta), [1.0, 3.0, 2.0])
    kept = jnp.asarray([0, 2, 4])
    close(updates[kept], clean)
    close(updates[jnp.asarray([1, 3])], jnp.zeros(2))
    assert states.skip_state["should_skip"].tolist() == [False, True, False, True, False]
    last = jax.tree.map(lambda x: x[-1], (states, clean_states))
    close(last[0]._replace(skip_state=()), last[1]._replace(skip_state=()))


def test_a_bad_minibatch_spoils_its_own_update_alone() -> None:
    tx = gx.accumulate(gx.sgd(1.0), 2)
    rows = jnp.asarray([[1.0, float("nan"), 3.0, 5.0], [float("inf"), 1.0, 3.0, 5.0]])
    state = tx.init(jnp.zeros(()))
    for gradients in rows:
        updates, _ = feed(tx, state, gradients)
        assert updates[0] == 0
        assert not jnp.isfinite(updates[1])
        close(updates[2:], jnp.asarray([0.0, -4.0]))
    # lanes that move at different times, so that both branches are computed for all
    tx = gx.accumulate(optax.stateless(lambda g, p: jnp.log(-jnp.abs(g) - 1)), 2)
    state = tx.init(jnp.zeros(()))
    ahead = tx.update(jnp.ones(()), state, value=1.0)[1]
    lanes = jax.tree.map(lambda *x: jnp.stack(x), state, ahead)
    updates, after = jax.vmap(lambda s: tx.update(jnp.ones(()), s, value=1.0))(lanes)
    assert updates[0] == 0
    assert jnp.isnan(updates[1])
    close(after.acc_grads, jnp.asarray([1.0, 0.0]))


def test_accumulates_in_float32_and_keeps_dtypes() -> None:
    params = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    tx = gx.accumulate(gx.adam(0.1), 4)
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=(1,))
    expected = described(state)
    for g in (256.0, 1.0, 1.0, 1.0):  # each 1 is lost beside 256 in bfloat16
        grads = jax.tree.map(lambda x, g=g: jnp.full_like(x, g), params)
        updates, state = update(grads, state, params, value=jnp.asarray(g, jnp.bfloat16))
        assert described(state) == expected
        assert updates["w"].dtype == jnp.bfloat16
    moment = optax.tree.get(state, "first_moment")  # 0.1 of the mean, 64.75
    np.testing.assert_allclose(moment["w"], 6.475, rtol=0.005)
    assert state.acc_grads["w"].dtype == jnp.float32

    seen = []
    watch = optax.stateless(lambda g, p: seen.append(g["w"].dtype) or g)
    gx.accumulate(watch, 1).update(grads, gx.accumulate(watch, 1).init(params), params)
    assert set(seen) == {jnp.dtype("bfloat16")}  # as without the wrapper


def test_accumulate_in_the_company_of_others() -> None:
    within = gx.accumulate(gx.inject_hyperparams(gx.bfgs)(), 2)
    tx = gx.partition({"train": within, "freeze": FREEZE}, LABELS)
    params, state = run(tx, START, 20)
    assert described(state) == described(tx.init(START))
    assert coupled(gx.eval_params(state, params)) < 0.8 * coupled(START)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert configuration_key(gx.accumulate(gx.sgd(0.1), 2)) is not None
    bowl = lambda x: jnp.sum((x - 1) ** 2)
    solution = gx.minimize(bowl, jnp.zeros(2), gx.accumulate(gx.bfgs(), 2), tol=1e-4)
    assert int(solution.status) == gx.Status.converged


@pytest.mark.parametrize("k", [0, -1, 1.5, "2", None, True])
def test_bad_k_is_refused(k: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="every_k_schedule"):
        gx.accumulate(gx.sgd(0.1), k)
    if isinstance(k, int) and k is not True:
        tx = gx.accumulate(gx.sgd(0.1), lambda n: k)
        with pytest.raises(ValueError, match="every_k_schedule"):
            tx.update(jnp.ones(()), tx.init(jnp.ones(())))


def test_a_skip_that_is_no_boolean_is_refused() -> None:
    tx = gx.accumulate(gx.sgd(0.1), 2, should_skip_update_fn=lambda u, n, p: (jnp.ones(2), ()))
    with pytest.raises(ValueError, match="one boolean"):
        tx.init(jnp.ones(()))


# -- nnx_value_fn


class Net(nnx.Module):
    """With everything that is not a parameter: batch statistics and random counters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.LoRA(4, 2, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def net_loss(model: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x)[:, 0] - y) ** 2)


def test_nnx_value_fn_is_the_loss_that_the_gradient_was_taken_of() -> None:
    model = Net(nnx.Rngs(0))

    @nnx.jit
    def both(model: Net, x: jax.Array, y: jax.Array) -> Any:
        value_fn = gx.nnx_value_fn(model, net_loss)
        value, grads = nnx.value_and_grad(net_loss)(model, x, y)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        again, by_value_fn = jax.value_and_grad(value_fn)(params, x, y=y)
        return value, again, nnx.as_pure(grads), by_value_fn

    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    value, again, grads, by_value_fn = both(model, X, Y)
    close(again, value)
    close(jax.tree.leaves(by_value_fn), jax.tree.leaves(grads), rtol=1e-5, atol=1e-6)
    after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    assert not np.allclose(jax.tree.leaves(before)[0], jax.tree.leaves(after)[0])  # by the model

    value_fn = gx.nnx_value_fn(model, net_loss)
    unchanged = nnx.as_pure(nnx.state(model))
    value_fn(nnx.state(model, nnx.Param), X, Y)  # and not by value_fn
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), unchanged)


def test_nnx_value_fn_with_other_parameters_and_data_by_keyword() -> None:
    model = Net(nnx.Rngs(0))
    model.eval()
    optimizer = nnx.Optimizer(model, gx.coordinate_descent("greedy"), wrt=nnx.LoRAParam)

    @nnx.jit
    def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        value_fn = gx.nnx_value_fn(model, net_loss, wrt=nnx.LoRAParam)
        grad = nnx.value_and_grad(net_loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
        value, grads = grad(model, x, y)
        optimizer.update(model, grads, value=value, value_fn=value_fn, x=x, y=y)
        return value

    kernel = np.asarray(model.hidden.kernel[...])
    values = [float(train_step(model, optimizer, X, Y)) for _ in range(4)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    np.testing.assert_array_equal(model.hidden.kernel[...], kernel)


def test_nnx_value_fn_says_that_it_needs_flax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match="pip install flax"):
        gx.nnx_value_fn(None, lambda model: 0.0)
