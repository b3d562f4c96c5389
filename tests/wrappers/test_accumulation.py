from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.configuration import configuration_key
from tests.methods import run, step
from tests.wrappers.cases import FREEZE, LABELS, START, X, Y, close, coupled, described


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
