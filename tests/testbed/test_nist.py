"""NIST's regression problems: the models against the certified solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from testbed.nist import PROBLEMS, Problem, correct_digits

pytestmark = pytest.mark.usefixtures("x64")
named = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def at_solution(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Residuals and Jacobian at the certified parameters."""

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return problem.residuals(x), jax.jacfwd(problem.residuals)(x)

    residuals, jacobian = jax.jit(both)(jnp.asarray(problem.certified, jnp.float64))
    return np.asarray(residuals), np.asarray(jacobian)


def test_27_problems() -> None:
    assert len({p.name for p in PROBLEMS}) == 27
    levels = [p.level for p in PROBLEMS]
    assert [levels.count(level) for level in ("lower", "average", "higher")] == [8, 11, 8]


@named
def test_certified_solution(problem: Problem) -> None:
    residuals, jacobian = at_solution(problem)
    n = len(problem.certified)
    assert residuals.shape == (problem.freedom + n,)
    assert all(len(start) == n for start in (*problem.starts, problem.deviations))

    # Eleven digits of the parameters leave Lanczos1 a residual far above its certified 1e-13.
    if problem.name == "Lanczos1":
        assert residuals @ residuals < 1e-18
        return
    rss = residuals @ residuals
    np.testing.assert_allclose(rss, problem.rss, rtol=1e-9)

    # A Gauss–Newton step shows how far the minimum is from the certified parameters.
    step, *_ = np.linalg.lstsq(jacobian, -residuals)
    np.testing.assert_array_less(np.abs(step), 1e-6 * np.asarray(problem.deviations))

    covariance = rss / problem.freedom * np.linalg.inv(jacobian.T @ jacobian)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), problem.deviations, rtol=1e-5)


@named
def test_residuals_keep_the_precision(problem: Problem) -> None:
    shape = jax.eval_shape(problem.residuals, jnp.zeros(len(problem.certified), jnp.float32))
    assert shape.dtype == jnp.float32


def test_correct_digits() -> None:
    problem = PROBLEMS[0]
    exact = np.asarray(problem.certified)
    assert correct_digits(problem, exact) == 11
    assert correct_digits(problem, exact * [1, 1 + 1e-6, 1]) == pytest.approx(6)
    assert correct_digits(problem, exact * [1, np.nan, 1]) == -np.inf
