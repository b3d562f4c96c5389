import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.methods import nested_params, step


def points_and_averages(tx: optax.GradientTransformation, steps: int) -> tuple[list, list]:
    params = nested_params()
    state, points, averages = tx.init(params), [], []
    for _ in range(steps):
        params, state = step(tx, params, state)
        points.append(params["dense"]["kernel"])
        averages.append(gx.eval_params(state, params)["dense"]["kernel"])
    return points, averages


def test_mean_of_all_iterates() -> None:
    points, averages = points_and_averages(gx.polyak_average(gx.sgd(0.05)), 6)
    for t in range(6):
        np.testing.assert_allclose(averages[t], np.mean(points[: t + 1], axis=0), rtol=1e-5)


def test_averaging_leaves_the_path_alone() -> None:
    averaged, _ = points_and_averages(gx.polyak_average(gx.adam(0.05)), 4)
    plain, _ = points_and_averages(gx.adam(0.05), 4)
    chex.assert_trees_all_equal(averaged, plain)


def test_start_skips_the_first_iterates() -> None:
    points, averages = points_and_averages(gx.polyak_average(gx.sgd(0.05), start=2), 6)
    np.testing.assert_allclose(averages[1], points[1], rtol=1e-6)
    np.testing.assert_allclose(averages[5], np.mean(points[2:], axis=0), rtol=1e-5)


def test_decaying_mean_without_bias() -> None:
    points, averages = points_and_averages(gx.polyak_average(gx.sgd(0.05), decay=0.8), 5)
    weights = 0.8 ** np.arange(4, -1, -1)
    expected = np.tensordot(weights / weights.sum(), np.array(points), axes=1)
    np.testing.assert_allclose(averages[4], expected, rtol=1e-5)
    np.testing.assert_allclose(averages[0], points[0], rtol=1e-6)


def test_averages_theta_of_nesterov_not_its_interim_points() -> None:
    tx, inner = gx.polyak_average(gx.nesterov(0.05)), gx.nesterov(0.05)
    params, plain = nested_params(), nested_params()
    state, inner_state, thetas = tx.init(params), inner.init(plain), []
    for _ in range(4):
        params, state = step(tx, params, state)
        plain, inner_state = step(inner, plain, inner_state)
        thetas.append(gx.eval_params(inner_state, plain)["scale"])
    np.testing.assert_allclose(gx.eval_params(state, params)["scale"], np.mean(thetas), rtol=1e-5)


def test_beats_the_last_iterate_under_gradient_noise() -> None:
    noise = jax.random.normal(jax.random.key(0), (2000, 4))

    def body(carry: tuple, xi: jax.Array) -> tuple:
        x, state = carry
        updates, state = tx.update(x + xi, state, x)
        return (optax.apply_updates(x, updates), state), jnp.linalg.norm(x)

    tx = gx.polyak_average(gx.sgd(0.1), start=100)
    x = jnp.ones(4)
    (x, state), distances = jax.lax.scan(body, (x, tx.init(x)), noise)
    assert jnp.linalg.norm(gx.eval_params(state, x)) < 0.3 * jnp.mean(distances[100:])


def test_needs_params() -> None:
    tx = gx.polyak_average(gx.sgd(0.1))
    with pytest.raises(ValueError, match=r"polyak_average needs params=…"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
