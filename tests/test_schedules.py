import jax
import jax.numpy as jnp
import numpy as np

import gradxform as gx


def test_linear_decay_is_the_lectures() -> None:
    k = np.arange(30)
    a = np.minimum(k / 20, 1)
    schedule = gx.linear_decay(0.5, 0.05, 20)
    np.testing.assert_allclose(schedule(jnp.asarray(k)), (1 - a) * 0.5 + a * 0.05, rtol=1e-6)


def test_inverse_time_decay_is_the_lectures() -> None:
    k = np.arange(30)
    schedule = gx.inverse_time_decay(0.5, 0.1)
    np.testing.assert_allclose(schedule(jnp.asarray(k)), 0.5 / (1 + 0.1 * k), rtol=1e-6)


def test_no_steps_means_the_end_from_the_start() -> None:
    assert gx.linear_decay(1.0, 0.25, 0)(0) == 0.25


def test_every_argument_can_be_vmapped() -> None:
    steps = jnp.asarray([0.0, 10.0, 20.0])
    rates = jax.vmap(lambda tau: gx.linear_decay(1.0, 0.0, tau)(5))(steps)
    np.testing.assert_allclose(rates, [0.0, 0.5, 0.75], rtol=1e-6)
    decays = jnp.asarray([0.0, 0.2])
    rates = jax.vmap(lambda decay: gx.inverse_time_decay(1.0, decay)(5))(decays)
    np.testing.assert_allclose(rates, [1.0, 0.5], rtol=1e-6)


def test_any_method_takes_it() -> None:
    tx = gx.momentum(gx.linear_decay(0.1, 0.01, 2), 0.5)
    state, g = tx.init(jnp.ones(())), jnp.ones(())
    seen = []
    for _ in range(3):
        updates, state = tx.update(g, state)
        seen.append(float(updates))
    v1, v2 = -0.1, 0.5 * -0.1 - 0.055
    np.testing.assert_allclose(seen, [v1, v2, 0.5 * v2 - 0.01], rtol=1e-5)
