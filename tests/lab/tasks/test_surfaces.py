"""The surfaces: their minima, derivatives, pictures and formulas."""

import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib import mathtext

from gradxform.lab.tasks.surfaces import SURFACES

matplotlib.use("agg")
LOWEST = {"quadratic": 0.0, "rosenbrock": 0.0, "beale": 0.0, "saddle": -1.0}


@pytest.fixture(params=SURFACES)
def surface(request):
    return SURFACES[request.param]


@functools.cache
def derivatives(name):
    """Values, gradients and Hessians at many points, compiled once."""
    fn = SURFACES[name].fn
    return jax.jit(jax.vmap(lambda x: (fn(x), jax.grad(fn)(x), jax.hessian(fn)(x))))


def grid(surface, n=201):
    (left, right), (low, high) = surface.bounds
    x, y = np.meshgrid(np.linspace(left, right, n), np.linspace(low, high, n))
    return jnp.stack([x, y], axis=-1).reshape(-1, 2)


def test_the_issue_names_them():
    assert list(SURFACES) == ["quadratic", "rosenbrock", "beale", "saddle"]
    assert all(name == surface.name for name, surface in SURFACES.items())


def test_minima(surface):
    assert surface.minimum == surface.minima[0]
    values, gradients, hessians = derivatives(surface.name)(jnp.array(surface.minima))
    np.testing.assert_allclose(values, LOWEST[surface.name], atol=1e-6)
    np.testing.assert_allclose(gradients, 0, atol=1e-5)
    assert np.linalg.eigvalsh(hessians).min() > 0


def test_nothing_in_the_picture_is_lower(surface):
    values = jax.vmap(surface.fn)(grid(surface))
    assert np.all(np.isfinite(values))
    assert values.min() >= LOWEST[surface.name] - 1e-6
    assert values.min() < LOWEST[surface.name] + 0.2


def test_start_and_minima_are_in_the_picture(surface):
    for point in (surface.start, *surface.minima):
        assert all(
            low < value < high for value, (low, high) in zip(point, surface.bounds, strict=True)
        )
    assert surface.fn(jnp.array(surface.start)) > surface.fn(jnp.array(surface.minimum)) + 1


def test_derivatives_are_finite_everywhere_in_the_picture(surface):
    points = jnp.concatenate([grid(surface, 11), jnp.zeros((1, 2))])
    for values in derivatives(surface.name)(points):
        assert np.all(np.isfinite(values))


FORMULAS = {
    "quadratic": lambda x, y: ((0.8 * x + 0.6 * y) ** 2 + 100 * (0.8 * y - 0.6 * x) ** 2) / 2,
    "rosenbrock": lambda x, y: 100 * (y - x**2) ** 2 + (1 - x) ** 2,
    "beale": lambda x, y: (
        (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
    ),
    "saddle": lambda x, y: x**2 - y**2 + y**4 / 4,
}


def test_values_follow_the_formula(surface):
    points = np.random.default_rng(0).uniform(-2, 2, (5, 2))
    values = jax.vmap(surface.fn)(jnp.array(points))
    np.testing.assert_allclose(values, FORMULAS[surface.name](*points.T), rtol=1e-4, atol=1e-4)


def test_formula_can_be_typeset(surface):
    mathtext.MathTextParser("path").parse(f"${surface.formula}$")


def test_quadratic_is_a_valley_of_condition_100():
    *_, hessians = derivatives("quadratic")(jnp.zeros((1, 2)))
    np.testing.assert_allclose(np.linalg.eigvalsh(hessians), [[1, 100]], rtol=1e-5)


def test_rosenbrock_of_any_length():
    fn = SURFACES["rosenbrock"].fn
    np.testing.assert_allclose(fn(jnp.array([-1.2, 1.0])), 24.2, rtol=1e-6)
    np.testing.assert_allclose(fn(jnp.array([2.0, 3.0, 4.0])), 101 + 2504, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(fn)(jnp.ones(10)), 0, atol=1e-6)


def test_saddle_at_the_origin():
    _, gradients, hessians = derivatives("saddle")(jnp.zeros((1, 2)))
    np.testing.assert_array_equal(gradients, 0)
    np.testing.assert_allclose(np.linalg.eigvalsh(hessians), [[-2, 2]])
