"""Stochastic rounding: its mean, its neighbours, its extremes, and where it leads."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import gradxform as gx
from gradxform.wrappers.rounding import RoundedStochasticallyState
from tests.methods import METHODS, Method, nested_params, objective, run, step
from tests.test_precision import cross_entropy, net, start
from tests.thinning import every

HALF, SINGLE = jnp.bfloat16, jnp.float32
TINY = float(jnp.finfo(SINGLE).tiny)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
both_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def rounded(p: Any, u: Any, seeds: int) -> np.ndarray:
    """The parameters that an update u of p leads to, for many seeds; u is in float32."""

    def one(seed: jax.Array) -> jax.Array:
        tx = gx.rounded_stochastically(optax.identity(), seed=seed)
        updates, _ = tx.update(u, tx.init(p), p)
        return optax.apply_updates(p, updates.astype(p.dtype))  # as a gradient in p.dtype gets it

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(seeds))).astype(np.float64)


def neighbours(x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of ``dtype`` up to x and the smallest one from x on, in float64."""
    near = x.astype(dtype)
    below, above = (np.nextafter(near, np.asarray(to, dtype)) for to in (-np.inf, np.inf))
    low = np.where(near <= x, near, below).astype(np.float64)
    return low, np.where(near >= x, near, above).astype(np.float64)


@both_dtypes
@pytest.mark.parametrize("size", every(2, [1e-5, 1e-2, 0.1, 1.0, 20.0]))
def test_the_mean_is_the_exact_sum(dtype: str, size: float) -> None:
    rng, n, seeds = np.random.default_rng(0), 400, 1000
    p = rng.normal(size=n) * 10 ** rng.uniform(-2, 2, n)
    p = np.asarray(p, np.float32).astype(jnp.dtype(dtype))
    u = (size * np.abs(p.astype(np.float32)) * rng.normal(size=n)).astype(np.float32)
    exact = (p.astype(np.float32) + u).astype(np.float64)
    found = rounded(jnp.asarray(p), jnp.asarray(u), seeds)

    low, high = neighbours(exact, p.dtype)
    small = np.abs(u) <= np.abs(p.astype(np.float32)) / 2
    assert np.all(((found == low) | (found == high))[:, small])
    # the spread of a number that is a with probability 1 − s and b with probability s
    first, last = found.min(axis=0), found.max(axis=0)
    s = np.clip((exact - first) / np.maximum(last - first, 1e-30), 0, 1)
    spread = (last - first) * np.sqrt((s * (1 - s) + 1 / seeds) / seeds)
    rare = np.where(first == last, (high - low) * 10 / seeds, 0)  # the other one was never drawn
    assert np.all(np.abs(found.mean(axis=0) - exact) <= 5 * spread + rare)


@both_dtypes
def test_every_share_is_the_distance_to_the_neighbours(dtype: str) -> None:
    """Between 1 and the next number there are 2ᵏ steps of float32; a share is one of them."""
    eps = float(jnp.finfo(dtype).eps)
    shares = np.asarray([0.0, 0.125, 0.5, 0.875, 1.0], np.float32)
    u = jnp.asarray([sign * eps * s for sign in (1, -1) for s in shares], SINGLE)
    p = jnp.asarray([1.0] * 5 + [-1.0] * 5, dtype)
    share = (np.abs(rounded(p, u, 4000)) > 1).mean(axis=0)
    np.testing.assert_allclose(share, [*shares, *shares], atol=0.04)
    assert np.all(share[[0, 4, 5, 9]] == [0, 1, 0, 1])


@both_dtypes
def test_extremes(dtype: str) -> None:
    info = jnp.finfo(dtype)
    largest, least = float(info.max), float(info.smallest_subnormal)
    inf, nan = float("inf"), float("nan")
    unit = 2.0 ** (info.maxexp - 1) * float(info.eps)  # between the two largest numbers
    tenth = neighbours(np.asarray([-np.float32(0.1)]), info.dtype)
    cases = [
        (0.0, 0.0, {0.0}),
        (1.0, 0.0, {1.0}),
        (1.0, -1.0, {0.0}),
        (0.0, -0.1, {float(x[0]) for x in tenth}),
        (largest, 0.1 * unit, {largest}),  # no infinity from finite numbers
        (-largest, -0.3 * unit, {-largest}),
        (largest, -0.5 * unit, {largest, largest - unit}),
        (1.0, inf, {inf}),
        (1.0, -inf, {-inf}),
        (inf, 1.0, {inf}),
        (1.0, nan, {nan}),
        (nan, 1.0, {nan}),
    ]
    if least > TINY:  # float32's own small numbers may be flushed to zero
        cases.append((0.0, 2.5 * least, {2 * least, 3 * least}))
        cases.append((3 * least, -0.5 * least, {2 * least, 3 * least}))
    p, u, expected = zip(*cases, strict=True)
    found = rounded(jnp.asarray(p, dtype), jnp.asarray(u, SINGLE), 64)
    for *case, drawn, allowed in zip(p, u, found.T, expected, strict=True):
        assert {str(x) for x in drawn} == {str(np.float64(x)) for x in allowed}, case


def test_float32_and_float64_are_left_alone(x64: None) -> None:
    for dtype in (jnp.float32, jnp.float64):
        params = nested_params(dtype)
        plain, wrapped = gx.adam(0.05), gx.rounded_stochastically(gx.adam(0.05))
        expected, state = run(plain, params, 4)
        found, new = run(wrapped, params, 4)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
        chex.assert_trees_all_equal_dtypes(new.inner_state, state)


def test_the_seed_decides_everything() -> None:
    def path(seed: Any) -> Any:
        return run(gx.rounded_stochastically(gx.momentum(1e-3), seed=seed), params, 9, slope)

    params, slope = jnp.linspace(1, 2, 6, dtype=HALF), lambda p: jnp.sum(p.astype(SINGLE))
    first, lanes = path(0), jax.jit(jax.vmap(path))(jnp.arange(3))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], lanes), first)
    assert len({str(lane) for lane in lanes[0].tolist()}) == 3
    # and a run that is interrupted goes on with the same numbers
    tx = gx.rounded_stochastically(gx.momentum(1e-3))
    chex.assert_trees_all_equal(step(tx, *run(tx, params, 8, slope), slope), first)


@every_method
def test_any_method_computes_in_float32(method: Method) -> None:
    tx, params = gx.rounded_stochastically(method.build()), nested_params(HALF)
    state = jax.eval_shape(tx.init, params)

    def one_step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(objective)(params)
        arguments = {"value": value, "grad": grads, "value_fn": objective}
        updates, state = tx.update(grads, state, params, **arguments)
        params = optax.apply_updates(params, updates)
        return updates, params, gx.eval_params(state, params), state

    *trees, after = jax.eval_shape(one_step, params, state)
    for found in trees:
        chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert isinstance(state, RoundedStochasticallyState)
    expected = jax.eval_shape(method.build().init, nested_params())
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_state, expected)


@pytest.mark.parametrize("name", every(2, ["nesterov", "bfgs", "coordinate_descent"]))
def test_methods_descend_as_in_float32(name: str) -> None:
    tx = gx.rounded_stochastically(METHODS[name].build())
    start = nested_params(HALF)

    @jax.jit
    def values(params: Any) -> Any:
        params, state = run(tx, params, 60)
        return objective(gx.eval_params(state, params))

    full = objective(run(METHODS[name].build(), nested_params(), 60)[0])
    assert values(start) < full + 0.05 * objective(start)


def test_optax_states_are_kept_in_float32() -> None:
    """Optax keeps moments in the dtype of the parameters, where b2 = 0.999 rounds to 1."""
    state = gx.rounded_stochastically(optax.adam(1e-3)).init(nested_params(HALF))
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32", "uint32"}


def test_in_chains_masks_and_other_wrappers() -> None:
    params = nested_params(HALF)
    plain = gx.rounded_stochastically(optax.chain(optax.clip(0.1), gx.sgd(1e-2)))
    expected = run(plain, params, 3)[0]
    outside = optax.chain(optax.clip(0.1), gx.rounded_stochastically(gx.sgd(1e-2)))
    injected = gx.inject_hyperparams(gx.rounded_stochastically)(
        optax.chain(optax.clip(0.1), gx.sgd(1e-2)), seed=0
    )
    for tx in (outside, injected):
        chex.assert_trees_all_equal(run(tx, params, 3)[0], expected)
    for wrap in (
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: gx.accumulate(tx, 2),
        lambda tx: gx.polyak_average(tx),
        lambda tx: gx.partition({1: tx, 2: gx.sgd(0.1)}, {**dict.fromkeys(params, 1), "scale": 2}),
    ):
        tx = wrap(gx.rounded_stochastically(gx.adam(1e-3)))
        shapes = jax.eval_shape(lambda tx=tx: run(tx, params, 2)[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)


def test_sharded_parameters_are_rounded_alike() -> None:
    tx = gx.rounded_stochastically(gx.momentum(1e-3))
    params = {"w": jnp.linspace(-1, 1, 64, dtype=HALF).reshape(16, 4)}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        expected = jax.jit(lambda p: run(tx, p, 3))(params)
        with jax.set_mesh(mesh):
            found = jax.jit(lambda p: run(tx, p, 3))(jax.device_put(params, rows))
        assert found[0]["w"].sharding.is_equivalent_to(rows, 2)
        chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (found[0], expected[0])))


def test_bfloat16_reaches_the_loss_of_float32_on_the_digits() -> None:
    """Adam in 500 small steps; rounding to the nearest number loses most of them."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, SINGLE), jnp.asarray(digits.target)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_after(seeds: int, params: Any) -> jax.Array:
        """The mean loss over the seeds; without seeds it is rounded to the nearest number."""

        def one(seed: Any) -> jax.Array:
            tx = gx.adam(0.002)
            if seeds:
                tx = gx.rounded_stochastically(tx, seed=seed)

            def body(carry: Any, i: jax.Array) -> tuple[Any, None]:
                batch = [jax.lax.dynamic_slice_in_dim(a, 64 * (i % 28), 64) for a in (x, y)]
                loss = lambda p: cross_entropy(net(p, batch[0], SINGLE), batch[1])
                updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
                return (optax.apply_updates(carry[0], updates), state), None

            (end, _), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(500))
            return cross_entropy(net(end, x, SINGLE), y)

        return jnp.mean(jax.vmap(one)(jnp.arange(seeds))) if seeds else one(0)

    expected = loss_after(0, start(SINGLE))
    assert loss_after(0, start(HALF)) > 1.5 * expected
    np.testing.assert_allclose(loss_after(4, start(HALF)), expected, rtol=0.01)
