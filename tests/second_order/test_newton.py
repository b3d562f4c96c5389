from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

rng = np.random.default_rng(7)
FACTOR = rng.normal(size=(4, 4))
HESSIAN = FACTOR @ FACTOR.T + 0.1 * np.eye(4)
START = np.array([1.0, -2.0, 0.5, 3.0])


def convex(x: Any) -> Any:
    """Not quadratic; its derivatives are written out in NumPy below."""
    return 0.5 * x @ HESSIAN @ x + jnp.sum(jnp.exp(0.3 * x))


def lecture_path(steps: int, rate: float, alpha: float) -> list[np.ndarray]:
    """The slide: θ ← θ − ε (H + α I)⁻¹ g."""
    theta, path = START, []
    for _ in range(steps):
        g = HESSIAN @ theta + 0.3 * np.exp(0.3 * theta)
        h = HESSIAN + np.diag(0.09 * np.exp(0.3 * theta))
        theta = theta - rate * np.linalg.solve(h + alpha * np.eye(4), g)
        path.append(theta)
    return path


def walk(tx: optax.GradientTransformation, f: Any, x: jax.Array, steps: int) -> tuple[Any, Any]:
    tx = optax.with_extra_args_support(tx)
    path, state = [], tx.init(x)
    update = jax.jit(lambda g, s, x: tx.update(g, s, x, value_fn=f))
    for _ in range(steps):
        updates, state = update(jax.grad(f)(x), state, x)
        x = optax.apply_updates(x, updates)
        path.append(x)
    return path, state


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rate", "alpha"), [(1.0, 0.0), (1.0, 0.5), (0.3, 0.0), (0.5, 2.0)])
def test_walks_the_path_of_the_lecture(rate: float, alpha: float) -> None:
    path, state = walk(gx.newton(rate, alpha), convex, jnp.asarray(START), 6)
    np.testing.assert_allclose(path, lecture_path(6, rate, alpha), rtol=0, atol=1e-10)
    assert int(state[0].info.curvature_products) == 24
    assert int(state[0].info.modified) == 0


@pytest.mark.usefixtures("x64")
def test_one_step_to_the_minimum_of_a_quadratic() -> None:
    f = lambda x: 0.5 * (x - 1) @ HESSIAN @ (x - 1)
    (x,), _ = walk(gx.newton(), f, jnp.asarray(START), 1)
    np.testing.assert_allclose(x, 1.0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("columns", [1, 3, 4, 64])
def test_columns_at_once_change_nothing(columns: int) -> None:
    path, _ = walk(gx.newton(columns=columns), convex, jnp.asarray(START), 2)
    np.testing.assert_allclose(path, lecture_path(2, 1.0, 0.0), atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_an_indefinite_hessian_has_its_eigenvalues_replaced() -> None:
    q, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    eigenvalues = np.array([-2.0, 1e-3, 1.0, 5.0])
    matrix, g = q * eigenvalues @ q.T, rng.normal(size=4)
    f = lambda x: 0.5 * x @ matrix @ x + g @ x
    tx, x = gx.scale_by_newton(floor=0.1), jnp.zeros(4)
    direction, state = tx.update(jnp.asarray(g), tx.init(x), x, value_fn=f)
    replaced = np.array([2.0, 0.5, 1.0, 5.0])
    np.testing.assert_allclose(direction, q / replaced @ q.T @ g, rtol=1e-10)
    assert int(state.info.modified) == 1
    damped = gx.scale_by_newton(damping=3.0)  # large enough to make it definite
    direction, state = damped.update(jnp.asarray(g), damped.init(x), x, value_fn=f)
    np.testing.assert_allclose(direction, np.linalg.solve(matrix + 3 * np.eye(4), g), rtol=1e-10)
    assert int(state.info.modified) == 0


@pytest.mark.parametrize("curvature", [0.0, float("nan")])
def test_without_usable_curvature_the_direction_is_the_gradient(curvature: float) -> None:
    f = lambda x: jnp.sum(3 * x) + curvature * jnp.sum(x**2)
    tx, x, g = gx.scale_by_newton(), jnp.ones(3), jnp.full(3, 3.0)
    direction, state = tx.update(g, tx.init(x), x, value_fn=f)
    np.testing.assert_allclose(direction, g)
    assert int(state.info.modified) == 1


@pytest.mark.parametrize("factor", [1e-16, 1.0, 1e16])
def test_the_unit_of_the_objective_does_not_matter(factor: float) -> None:
    f = lambda x: factor * convex(x)
    saddle = lambda x: factor * (x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4)
    (x,), _ = walk(gx.newton(), f, jnp.asarray(START, jnp.float32), 1)
    np.testing.assert_allclose(x, lecture_path(1, 1.0, 0.0)[0], rtol=1e-3, atol=1e-3)
    path, _ = walk(gx.newton(), saddle, jnp.asarray([1.0, 0.1]), 12)
    np.testing.assert_allclose(path[-1], [0.0, 2**0.5], atol=1e-3)


def test_leaves_the_ridge_of_a_saddle() -> None:
    ridge = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    for tx in (gx.newton(), gx.with_line_search(gx.scale_by_newton())):
        solution = gx.minimize(ridge, jnp.asarray([1.0, 1e-3]), tx, tol=1e-3)
        assert solution.status == gx.Status.converged
        np.testing.assert_allclose(solution.value, -1, rtol=1e-4)


def test_gauss_newton_stays_definite_where_the_hessian_is_not() -> None:
    value_fn = gx.compose(lambda y: jnp.sum((y - 2) ** 2), lambda p: p**2)
    x = jnp.asarray([0.3, 1.0])  # the Hessian is 12 x² − 8
    tx = gx.scale_by_newton(curvature=gx.gauss_newton())
    g = jax.grad(value_fn)(x)
    direction, state = tx.update(g, tx.init(x), x, value_fn=value_fn)
    np.testing.assert_allclose(direction, g / (8 * x**2), rtol=1e-5)
    assert int(state.info.modified) == 0


def test_too_many_parameters_are_refused_by_their_number() -> None:
    tx = gx.newton(max_size=10)
    with pytest.raises(ValueError, match=r"newton\(max_size=10\).*12 parameters.*gx\.newton_cg"):
        tx.init({"w": jnp.zeros((3, 4))})
    tx.init(jnp.zeros(10))


def test_missing_arguments_are_named() -> None:
    x = jnp.ones(2)
    tx = gx.newton()
    with pytest.raises(ValueError, match="newton needs value_fn="):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="newton needs params="):
        tx.update(x, tx.init(x), value_fn=jnp.sum)
    with pytest.raises(ValueError, match=r"^newton\(damping=-1\)"):
        gx.newton(damping=-1)
    with pytest.raises(TypeError, match=r"columns=2\.0\).*Python integer"):
        gx.newton(columns=2.0)  # pyright: ignore[reportArgumentType]
