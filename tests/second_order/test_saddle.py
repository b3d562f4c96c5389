"""x² − y² + y⁴/4 has a saddle at 0, where the ridge y = 0 leads, and minima of −1 at y = ±√2."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

FREE = gx.hessian_free(curvature=gx.hessian())
METHODS = {
    "newton": gx.with_line_search(gx.scale_by_newton()),
    "newton_cg": gx.with_line_search(gx.scale_by_newton_cg()),
    "trust_region": gx.trust_region(),
    "steihaug": gx.trust_region("steihaug"),
    "hessian_free": FREE,
    "bfgs": gx.bfgs(),
    "lbfgs": gx.lbfgs(),
    "nonlinear_cg": gx.nonlinear_cg(),
}


def saddle(x: jax.Array) -> jax.Array:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4


@pytest.mark.parametrize("tx", METHODS.values(), ids=METHODS.keys())
def test_every_method_ends_in_a_minimum_from_beside_the_ridge(
    tx: optax.GradientTransformation,
) -> None:
    starts = jnp.asarray([[1.0, 1e-3], [-0.5, -1e-4], [1e-3, 1e-4]])
    solution = jax.jit(jax.vmap(lambda x: gx.minimize(saddle, x, tx, tol=1e-5)))(starts)
    np.testing.assert_array_equal(solution.status, gx.Status.converged)
    np.testing.assert_allclose(solution.value, -1.0, atol=1e-5)


@jax.jit
def after_twelve_updates(x: jax.Array) -> jax.Array:
    tx = gx.trust_region(initial_radius=0.5)

    def update(_: int, carry: Any) -> Any:
        x, state = carry
        value, grads = jax.value_and_grad(saddle)(x)
        updates, state = tx.update(grads, state, x, value=value, value_fn=saddle)
        return optax.apply_updates(x, updates), state

    x, state = jax.lax.fori_loop(0, 12, update, (x, tx.init(x)))
    return gx.eval_params(state, x)


@pytest.mark.parametrize("start", [[1.0, 0.0], [0.0, 0.0]], ids=["ridge", "saddle"])
def test_trust_region_leaves_where_no_gradient_shows_the_way(start: list[float]) -> None:
    np.testing.assert_allclose(saddle(after_twelve_updates(jnp.asarray(start))), -1.0, atol=1e-4)
