"""The Kronecker factors as a preconditioner of Newton-CG and Hessian-free."""

import functools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform import tree
from gradxform.preconditioners import Request, RunningPreconditioner
from tests.second_order.test_kronecker import (
    X,
    array,
    cross_entropy,
    fit,
    follow,
    net,
    squares,
    weights,
)
from tests.thinning import every

GAUSS_NEWTON = gx.gauss_newton()
METHODS = {
    "newton_cg": lambda inverse: gx.newton_cg(
        0.5, 0.1, curvature=GAUSS_NEWTON, maxiter=3, preconditioner=inverse
    ),
    "hessian_free": lambda inverse: gx.hessian_free(maxiter=3, preconditioner=inverse),
}


def scaled_layer() -> Any:
    """One linear layer of 40 x 3 weights with squared errors; the condition number is 1e4."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(600, 40)) * np.logspace(0, -2, 40), jnp.float32)
    y = jnp.asarray(rng.normal(size=(600, 3)), jnp.float32)
    return gx.compose(squares, lambda w, x: x @ w, x=x, y=y), jnp.zeros((40, 3))


def iterations(tx: Any, value_fn: Any, params: Any, probes: int) -> int:
    """CG's iterations in the twelfth update at the same point."""
    value, grads = jax.value_and_grad(value_fn)(params)
    update = jax.jit(lambda s: tx.update(grads, s, params, value=value, value_fn=value_fn)[1])
    counts, state = [], tx.init(params)
    for _ in range(12):
        state = update(state)
        counts.append(int(optax.tree_utils.tree_get(state, "curvature_products")))
    return counts[-1] - counts[-2] - probes


def test_it_saves_iterations_of_both_methods() -> None:
    value_fn, params = scaled_layer()
    for build in (
        lambda m: gx.newton_cg(
            curvature=GAUSS_NEWTON, tol=1e-3, forcing="fixed", preconditioner=m, bound=None
        ),
        lambda m: gx.hessian_free(damping=1e-6, progress=1e-6, warm_start=0.0, preconditioner=m),
    ):
        without = iterations(build(None), value_fn, params, 0)
        with_it = iterations(build(gx.kronecker_inverse(1e-6, samples=8)), value_fn, params, 8)
        assert with_it <= 0.5 * without, (with_it, without)


@pytest.mark.usefixtures("x64")
def test_of_one_linear_layer_it_is_the_inverse() -> None:
    """The mean of many probes has the exact factors, so M (F + λI) v = v but for the damping."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 5)) * np.logspace(0, -1, 5), rng.normal(size=(40, 3))
    value_fn = gx.compose(squares, lambda w, x: x @ w, x=jnp.asarray(x), y=jnp.asarray(y))
    w, lam = jnp.zeros((5, 3)), 1e-9
    curved = GAUSS_NEWTON(value_fn, w)
    running = cast(RunningPreconditioner, gx.kronecker_inverse(lam, decay=0.9999))

    @jax.jit
    def inverse_after(steps: int, v: jax.Array) -> jax.Array:
        request = Request(curved, jax.grad(value_fn)(w), jnp.array(0), jnp.array(0.0), w, value_fn)
        memory = running.init(w)
        body = lambda _, memory: running.refresh(request, memory)[2]
        memory = jax.lax.fori_loop(0, steps, body, memory)
        return running.refresh(request, memory)[0](v)

    v = jnp.asarray(rng.normal(size=(5, 3)))
    again = inverse_after(4000, curved(v))
    again = again * float(tree.vdot(again, v) / tree.vdot(again, again))  # up to a multiple
    np.testing.assert_allclose(again, v, atol=0.15 * np.abs(v).max())


@pytest.mark.parametrize("name", every(2, METHODS))
def test_the_memory_is_carried_and_resumed_bit_for_bit(name: str) -> None:
    tx, value_fn, params = METHODS[name](gx.kronecker_inverse()), fit(), weights()

    @functools.partial(jax.jit, static_argnums=2)
    def advance(params: Any, state: Any, steps: int) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, state), length=steps)

    state = tx.init(params)
    whole, values = advance(params, state, 9)
    half, _ = advance(params, state, 4)
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    again, _ = advance(*restored, 5)
    chex.assert_trees_all_equal(again, whole)
    assert values[-1] < values[0]
    memory = optax.tree_utils.tree_get(whole[1], "preconditioner")
    assert int(memory.turn) == 9
    assert float(tree.max_abs(memory.estimate)) > 0


def test_lanes_are_runs_of_their_own() -> None:
    value_fn, build = fit(loss=cross_entropy), METHODS["hessian_free"]
    lane = lambda damping: follow(build(gx.kronecker_inverse(damping)), value_fn, weights(), 4)[2]
    swept = jax.vmap(lane)(jnp.asarray([1e-3, 1e-1]))
    np.testing.assert_allclose(swept[1], lane(jnp.asarray(1e-1)), rtol=1e-4)


@pytest.mark.parametrize("name", every(2, METHODS, 1))
def test_dtypes_and_parts_of_the_parameters(name: str) -> None:
    build = METHODS[name]
    params, _, values = follow(build(gx.kronecker_inverse()), fit(), weights(jnp.bfloat16), 8)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert values[-1] < values[0]
    split = {"k": build(gx.kronecker_inverse()), "none": optax.set_to_zero()}
    params, _, values = follow(
        gx.partition(split, {"a": "k", "b": "none", "c": "k"}), fit(), weights(), 4
    )
    assert values[-1] < values[0]
    np.testing.assert_array_equal(params["b"], weights()["b"])


def test_an_objective_that_is_not_finite_once_is_survived() -> None:
    tx, value_fn, params = METHODS["hessian_free"](gx.kronecker_inverse()), fit(), weights()
    state = tx.init(params)
    values = []
    for i in range(6):
        scale = jnp.asarray(jnp.nan if i in (0, 3) else 1.0)
        loss = lambda outputs, y, scale=scale: scale * squares(outputs, y)
        scaled = gx.compose(loss, net, **value_fn.data)
        value, grads = jax.value_and_grad(scaled)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=scaled)
        params = optax.apply_updates(params, updates)
        values.append(float(value_fn(params)))
    assert values[0] == float(value_fn(weights()))
    assert values[-1] < values[0]
    assert int(state.info.non_finite) == 2


def test_what_it_cannot_use_is_refused_in_one_line() -> None:
    params = weights()
    grads = jax.tree.map(jnp.ones_like, params)
    for build in METHODS.values():
        tx = build(gx.kronecker_inverse())
        plain = lambda p: jnp.sum(p["a"] ** 2)
        with pytest.raises(ValueError, match=r"compose") as caught:
            tx.update(grads, tx.init(params), params, value=1.0, value_fn=plain)
        assert "\n" not in str(caught.value)
        tx = build(gx.kronecker_inverse(factor_batch_size=100))
        with pytest.raises(ValueError, match=r"kronecker_inverse\(factor_batch_size=100\)"):
            tx.update(grads, tx.init(params), params, value=1.0, value_fn=fit())
    with pytest.raises(ValueError, match=r"kronecker_inverse\(damping=-1\)"):
        gx.kronecker_inverse(-1)
    for wrong in ((1, 2), 3.0, "kronecker"):
        with pytest.raises(TypeError, match=r"newton_cg\(preconditioner="):
            gx.newton_cg(preconditioner=wrong)  # pyright: ignore[reportArgumentType]


def test_derivatives_through_a_preconditioned_direction() -> None:
    """They are those of the exact solution, whatever finds it."""
    x = jnp.asarray(X, jnp.float32)
    y = jnp.asarray(array(24, 3), jnp.float32)
    w = jnp.asarray(array(4, 3), jnp.float32)

    def length(scale: jax.Array, inverse: Any) -> jax.Array:
        value_fn = gx.compose(squares, lambda w, x: x @ w, x=scale * x, y=y)
        tx = gx.scale_by_newton_cg(
            damping=0.1, curvature=GAUSS_NEWTON, tol=1e-6, forcing="fixed", preconditioner=inverse
        )
        d, _ = tx.update(jax.grad(value_fn)(w), tx.init(w), w, value_fn=value_fn)
        return tree.vdot(d, d)

    found = jax.grad(length)(jnp.asarray(1.3), gx.kronecker_inverse())
    np.testing.assert_allclose(found, jax.grad(length)(jnp.asarray(1.3), None), rtol=1e-3)
