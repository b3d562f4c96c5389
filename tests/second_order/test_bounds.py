"""L-BFGS-B: minima within bounds, the step of the paper, and what a search may not leave."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import gradxform as gx
from gradxform.bounds import Box
from gradxform.second_order.bounded_lbfgs import Model, bounded_step
from testbed import boxes
from tests.methods import step
from tests.thinning import every

rng = np.random.default_rng(7)
CASES, ROWS, COUNT = 24, 10, 6
FACTORS = rng.normal(size=(CASES, ROWS, COUNT)) * np.logspace(0, 1.5, COUNT)
TARGETS = rng.normal(size=(CASES, ROWS))
LOWS = np.where(rng.random((CASES, COUNT)) < 0.3, -np.inf, -rng.random((CASES, COUNT)) / 5)
HIGHS = np.where(rng.random((CASES, COUNT)) < 0.3, np.inf, rng.random((CASES, COUNT)) / 5)


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def distance(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((a @ x - b) ** 2)


@pytest.mark.usefixtures("x64")
def test_the_minima_of_box_quadratics_in_one_program_of_many_boxes() -> None:
    @jax.jit
    @jax.vmap
    def solve(a: jax.Array, b: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        found = gx.minimize(distance, jnp.ones(COUNT), args=(a, b), bounds=(low, high), tol=1e-10)
        return found, found.active_bounds

    solution, active = solve(*map(jnp.asarray, (FACTORS, TARGETS, LOWS, HIGHS)))
    assert bool(solution.converged.all())
    for i in range(CASES):
        x = np.asarray(solution.params[i])
        reference = scipy.optimize.lsq_linear(
            *(FACTORS[i], TARGETS[i], (LOWS[i], HIGHS[i])), tol=1e-14, method="bvls"
        )
        np.testing.assert_allclose(x, reference.x, atol=1e-9)
        np.testing.assert_array_equal(active[i], reference.active_mask)
        np.testing.assert_array_equal(x[active[i] < 0], LOWS[i][active[i] < 0])
        np.testing.assert_array_equal(x[active[i] > 0], HIGHS[i][active[i] > 0])
        at_bound = solution.status[i] == gx.Status.at_bound
        assert bool(at_bound) == bool(np.any(active[i] != 0))
    assert 0.2 < np.mean(np.asarray(active) != 0) < 0.8


# -- the step, against the paper's algorithm on dense matrices


def dense_hessian(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """B after the pairs, the oldest first, by the product form."""
    b = (y[-1] @ y[-1]) / (s[-1] @ y[-1]) * np.eye(s.shape[1])
    for u, v in zip(s, y, strict=True):
        b = b - np.outer(b @ u, b @ u) / (u @ b @ u) + np.outer(v, v) / (u @ v)
    return b


def reference_steps(
    b: np.ndarray, low: np.ndarray, high: np.ndarray, x: np.ndarray, g: np.ndarray
) -> list[np.ndarray]:
    """The step from each minimum along the path of the projected gradient, the first one first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.where(g > 0, (x - low) / g, np.where(g < 0, (x - high) / g, np.inf))
    path = lambda t: np.where(ends <= t, np.where(g > 0, low, high), x - t * g) - x
    breaks, steps, falls = [0.0, *np.sort(ends[np.isfinite(ends)]), np.inf], [], True
    for start, end in zip(breaks, breaks[1:], strict=False):
        if start == end:
            continue
        d = np.where(ends > start, -g, 0)
        slope, curvature = g @ d + d @ b @ path(start), d @ b @ d
        length = -slope / curvature if d.any() else 0.0
        if falls and slope >= 0:
            steps.append(step_from(b, low, high, x, g, path(start), ends > start))
        elif slope < 0 and start + length < end:
            t = start + length
            steps.append(step_from(b, low, high, x, g, path(t), ends > t))
        falls = slope + curvature * (end - start) < 0 if d.any() else False
    return steps


def step_from(
    b: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    x: np.ndarray,
    g: np.ndarray,
    z: np.ndarray,
    free: np.ndarray,
) -> np.ndarray:
    """The minimum in the free variables, and its projection, from the Cauchy point x + z."""
    cauchy, p = x + z, z.copy()
    rest = b[np.ix_(free, ~free)] @ z[~free]
    p[free] = np.linalg.solve(b[np.ix_(free, free)], -(g[free] + rest))
    projected = np.clip(x + p, low, high) - x
    if g @ projected < 0:
        return projected
    room = np.where(p[free] > z[free], (high - cauchy)[free], (low - cauchy)[free])
    return z + min(1.0, np.min(room / (p - z)[free])) * (p - z)


@pytest.mark.usefixtures("x64")
def test_the_step_is_that_of_the_paper() -> None:
    n, m = 12, 4
    ends, firsts = [], []

    @jax.jit
    def found(s: Any, y: Any, gamma: Any, oldest: Any, *rest: Any) -> jax.Array:
        model = Model(s, y, gamma, (jnp.arange(m) - oldest) % m)
        low, high, x, g = rest
        return bounded_step(model, Box(low, high), x, g)

    for case in range(60):
        q = np.random.default_rng(case)
        root = q.normal(size=(n, n)) * np.logspace(0, 1, n)
        hessian = root @ root.T / n + np.eye(n)
        width = 10.0 ** q.uniform(-2, 1)
        low, high = -width * q.random(n), width * q.random(n)
        x = np.where(q.random(n) < 0.2, low, np.where(q.random(n) < 0.2, high, 0.0))
        low[q.random(n) < 0.1], high[q.random(n) < 0.1] = -1e300, 1e300
        g = hessian @ q.normal(size=n)
        count = q.integers(1, m + 1)  # the other slots are empty
        s = np.concatenate([q.normal(size=(count, n)), np.zeros((m - count, n))])
        y = s @ hessian
        shift = q.integers(m) if count == m else 0
        gamma = (s[count - 1] @ y[count - 1]) / (y[count - 1] @ y[count - 1])
        oldest = shift if count == m else count
        slots = np.roll(s, shift, 0), np.roll(y, shift, 0)
        actual = found(*slots, gamma, oldest, low, high, x, g)
        b = dense_hessian(s[:count], y[:count])
        expected = reference_steps(b, low, high, x, g)
        errors = [float(np.max(np.abs(actual - e))) / width for e in expected]
        assert min(errors) < 1e-8, case
        firsts.append(errors[0] < 1e-8)
        ends.append(np.mean((x + actual <= low) | (x + actual >= high)))
    assert np.mean(firsts) > 0.9
    assert min(ends) == 0
    assert max(ends) > 0.7
