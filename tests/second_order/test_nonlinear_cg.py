from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.second_order.nonlinear_cg import Beta

BETAS = get_args(Beta)
rng = np.random.default_rng(11)
FACTOR = rng.normal(size=(7, 7))
HESSIAN, LINEAR = FACTOR @ FACTOR.T + np.eye(7), rng.normal(size=7)
every_beta = pytest.mark.parametrize("beta", BETAS)


def linear_cg(x: np.ndarray, steps: int) -> list[np.ndarray]:
    r = LINEAR - HESSIAN @ x
    p, path = r, []
    for _ in range(steps):
        alpha = (r @ r) / (p @ HESSIAN @ p)
        x, r_new = x + alpha * p, r - alpha * (HESSIAN @ p)
        p, r = r_new + (r_new @ r_new) / (r @ r) * p, r_new
        path.append(x)
    return path


def exact_steps(beta: Any, steps: int) -> tuple[list[np.ndarray], list[float]]:
    """The path with exact steps on the quadratic, and the β of each update."""
    tx = gx.scale_by_nonlinear_cg(beta, restart=np.float64(1e3))
    x, state, path, betas = np.zeros(7), tx.init(jnp.zeros(7)), [], []
    for _ in range(steps):
        g = HESSIAN @ x - LINEAR
        ascent, state = tx.update(jnp.asarray(g), state)
        d = -np.asarray(ascent)
        x = x - (g @ d) / (d @ HESSIAN @ d) * d
        path.append(x)
        betas.append(float(state.info.beta))
    return path, betas


@pytest.mark.usefixtures("x64")
@every_beta
def test_equals_linear_cg_on_a_quadratic_and_ends_in_n_steps(beta: Any) -> None:
    path, _ = exact_steps(beta, 7)
    np.testing.assert_allclose(path, linear_cg(np.zeros(7), 7), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(path[-1], np.linalg.solve(HESSIAN, LINEAR), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_all_betas_agree_after_exact_steps() -> None:
    table = np.array([exact_steps(beta, 5)[1] for beta in BETAS])
    np.testing.assert_allclose(table, np.broadcast_to(table[0], table.shape), rtol=1e-6)
    assert np.all(table[:, 0] == 0)
    assert np.all(table[:, 1:] > 0)


@pytest.mark.usefixtures("x64")
def test_betas_by_hand() -> None:
    old, new = np.array([2.0, 1.0]), np.array([1.0, 1.5])
    y, d = new - old, -old
    dy, eta = d @ y, 0.4
    expected = {
        "fletcher_reeves": new @ new / (old @ old),
        "polak_ribiere": max(new @ y / (old @ old), 0),
        "hestenes_stiefel": new @ y / dy,
        "dai_yuan": new @ new / dy,
        "hager_zhang": max((y - 2 * d * (y @ y) / dy) @ new / dy, eta * (d @ old) / (d @ d)),
    }
    for beta in BETAS:
        tx = gx.scale_by_nonlinear_cg(beta, restart=1e3)
        _, state = tx.update(jnp.asarray(old), tx.init(jnp.zeros(2)))
        direction, state = tx.update(jnp.asarray(new), state)
        if -direction @ new < 0 and state.info.beta != 0:
            np.testing.assert_allclose(state.info.beta, expected[beta], rtol=1e-10, err_msg=beta)
            np.testing.assert_allclose(-direction, -new + expected[beta] * d, rtol=1e-10)
        else:  # it would not descend, or β is 0: the gradient itself
            np.testing.assert_allclose(direction, new)


@every_beta
def test_rosenbrock(beta: Any) -> None:
    f = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    solution = gx.minimize(f, jnp.asarray([-1.2, 1.0, -1.2, 1.0]), gx.nonlinear_cg(beta), tol=1e-3)
    assert solution.status == gx.Status.converged
    np.testing.assert_allclose(solution.params, 1.0, atol=1e-2)


def test_powell_restart_and_the_restart_after_6_n_updates() -> None:
    tx = gx.scale_by_nonlinear_cg("fletcher_reeves", restart=0.2)
    g = jnp.asarray([1.0, 1.0])
    _, state = tx.update(g, tx.init(g))
    direction, state = tx.update(0.5 * g, state)  # as far from orthogonal as can be
    np.testing.assert_allclose(direction, 0.5 * g)
    assert int(state.info.restarts) == 1
    tx = gx.scale_by_nonlinear_cg("fletcher_reeves", restart=10.0)
    state, betas = tx.init(g), []
    for k in range(14):
        _, state = tx.update(jnp.asarray([1.0, 0.0]) if k % 2 else jnp.asarray([0.0, 1.0]), state)
        betas.append(float(state.info.beta))
    assert betas == [0.0, *[1.0] * 11, 0.0, 1.0]


def test_unknown_beta_is_named() -> None:
    with pytest.raises(ValueError, match=r"beta='steepest'.*'hager_zhang'"):
        gx.nonlinear_cg("steepest")  # pyright: ignore[reportArgumentType]
