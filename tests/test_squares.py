"""Sums of squares: robust losses against SciPy, weights, and how residuals are found."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradxform as gx
from gradxform.squares import linearised

rng = np.random.default_rng(9)
LOSSES = ("linear", "huber", "soft_l1", "cauchy", "arctan")
T = np.linspace(0, 10, 40)
Y = 2 * np.exp(-0.3 * T) + 0.5 + 0.01 * rng.normal(size=40)
Y[[3, 20, 33]] += 2.0


def decay(p: Any, t: Any, y: Any) -> jax.Array:
    return p[0] * jnp.exp(-p[1] * t) + p[2] - y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_robust_fit_is_that_of_scipy(loss: Any) -> None:
    start = np.asarray([1.0, 1.0, 0.0])
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-12}
    expected = scipy.optimize.least_squares(
        lambda p: np.asarray(decay(p, T, Y)), start, loss=loss, f_scale=0.1, **tight
    )
    found = gx.least_squares(decay, jnp.asarray(start), args=(T, Y), loss=loss, loss_scale=0.1)
    assert found.converged
    np.testing.assert_allclose(found.value, expected.cost, rtol=1e-12)
    np.testing.assert_allclose(found.params, expected.x, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES)
def test_weighted_residuals_have_the_gradient_and_the_curvature_of_the_loss(loss: Any) -> None:
    """Where the loss is convex: Jᵀr is the gradient, JᵀJ the Gauss–Newton matrix."""
    a = jnp.asarray(rng.normal(size=(6, 3)))
    x = jnp.asarray(0.05 * rng.normal(size=3))
    fn = gx.sum_of_squares(lambda x: a @ x, loss=loss, loss_scale=0.5)
    found = linearised(fn, x)
    np.testing.assert_allclose(found.pull(found.r), jax.grad(fn)(x), rtol=1e-10, atol=1e-12)
    v = jnp.asarray(rng.normal(size=3))
    product = gx.gauss_newton()(fn, x)(v)
    np.testing.assert_allclose(found.pull(found.push(v)), product, rtol=1e-9)
    np.testing.assert_allclose(
        jnp.vdot(found.push(v), found.r), jnp.vdot(v, found.pull(found.r)), rtol=1e-10
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_stays_right_where_the_loss_is_not_convex(loss: Any) -> None:
    fn = gx.sum_of_squares(lambda x: x, loss=loss, loss_scale=0.1)
    x = jnp.asarray([-5.0, 1e-3, 0.0, 0.1, 40.0])
    found = linearised(fn, x)
    np.testing.assert_allclose(found.pull(found.r), jax.grad(fn)(x), rtol=1e-9, atol=1e-15)
    assert all(np.isfinite(y).all() for y in (found.r, found.push(jnp.ones(5))))


@pytest.mark.usefixtures("x64")
def test_a_constant_factor_of_residuals_and_scale_changes_only_the_value() -> None:
    start = jnp.asarray([1.0, 1.0, 0.0])
    one = gx.least_squares(decay, start, args=(T, Y), loss="cauchy", loss_scale=0.1)
    scaled = lambda p, t, y: 1e5 * decay(p, t, y)
    other = gx.least_squares(scaled, start, args=(T, Y), loss="cauchy", loss_scale=1e4)
    np.testing.assert_allclose(other.params, one.params, rtol=1e-9)
    np.testing.assert_allclose(other.value, 1e10 * one.value, rtol=1e-9)
    assert int(other.evaluations) == int(one.evaluations)


@pytest.mark.usefixtures("x64")
def test_residuals_in_a_tree_and_complex_ones() -> None:
    """A complex residual counts as two real ones, a complex parameter too."""
    z = jnp.asarray([1 + 2j, 3 - 1j])
    residuals = lambda p: {"a": p["w"] * z - (2 + 1j) * z, "b": [p["s"] - 3.0]}
    fit = gx.least_squares(residuals, {"w": jnp.asarray(0j), "s": 0.0})
    np.testing.assert_allclose(fit.params["w"], 2 + 1j, rtol=1e-9)
    np.testing.assert_allclose(fit.params["s"], 3.0, rtol=1e-9)
    covariance = gx.covariance(residuals, fit.params)
    assert covariance.shape == (3, 3)


def test_the_scale_of_a_loss_is_traced() -> None:
    """New scales do not compile again, and a batch may have one each."""
    seen = []

    def residuals(p: Any, y: Any) -> jax.Array:
        seen.append(None)
        return p - y

    y = np.asarray([0.0, 0.1, 9.0], np.float32)
    traces = []
    for scale in (0.5, 1.0, 2.0):
        gx.least_squares(residuals, 1.0, args=(y,), loss="huber", loss_scale=scale)
        traces.append(len(seen))
    assert len(set(traces)) == 1
    fit = lambda scale: (
        gx.least_squares(lambda p: p - y, 1.0, loss="huber", loss_scale=scale).params
    )
    many = jax.vmap(fit)(jnp.asarray([0.1, 100.0]))
    assert many[0] < 0.3 < 3 < many[1] < 3.1


def test_bad_residuals_are_refused_in_one_line() -> None:
    with pytest.raises(TypeError, match=r"^sum_of_squares\(residuals=.*objective already"):
        gx.sum_of_squares(gx.sum_of_squares(lambda x: x))
    with pytest.raises(ValueError, match=r"^least_squares\(has_aux=True\)"):
        gx.least_squares(lambda x: x, 1.0, has_aux=True)
    with pytest.raises(ValueError, match="residuals returned no arrays"):
        gx.least_squares(lambda x: {}, jnp.ones(2))
    with pytest.raises(TypeError, match=r"^least_squares\(args="):
        gx.least_squares(lambda x: x, 1.0, args=(1.0, 2.0))


@pytest.mark.usefixtures("x64")
def test_the_covariance_of_a_sum_of_squares_is_that_of_its_residuals() -> None:
    p = gx.least_squares(decay, jnp.asarray([1.0, 1.0, 0.0]), args=(T, Y)).params
    expected = gx.covariance(decay, p, args=(T, Y))
    np.testing.assert_allclose(gx.covariance(gx.sum_of_squares(decay), p, args=(T, Y)), expected)


@pytest.mark.usefixtures("x64")
def test_the_solution_is_differentiable_where_the_jacobian_is_rank_deficient() -> None:
    """Two parameters of which only the sum matters: the derivative of least norm."""
    y = jnp.asarray([1.0, 2.0, 4.0])
    residuals = lambda p, y: p["a"] + p["b"] - y
    start = {"a": 0.5, "b": 0.0}
    estimate = lambda y: gx.least_squares(residuals, start, args=(y,)).params
    found = jax.jacrev(lambda y: estimate(y)["a"])(y)
    np.testing.assert_allclose(found, np.full(3, 1 / 6), rtol=1e-8)
    forward = jax.jvp(estimate, (y,), (jnp.ones(3),))[1]
    np.testing.assert_allclose(forward["a"] + forward["b"], 1.0, rtol=1e-8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_residuals_divided_over_devices_lead_to_the_same_fit(kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    t, y = jax.device_put((T, Y), NamedSharding(mesh, PartitionSpec("data")))
    start = jnp.asarray([1.0, 1.0, 0.0])
    with jax.set_mesh(mesh):
        divided = gx.least_squares(decay, start, args=(t, y), derivative=None)
    whole = gx.least_squares(decay, start, args=(T, Y), derivative=None)
    np.testing.assert_allclose(divided.params, whole.params, rtol=1e-4)
