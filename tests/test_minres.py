"""MINRES against the pseudo-inverse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradxform.minres import least_norm


class Matrix(NamedTuple):
    """A symmetric matrix by its eigenvalues."""

    eigenvalues: np.ndarray
    error: float  # allowed relative error of the solution in float64


MATRICES = {
    "one": Matrix(np.asarray([3e-9]), 1e-14),
    "definite": Matrix(np.logspace(0, 3, 12), 1e-11),
    "ill-conditioned": Matrix(np.logspace(0, 8, 12), 1e-6),
    "tiny": Matrix(np.logspace(-150, -147, 12), 1e-11),
    "huge": Matrix(np.logspace(150, 153, 12), 1e-11),
    "indefinite": Matrix(np.logspace(0, 3, 12) * (-1) ** np.arange(12), 1e-11),
    "singular": Matrix(np.append(np.zeros(5), np.logspace(0, 3, 7)), 1e-8),
    "indefinite and singular": Matrix(np.append(np.zeros(5), [-3, -2, -1, 1, 2, 3, 4]), 1e-10),
    "zero": Matrix(np.zeros(12), 1e-14),
}


@jax.jit
def solve(turn: jax.Array, eigenvalues: jax.Array, b: jax.Array) -> jax.Array:
    return least_norm(lambda v: turn @ (eigenvalues * (turn.T @ v)), b, 0.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("null", [0.0, 1e-6, 1.0, 1e2], ids="null part {}".format)
def test_the_solution_is_that_of_the_pseudo_inverse(name: str, null: float) -> None:
    eigenvalues, error = MATRICES[name]
    n, random = len(eigenvalues), np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(n, n)))[0]
    nonzero, x = eigenvalues != 0, turn.T @ random.normal(size=n)
    expected = turn @ np.where(nonzero, x, 0)
    part = np.where(nonzero, 0, x) * np.max(np.abs(eigenvalues * x), initial=0)
    part = part if nonzero.any() else x
    b = turn @ (eigenvalues * x + null * part)
    found = solve(turn, eigenvalues, b)
    assert np.linalg.norm(found - expected) <= error * max(null, 1) * np.linalg.norm(turn.T @ x)


def test_what_is_not_solved_is_nan() -> None:
    b = jnp.asarray([1.0, 2.0, -1.0])
    solve = jax.jit(lambda a, b: least_norm(lambda v: a @ v, b, 0.0))
    turning = jnp.asarray([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # not symmetric
    assert jnp.isnan(solve(turning, b)).all()
    assert jnp.isnan(solve(jnp.full((3, 3), jnp.nan), b)).all()
    assert jnp.isnan(solve(jnp.eye(3), b * jnp.nan)).all()
    assert (solve(jnp.eye(3), 0 * b) == 0).all()
