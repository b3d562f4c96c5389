"""``by_rows`` equals ``jax.vmap`` in values and all derivatives, and saves the columns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree

import gradxform as gx

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(9, 3))), jnp.asarray(RNG.normal(size=(9, 2)))
CLASSES = jnp.asarray(RNG.integers(0, 2, size=9))
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray([0.1, -0.2])}


def scalar(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]).sum() + p["b"][0] * x[0] ** 2


def vector(p: Any, x: Any, y: Any) -> Any:
    return jnp.tanh(x @ p["w"] + p["b"]) - y


def labelled(p: Any, x: Any, k: Any) -> Any:
    return {"one": (x @ p["w"])[k] ** 2, "two": p["b"] * x[0]}


CASES = {
    "scalar": (scalar, (X,)),
    "vector": (vector, (X, Y)),
    "integers and a pytree": (labelled, (X, CLASSES)),
}


def flat(fn: Any) -> Any:
    return lambda *args: ravel_pytree(fn(*args))[0]


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_vmap(name: str) -> None:
    residual, data = CASES[name]
    plain = lambda p, *data: jax.vmap(residual, (None, *(0 for _ in data)))(p, *data)
    ours = gx.by_rows(residual)
    half = lambda f, *args: flat(f)(*args) @ flat(f)(*args) / 2
    twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    for wrapped in (
        flat,
        lambda f: jax.jacfwd(flat(f)),
        lambda f: jax.jacrev(flat(f)),
        lambda f: jax.jacrev(flat(f), argnums=1),
        lambda f: jax.hessian(functools.partial(half, f)),
        lambda f: lambda _, *data: jax.vmap(lambda p: flat(f)(p, *data))(twice),
    ):
        found, expected = wrapped(ours)(PARAMS, *data), wrapped(plain)(PARAMS, *data)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_data_by_name_and_as_arguments_of_a_fit() -> None:
    truth = {"w": PARAMS["w"] / 2, "b": PARAMS["b"]}
    y = jnp.tanh(X @ truth["w"] + truth["b"])
    rows = gx.by_rows(vector)
    assert jnp.abs(rows(truth, x=X, y=y)).max() < 1e-6
    fit = gx.least_squares(rows, PARAMS, args=(X, y))
    np.testing.assert_allclose(fit.params["w"], truth["w"], atol=1e-3)


def largest(jaxpr: Any) -> int:
    """Entries of the largest array that a program makes."""
    inner = [largest(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return max([*inner, *(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)])


def test_no_array_has_all_columns_and_all_hidden_units() -> None:
    m, n = 100, 40
    params, x = {"w": jnp.zeros((n, n)), "v": jnp.zeros(n)}, jnp.ones((m, n))
    residual = lambda p, x: p["v"] @ jnp.tanh(p["w"] @ x)
    columns = n * n + n
    plain = jax.make_jaxpr(jax.jacfwd(jax.vmap(residual, (None, 0))))(params, x)
    ours = jax.make_jaxpr(jax.jacfwd(gx.by_rows(residual)))(params, x)
    assert largest(plain.jaxpr) >= columns * m * n
    assert largest(ours.jaxpr) <= columns * columns  # the identity that jacfwd pushes through


def test_errors_are_one_line() -> None:
    with pytest.raises(TypeError, match=r"by_rows\(residual=3\)"):
        gx.by_rows(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError, match="by_rows: the function takes the parameters and then"
    ) as caught:
        gx.by_rows(lambda p: p)(PARAMS)
    assert "\n" not in str(caught.value)
