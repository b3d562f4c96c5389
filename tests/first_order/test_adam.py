import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_first_update_has_the_size_of_the_rate_whatever_the_scale(scale: float) -> None:
    g = scale * jnp.asarray([3.0, -0.01, 500.0])
    tx = gx.adam(0.1, eps=0.0)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, -0.1 * np.sign(g), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_of_half_precision_gradients_are_float32(dtype: str) -> None:
    g = jnp.asarray([1e-4, -3e-3], dtype)
    tx = gx.scale_by_adam()
    direction, state = tx.update(g, tx.init(g))
    assert state.second_moment.dtype == jnp.float32
    np.testing.assert_allclose(state.second_moment, 1e-3 * np.float32(g) ** 2, rtol=1e-4)
    np.testing.assert_allclose(np.float32(direction), np.sign(np.float32(g)), rtol=1e-2)


def test_learning_rate_has_a_gradient_through_the_path() -> None:
    def final(rate: jax.Array) -> jax.Array:
        x, tx = jnp.asarray([1.0, 0.0]), gx.adam(rate)
        state = tx.init(x)
        for _ in range(3):
            updates, state = tx.update(2 * x, state, x)
            x = x + updates
        return jnp.sum(x**2)

    slope = jax.grad(final)(jnp.asarray(0.1))
    change = (final(jnp.asarray(0.101)) - final(jnp.asarray(0.099))) / 0.002
    np.testing.assert_allclose(slope, change, rtol=1e-2)
