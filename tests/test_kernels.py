import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform import tree
from gradxform.kernels import in_one_kernel, max_abs, maxima, vdots

NUMBERS = {
    "plain": np.float32(0.1),
    "nan": np.float32(np.nan),
    "infinite": np.float32(-np.inf),
    "flag": np.True_,
    "count": np.int32(2**30 + 1),
}
SMALL = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3) - 4, "b": np.float32(-7)}
LARGE = {"a": np.linspace(-3, 2, 5000, dtype=np.float32), "b": np.float32(1)}


def assert_same(one: Any, other: Any) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_numbers_in_one_kernel_are_the_same_numbers(transform: Callable[[Any], Any]) -> None:
    numbers = jax.tree.map(jnp.asarray, NUMBERS)
    assert_same(transform(in_one_kernel)(numbers), numbers)
    assert_same(transform(in_one_kernel)(numbers["plain"]), numbers["plain"])
    lanes = jax.tree.map(lambda x: jnp.stack([x, x]), numbers)
    assert_same(transform(jax.vmap(in_one_kernel))(lanes), lanes)


def test_derivatives_pass_through_one_kernel() -> None:
    f = lambda x: in_one_kernel((x**2, jnp.sin(x)))[0]
    np.testing.assert_allclose(jax.jit(jax.grad(f))(3.0), 6.0)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.grad(f)))(3.0), 2.0)


def test_forward_derivatives_pass_through_a_loop_that_one_kernel_is_a_part_of() -> None:
    """``jax.jacfwd`` maps over tangents alone: what depends on none of them must stay unmapped."""

    def least(a: jax.Array) -> Any:
        solution = gx.minimize(lambda w: (w - a) ** 2 + w**2, jnp.zeros(()), gx.bfgs(), tol=1e-5)
        return solution.params

    np.testing.assert_allclose(jax.jacfwd(least)(3.0), 0.5, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(least))(3.0), 0.5, rtol=1e-5)


@pytest.mark.parametrize("x", [SMALL, LARGE], ids=["small", "large"])
def test_reductions_in_one_pass_are_the_separate_ones(x: Any) -> None:
    y = jax.tree.map(lambda x: np.sin(x), x)
    expected = [tree.vdot(x, y), tree.vdot(y, y)]
    np.testing.assert_allclose(vdots((x, y), (y, y)), expected, rtol=1e-5)
    np.testing.assert_array_equal(max_abs(x, y), [tree.max_abs(x), tree.max_abs(y)])
    np.testing.assert_array_equal(maxima(x)[0], max(np.max(leaf) for leaf in x.values()))


# -- how many kernels a turn of minimize's loop launches

MOST_KERNELS = {
    "bfgs": 50,
    "lbfgs": 66,
    "nonlinear_cg": 50,
    "newton with a search": 75,
    "trust_region": 60,
    "trust_region, steihaug": 60,
    "sgd": 20,
    "adam": 25,
}


def test_a_turn_of_minimize_launches_few_kernels() -> None:
    """In a process of its own: the flags of the tests make other programs."""
    flags = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: x for name, x in os.environ.items() if name not in flags}
    command = [sys.executable, "-m", "testbed.kernels"]
    printed = subprocess.check_output(command, text=True, env=environment)
    counts = json.loads(printed.splitlines()[-1])
    assert {name: n for name, n in counts.items() if n > MOST_KERNELS[name]} == {}
    assert min(counts.values()) > 5  # the reader of programs sees them
