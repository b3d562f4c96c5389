"""The inverse Hessian of a solution: symmetric, positive definite, and the one the method uses."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx
from gradxform import tree
from gradxform.inverse import inverse_hessian, inverse_product
from tests.methods import nested_params, objective
from tests.thinning import every

PARTS = {
    f"{name} {ravel}": build(ravel=ravel)
    for name, build in (("bfgs", gx.scale_by_bfgs), ("lbfgs", gx.scale_by_lbfgs))
    for ravel in (True, False)
}
SEARCHED = {
    "bfgs": gx.bfgs(),
    "lbfgs leaves": gx.lbfgs(3, ravel=False),
    "around": gx.with_line_search(gx.scale_by_bfgs()),
    "around, ravelled": gx.with_line_search(gx.scale_by_lbfgs(ravel=False), ravel=True),
    "in a chain": optax.chain(optax.identity(), gx.masked(gx.lbfgs(), True)),
    "injected": gx.inject_hyperparams(gx.bfgs)(decrease=0.2, ravel=False),
}


def spread(n: int) -> jax.Array:
    """A positive definite matrix with eigenvalues from 1 to 100."""
    rotated, _ = np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))
    return jnp.asarray(rotated * np.geomspace(1, 100, n) @ rotated.T)


def dense(solution: gx.Solution) -> jax.Array:
    flat, unravel = ravel_pytree(solution.params)
    column = lambda v: ravel_pytree(solution.inverse_hessian(unravel(v)))[0]
    return jax.jit(jax.vmap(column))(jnp.eye(flat.size, dtype=flat.dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [functools.partial(gx.bfgs, self_scaling=False), gx.lbfgs])
def test_exact_searches_along_n_directions_make_it_the_inverse(make: Any) -> None:
    a = spread(5)
    bowl = lambda x: 0.5 * (x - 1) @ a @ (x - 1)
    solution = gx.minimize(bowl, jnp.zeros(5), make(decrease=1e-4, curvature=1e-3), tol=1e-9)
    assert solution.loop.state.inner_state.info.pairs == 5
    np.testing.assert_allclose(dense(solution), np.linalg.inv(a), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", every(2, SEARCHED))
def test_it_is_symmetric_positive_definite_and_gives_the_direction(name: str) -> None:
    solution = gx.minimize(objective, nested_params(jnp.float64), SEARCHED[name], max_steps=9)
    h = dense(solution)
    np.testing.assert_allclose(h, h.T, rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh(h).min() > 0
    assert np.abs(h - np.diag(np.diag(h))).max() > 1e-3  # the pairs are in it
    is_search = lambda x: type(x).__name__ == "LineSearchState"
    (search,) = [x for x in jax.tree.leaves(solution.loop.state, is_search) if is_search(x)]
    g, d = (ravel_pytree(x)[0] for x in (search.accepted.grad, search.direction))
    np.testing.assert_allclose(d, -h @ g, rtol=1e-9, atol=1e-15)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PARTS)
def test_the_newest_pair_and_the_direction(name: str) -> None:
    tx, params = PARTS[name], nested_params(jnp.float64)

    @jax.jit
    def step(shift: float, state: Any, old: Any) -> Any:
        point = jax.tree.map(lambda p: p + shift * jnp.cos(p), params)
        grads = jax.grad(objective)(point)
        direction, state = tx.update(grads, state, point)
        s, y = jax.tree.map(jnp.subtract, (point, grads), old)
        products = inverse_product(state, grads), inverse_product(state, y)
        return state, (point, grads), products, (direction, s)

    state, old = tx.init(params), (params, params)
    for k, shift in enumerate((0.0, 0.4, -0.3, 0.7)):
        state, old, products, expected = step(shift, state, old)
        for a, b in zip(*map(jax.tree.leaves, (products, expected)), strict=True):
            if k > 0:
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tx"), [(jnp.float32, gx.bfgs()), (jnp.bfloat16, gx.lbfgs(ravel=False))]
)
def test_dtypes_jit_and_the_start(dtype: Any, tx: Any) -> None:
    start = {"a": jnp.ones(2, dtype), "b": jnp.asarray(2.0, dtype)}
    bowl = lambda p: jnp.sum(tree.promote(p["a"]) ** 2) + 4 * tree.promote(p["b"]) ** 2
    vector = {"a": np.ones(2), "b": 1.0}
    product_of = jax.jit(gx.Solution.inverse_hessian)
    product = product_of(gx.minimize(bowl, start, tx), vector)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(product))
    np.testing.assert_allclose(product["b"], 1 / 8, rtol=0.05)
    at_start = product_of(gx.minimize(bowl, start, tx, max_steps=0), vector)
    np.testing.assert_array_equal(at_start["a"], 1)


def test_complex_parameters_have_a_complex_product() -> None:
    bowl = lambda p: jnp.real(p["z"]) ** 2 + 4 * jnp.imag(p["z"]) ** 2 + p["x"] ** 2
    start = {"z": jnp.asarray(1 + 1j), "x": jnp.asarray(1.0)}
    solution = gx.minimize(bowl, start, gx.bfgs(), tol=1e-5)
    product = solution.inverse_hessian({"z": 1 + 1j, "x": 1.0})
    np.testing.assert_allclose(product["z"], 1 / 2 + 1j / 8, rtol=0.02)
    assert (product["z"].dtype, product["x"].dtype) == (jnp.complex64, jnp.float32)
    with pytest.raises(ValueError, match=r"^inverse_hessian\(vector=…\): .*dtype"):
        solution.inverse_hessian({"z": 1.0, "x": 1.0})


def test_a_batch_is_that_of_its_lanes() -> None:
    solve = lambda c: gx.minimize(lambda x: jnp.sum((x - c) ** 2 * (1 + c * x)), jnp.ones(3))
    centres, vectors = jnp.asarray([0.5, 0.9]), jnp.arange(6.0).reshape(2, 3)
    solutions = jax.vmap(solve)(centres)
    products = jax.vmap(lambda s, v: s.inverse_hessian(v))(solutions, vectors)
    for k in range(2):
        lane = jax.tree.map(lambda x, k=k: x[k], solutions)
        np.testing.assert_allclose(lane.inverse_hessian(vectors[k]), products[k], rtol=1e-4)
    with pytest.raises(ValueError, match=r"holds 2 runs of a jax\.vmap: map over it"):
        solutions.inverse_hessian(vectors)


MASK = {"a": True, "b": False, "c": True}
START = {"a": jnp.ones(2), "b": jnp.asarray([1.0, 2.0]), "c": jnp.asarray(3.0)}


def in_parts(p: Any) -> jax.Array:
    return jnp.sum(p["a"] ** 2) + jnp.sum((p["b"] - 1) ** 2) + 5 * p["c"] ** 2


def test_it_is_zero_for_what_a_mask_hides() -> None:
    tx = gx.partition({True: gx.lbfgs(), False: optax.set_to_zero()}, MASK)
    product = gx.minimize(in_parts, START, tx, tol=1e-4).inverse_hessian(START)
    np.testing.assert_array_equal(product["b"], [0, 0])
    np.testing.assert_allclose(product["c"], 0.3, rtol=0.05)
    for inner in (gx.bfgs(), gx.bfgs(ravel=False), gx.scale_by_lbfgs(ravel=False)):
        product = inverse_hessian(gx.masked(inner, MASK).init(START), START, START)
        expected = {**START, "b": jnp.zeros(2)}
        jax.tree.map(np.testing.assert_array_equal, product, expected)


def test_two_methods_of_two_parts_are_two_blocks() -> None:
    tx = gx.partition({True: gx.lbfgs(), False: gx.bfgs()}, MASK)
    product = inverse_hessian(tx.init(START), START, START)
    jax.tree.map(np.testing.assert_array_equal, product, START)


def test_a_state_of_ones_own_joins_in() -> None:
    class DiagonalState(NamedTuple):
        diagonal: Any

    @inverse_product.register
    def _(state: DiagonalState, vector: Any) -> Any:
        return jax.tree.map(jnp.multiply, state.diagonal, vector)

    init = lambda params: DiagonalState(jax.tree.map(lambda p: 0 * p + 0.5, params))
    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    for chain in (optax.chain(tx, gx.sgd(0.1)), gx.with_line_search(tx, ravel=True)):
        product = inverse_hessian(chain.init(START), START, START)
        np.testing.assert_allclose(product["b"], [0.5, 1])


def test_what_has_none_is_refused_in_one_line() -> None:
    def product(tx: optax.GradientTransformation, vector: Any = START) -> Any:
        return inverse_hessian(tx.init(START), START, vector)

    for tx in (gx.nonlinear_cg(), gx.sgd(0.1), gx.trust_region(), optax.adam(0.1)):
        with pytest.raises(ValueError, match=r"^inverse_hessian: .*bfgs, lbfgs.*gx\.cov") as caught:
            product(tx)
        assert "\n" not in str(caught.value)
    for bad in ({"a": jnp.ones(2)}, {**START, "c": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r"^inverse_hessian\(vector=…\): .*\['(b|c)'\]"):
            product(gx.bfgs(), bad)
    with pytest.raises(TypeError, match=r"^inverse_hessian: vector\['c'\] is 'x'"):
        product(gx.bfgs(), {**START, "c": "x"})
    with pytest.raises(ValueError, match="two methods"):
        product(optax.chain(gx.scale_by_bfgs(), gx.scale_by_lbfgs(), gx.sgd(0.1)))
    for name, tx in (("bfgs", gx.scale_by_bfgs()), ("lbfgs", gx.scale_by_lbfgs())):
        with pytest.raises(ValueError, match=rf"build scale_by_{name} with ravel=False"):
            product(gx.masked(tx, MASK))
