import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx

rng = np.random.default_rng(3)


def test_hutchinson_diagonal_is_exact_of_a_diagonal_and_near_of_others() -> None:
    like = {"a": jnp.zeros(2), "b": jnp.zeros((2, 3))}
    scales = {"a": jnp.asarray([1.0, 2.0]), "b": 3.0 + jnp.arange(6.0).reshape(2, 3)}
    product = lambda v: jax.tree.map(jnp.multiply, scales, v)
    inverse, made = gx.hutchinson_diagonal(1)(product, like, jnp.asarray(3))
    assert made == 1
    ones = inverse(scales)
    np.testing.assert_allclose(ravel_pytree(ones)[0], 1.0, rtol=1e-6)

    matrix = jnp.eye(20) * jnp.arange(1.0, 21.0) + 0.1
    inverse, _ = gx.hutchinson_diagonal(64)(lambda v: matrix @ v, jnp.zeros(20), jnp.asarray(0))
    np.testing.assert_allclose(inverse(jnp.diag(matrix)), 1.0, atol=0.3)


def test_nystrom_takes_the_large_eigenvalues_away() -> None:
    q, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    eigenvalues = np.concatenate([[1e3, 1e2, 1e2, 50.0], np.ones(26)])
    matrix = jnp.asarray(q * eigenvalues @ q.T, jnp.float32)
    inverse, made = gx.nystrom(6)(lambda v: matrix @ v, jnp.zeros(30), jnp.asarray(0))
    assert made == 6
    left = np.linalg.eigvals(jax.vmap(inverse)(matrix)).real
    assert left.max() / left.min() < 3


def test_a_preconditioner_without_information_is_the_identity() -> None:
    v = jnp.arange(3.0)
    for matrix in (-jnp.eye(3), jnp.full((3, 3), jnp.nan)):
        inverse, _ = gx.nystrom(2)(lambda v, a=matrix: a @ v, v, jnp.asarray(0))
        np.testing.assert_array_equal(inverse(v), v)
    for matrix in (jnp.zeros((3, 3)), jnp.full((3, 3), jnp.nan)):
        inverse, _ = gx.hutchinson_diagonal()(lambda v, a=matrix: a @ v, v, jnp.asarray(0))
        np.testing.assert_array_equal(inverse(v), v)


def test_bad_preconditioners_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"hutchinson_diagonal\(samples=1\.5\)"):
        gx.hutchinson_diagonal(1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"nystrom\(rank=0\)"):
        gx.nystrom(0)
    with pytest.raises(TypeError, match=r"preconditioner='diagonal'\).*hutchinson"):
        gx.newton_cg(preconditioner="diagonal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"curvature='hessian'\).*gx\.hessian\(\)"):
        gx.newton_cg(curvature="hessian")  # pyright: ignore[reportArgumentType]
