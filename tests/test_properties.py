"""Properties over random trees, shapes and numbers."""

from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradxform as gx
from tests.methods import step

hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")

leaves = st.builds(
    lambda shape, seed: jax.random.normal(jax.random.key(seed), shape),
    st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    st.integers(0, 100),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=4,
)
unit = st.floats(0, 0.99)


def bowl(tree: Any) -> jax.Array:
    terms = [jnp.sum((i + 1) * (x - 1) ** 2) for i, x in enumerate(jax.tree.leaves(tree))]
    return sum(terms, start=jnp.zeros(()))


@hypothesis.given(trees, st.floats(0, 1))
def test_nesterov_with_no_momentum_is_gradient_descent(params: Any, rate: float) -> None:
    ours, plain = gx.nesterov(rate, 0.0), gx.sgd(rate)
    chex.assert_trees_all_close(
        step(ours, params, ours.init(params), bowl)[0],
        step(plain, params, plain.init(params), bowl)[0],
        rtol=1e-6,
    )


@hypothesis.given(trees, st.floats(1e-3, 1), unit)
def test_theta_of_nesterov_is_theta_of_its_recurrence(
    params: Any, rate: float, alpha: float
) -> None:
    tx = gx.nesterov(rate, alpha)
    state, theta = tx.init(params), params
    for _ in range(3):
        params, state = step(tx, params, state, bowl)
        theta = optax.apply_updates(theta, state.velocity)
        chex.assert_trees_all_close(gx.eval_params(state, params), theta, rtol=1e-4, atol=1e-3)


@hypothesis.given(leaves, st.floats(1e-6, 1e6), st.floats(0.01, 0.9), st.floats(0.01, 0.99))
def test_adaptive_directions_ignore_the_scale_of_the_gradient(
    g: jax.Array, scale: float, b1: float, b2: float
) -> None:
    for tx in (
        gx.scale_by_adam(b1, b2, eps=0.0),
        gx.scale_by_rmsprop(b2, eps=0.0),
        gx.scale_by_adagrad(eps=0.0),
    ):
        direction, _ = tx.update(g, tx.init(g))
        scaled, _ = tx.update(scale * g, tx.init(g))
        np.testing.assert_allclose(scaled, direction, rtol=1e-4)


@hypothesis.given(st.lists(st.floats(-3, 3), min_size=5, max_size=5), st.floats(-4, 4))
def test_coordinate_descent_never_climbs_a_quartic(coefficients: list[float], start: float) -> None:
    quartic = lambda x: sum(c * x**k for k, c in enumerate(coefficients)) + 0.5 * x**4
    tx = gx.coordinate_descent()
    x = jnp.asarray(start)
    after, state = step(tx, x, tx.init(x), quartic)
    size = sum(abs(c * start**k) for k, c in enumerate(coefficients)) + 0.5 * start**4
    assert quartic(after) <= quartic(x) + 1e-5 * (1 + size)
    assert state.info.evaluations <= 21


@hypothesis.given(trees, st.permutations(range(3)))
def test_the_order_of_leaves_changes_nothing(tree: Any, order: list[int]) -> None:
    params = [tree, jnp.asarray(2.0), jnp.asarray([1.0, -1.0])]
    shuffled = [params[i] for i in order]
    tx = gx.rmsprop(0.1, momentum=0.5, nesterov=True)
    updates, _ = tx.update(params, tx.init(params), params)
    others, _ = tx.update(shuffled, tx.init(shuffled), shuffled)
    chex.assert_trees_all_equal(others, [updates[i] for i in order])
