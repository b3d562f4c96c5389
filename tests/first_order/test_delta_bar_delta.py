import jax
import jax.numpy as jnp
import numpy as np

import gradxform as gx


def rates(signs: list[float], **arguments: float) -> list[float]:
    """The rate that each update used, for gradients of these signs."""
    tx = gx.delta_bar_delta(0.1, **arguments)
    state, used = tx.init(jnp.zeros(())), []
    for g in signs:
        updates, state = tx.update(jnp.asarray(g), state)
        used.append(float(-updates / g))
    return used


def test_rates_by_hand() -> None:
    # δ̄: 0, .3, .51, .357 - .3, ...: the sign of δ̄ turns two updates after the gradient's
    used = rates([1.0, 1.0, -1.0, -1.0], kappa=0.02, phi=0.5, theta=0.7)
    np.testing.assert_allclose(used, [0.1, 0.12, 0.06, 0.03], rtol=1e-6)
    # δ̄ = .057 - .3 < 0 now, so the rates agree with the gradient again
    used = rates([1.0, 1.0, -1.0, -1.0, -1.0], kappa=0.02, phi=0.5, theta=0.7)
    np.testing.assert_allclose(used[-1], 0.05, rtol=1e-5)


def test_tiny_gradients_agree_though_their_product_underflows() -> None:
    tx = gx.delta_bar_delta(0.1, kappa=0.05)
    g = jnp.asarray(1e-30)
    _, state = tx.update(g, tx.init(g))
    _, state = tx.update(g, state)
    np.testing.assert_allclose(state.gains, 1.5, rtol=1e-6)


def test_schedule_scales_the_rates_and_may_start_at_zero() -> None:
    warmup = lambda count: jnp.minimum(count, 2) * 0.05
    tx = gx.delta_bar_delta(warmup, kappa=0.01)
    state, used = tx.init(jnp.zeros(())), []
    for _ in range(4):
        updates, state = tx.update(jnp.ones(()), state)
        used.append(float(-updates))
    np.testing.assert_allclose(used, [0.0, 0.06, 0.13, 0.14], rtol=1e-5)


def test_faster_than_gradient_descent_on_a_long_valley() -> None:
    curvature = jnp.asarray([1.0, 100.0])
    valley = lambda x: 0.5 * jnp.sum(curvature * x**2)
    start = jnp.asarray([1.0, 1.0])
    adapted = gx.minimize(valley, start, gx.delta_bar_delta(0.005, kappa=0.001, phi=0.3))
    plain = gx.minimize(valley, start, gx.sgd(0.005))
    assert adapted.status == plain.status == gx.Status.converged
    assert adapted.steps < 0.5 * plain.steps


def test_minibatch_noise_shrinks_the_rates() -> None:
    """Why the lecture calls it a full-batch method."""
    noise = jax.random.normal(jax.random.key(0), (300,))
    tx = gx.delta_bar_delta(0.1, kappa=1e-3, phi=0.2)
    state = tx.init(jnp.zeros(()))
    for g in noise:
        _, state = tx.update(g, state)
    assert state.gains < 0.2
