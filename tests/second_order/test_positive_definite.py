"""Inverses of positive definite matrices, against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradxform.second_order import positive_definite

_compiled = jax.jit(positive_definite.inverse)


def matrix(n: int, condition: float, kind: str, seed: int) -> np.ndarray:
    """A positive definite matrix: a random one, or one of neighbours that are alike."""
    rng = np.random.default_rng(seed)
    if kind == "spread":
        q, _ = np.linalg.qr(rng.normal(size=(n, n)))
        return (q * np.logspace(0, -np.log10(condition), n)) @ q.T
    v = np.cumsum(rng.normal(size=(n, 2 * n)), axis=0)
    a = v @ v.T
    return a / np.trace(a) + np.eye(n) / condition


@given(
    st.sampled_from([1, 9, 64, 100, 150]),
    st.sampled_from([1.0, 1e3, 1e5]),
    st.sampled_from(["spread", "alike"]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_inverse_is_as_exact_as_rounding_allows(
    n: int, condition: float, kind: str, seed: int
) -> None:
    a = jnp.asarray(matrix(n, condition, kind, seed), jnp.float32)
    exact = np.linalg.inv(np.asarray(a, np.float64))
    found = np.asarray(_compiled(a[None])[0], np.float64)
    error = np.linalg.norm(found - exact, 2) / np.linalg.norm(exact, 2)
    assert error < 100 * np.finfo(np.float32).eps * condition
    assert np.linalg.eigvalsh((found + found.T) / 2)[0] > 0


@pytest.mark.parametrize("n", [7, 64, 65, 200])
def test_stacks_and_lanes(n: int) -> None:
    stack = jnp.stack([jnp.asarray(matrix(n, 100.0, "alike", k), jnp.float32) for k in range(3)])
    found = jax.jit(positive_definite.inverse)(stack)
    for one, a in zip(found, stack, strict=True):
        np.testing.assert_allclose(one @ a, np.eye(n), atol=2e-3)
    lanes = jax.vmap(positive_definite.inverse)(stack[:, None])[:, 0]
    np.testing.assert_allclose(lanes, found, rtol=1e-3, atol=1e-4 * float(jnp.abs(found).max()))


@pytest.mark.usefixtures("x64")
def test_in_float64() -> None:
    a = jnp.asarray(matrix(130, 1e6, "spread", 0))
    np.testing.assert_allclose(positive_definite.inverse(a[None])[0] @ a, np.eye(130), atol=1e-8)


def test_a_matrix_that_is_not_positive_definite_is_seen() -> None:
    a = jnp.diag(jnp.asarray([1.0] * 70 + [-1.0]))
    assert not bool(jnp.isfinite(positive_definite.inverse(a[None])).all())
