import jax.numpy as jnp
import numpy as np
import optax

import gradxform as gx


def test_theta_is_followed_when_the_momentum_changes() -> None:
    tx = optax.inject_hyperparams(gx.nesterov)(learning_rate=0.1, momentum=0.5)
    params = jnp.asarray([1.0, -2.0])
    state = tx.init(params)
    theta, v = np.array([1.0, -2.0]), np.zeros(2)
    for alpha in (0.5, 0.9, 0.2, 0.95):
        state.hyperparams["momentum"] = jnp.asarray(alpha)
        g = np.asarray(params)
        updates, state = tx.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        v = alpha * v - 0.1 * g
        theta = theta + v
        np.testing.assert_allclose(gx.eval_params(state, params), theta, rtol=1e-5)
