"""Projections and penalties: exact steps, the right minimum with any method, and exact zeros."""

import functools
import os
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import nnls
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path

import gradxform as gx
from tests.methods import step
from tests.wrappers.cases import close

STRICT = os.environ.get("GRADXFORM_STRICT")
pytestmark = pytest.mark.skipif(STRICT == "dtype_promotion", reason="Optax's sets are not strict")

SIMPLEX = optax.projections.projection_simplex
NON_NEGATIVE = optax.projections.projection_non_negative
L1_BALL = functools.partial(optax.projections.projection_l1_ball, scale=0.7)
L2_BALL = functools.partial(optax.projections.projection_l2_ball, scale=0.5)
WIDE_BALL = functools.partial(optax.projections.projection_l1_ball, scale=100.0)

RNG = np.random.default_rng(0)
A = RNG.normal(size=(50, 8))
B = A @ RNG.normal(size=8) + RNG.normal(size=50)
STEEPEST = np.linalg.eigvalsh(A.T @ A).max()  # the largest curvature


def squares(x: Any) -> jax.Array:
    return 0.5 * jnp.sum((jnp.asarray(A) @ x - jnp.asarray(B)) ** 2)


def path(tx: Any, steps: int, start: Any, f: Any = squares) -> Any:
    """The parameters after each update, and the last state."""

    def body(carry: Any, _: None) -> Any:
        params, state = step(tx, *carry, f)
        return (params, state), params

    (_, state), points = jax.lax.scan(body, (start, tx.init(start)), length=steps)
    return points, state


# -- one update


@pytest.mark.parametrize("rate", [0.9 / STEEPEST, lambda k: 0.9 / STEEPEST / (1 + 0.1 * k)])
def test_gradient_descent_makes_the_steps_of_the_textbook(x64: None, rate: Any) -> None:
    strength, start = 20.0, np.linspace(-1, 2, 8)
    sparse, _ = path(gx.proximal(gx.sgd(rate), gx.soft_threshold(strength)), 30, start)
    inside, _ = path(gx.projected(gx.sgd(rate), L2_BALL), 30, start)
    expected_sparse = expected_inside = start
    for k in range(30):
        eps = rate(k) if callable(rate) else rate
        gradient = lambda x: A.T @ (A @ x - B)
        x = expected_sparse - eps * gradient(expected_sparse)
        expected_sparse = np.sign(x) * np.maximum(np.abs(x) - eps * strength, 0)
        x = expected_inside - eps * gradient(expected_inside)
        expected_inside = x * min(1, 0.5 / np.linalg.norm(x))
        np.testing.assert_allclose(sparse[k], expected_sparse, atol=1e-12)
        assert np.array_equal(sparse[k] == 0, expected_sparse == 0)
        np.testing.assert_allclose(inside[k], expected_inside, atol=1e-12)
    assert np.any(expected_sparse == 0)
    assert np.any(expected_sparse != 0)


def test_a_gradient_of_zero_at_the_start() -> None:
    """The update tells no step there; it is that of another gradient."""
    params = jnp.asarray([1.0, -0.02])
    tx = gx.proximal(gx.sgd(0.1), gx.soft_threshold(0.5))
    updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    close(optax.apply_updates(params, updates), jnp.asarray([0.95, 0.0]))


def test_a_method_that_waits_moves_nothing() -> None:
    params = jnp.asarray([1.0, -2.0])
    warm_up = lambda count: jnp.where(count < 2, 0.0, 0.1)
    for tx in (gx.sgd(warm_up), gx.accumulate(gx.sgd(0.1), 3)):
        points, _ = path(gx.proximal(tx, gx.soft_threshold(0.5)), 6, params, jnp.sum)
        assert jnp.array_equal(points[:2], jnp.stack([params, params]))
        assert not jnp.array_equal(points[2], params)
        assert jnp.all(jnp.isfinite(points))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_zeros_are_exact_in_the_loop(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = jnp.asarray(RNG.normal(size=200) * 10 ** RNG.uniform(-3, 2, 200), dtype)
        tx = gx.proximal(gx.sgd(1e-3), gx.soft_threshold(200.0))
        updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
        after = optax.apply_updates(params, updates)
        assert after.dtype == updates.dtype == params.dtype
        reached = np.asarray(params, np.float64) - 1e-3
        assert np.all((np.asarray(after) == 0)[np.abs(reached) < 0.19])
        assert np.all((np.asarray(after) != 0)[np.abs(reached) > 0.21])
        wide = jnp.promote_types(dtype, jnp.float32)
        assert {x.dtype for x in jax.tree.leaves(state.subgradient)} == {wide}
        rounded = gx.rounded_stochastically(tx)
        updates, _ = rounded.update(jnp.ones_like(params), rounded.init(params), params)
        assert jnp.array_equal(optax.apply_updates(params, updates) == 0, after == 0)


# -- the minimum

DIABETES, TARGET = load_diabetes(return_X_y=True)
FEATURES = (DIABETES - DIABETES.mean(0)) / DIABETES.std(0)
TARGET = TARGET - TARGET.mean()


def misfit(w: Any, x: Any, y: Any) -> jax.Array:
    return 0.5 * jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize("optimiser", ["nesterov", "adam"])
def test_the_lasso_path_of_scikit_learn(x64: None, optimiser: str) -> None:
    n = len(TARGET)
    largest = np.abs(FEATURES.T @ TARGET / n).max()
    strengths = 0.99 * largest * np.logspace(0, -3, 20)
    _, expected, _ = lasso_path(FEATURES, TARGET, alphas=strengths, tol=1e-15, max_iter=10**6)
    rate = n / np.linalg.eigvalsh(FEATURES.T @ FEATURES).max()
    method = gx.nesterov(rate) if optimiser == "nesterov" else gx.adam(1.0)

    @jax.jit
    @jax.vmap
    def solve(strength: Any) -> gx.Solution:
        tx = gx.proximal(method, gx.soft_threshold(strength))
        return gx.minimize(misfit, jnp.zeros(10), tx, args=(FEATURES, TARGET), tol=1e-9)

    found = solve(strengths)
    np.testing.assert_allclose(found.params, expected.T, atol=1e-6)
    assert np.array_equal(found.params == 0, expected.T == 0)
    assert np.all(found.status == gx.Status.converged)
    assert np.max(found.steps) < 3000


def test_nesterov_accelerates(x64: None) -> None:
    rate = len(TARGET) / np.linalg.eigvalsh(FEATURES.T @ FEATURES).max()
    plain, fast = (
        gx.minimize(
            lambda w: misfit(w, FEATURES, TARGET),
            jnp.zeros(10),
            gx.proximal(method, gx.soft_threshold(0.1)),
        )
        for method in (gx.sgd(rate), gx.nesterov(rate))
    )
    close(fast.params, plain.params, rtol=0, atol=1e-3)
    assert fast.steps < 0.2 * plain.steps


@pytest.mark.parametrize("tx", [gx.nesterov(1 / STEEPEST, 0.8), gx.adam(0.05)])
def test_non_negative_least_squares(x64: None, tx: Any) -> None:
    expected, _ = nnls(A, B)
    found = gx.minimize(squares, jnp.ones(8), gx.projected(tx, NON_NEGATIVE), tol=1e-9)
    np.testing.assert_allclose(found.params, expected, atol=1e-8)
    assert np.array_equal(found.params == 0, expected == 0)
    assert found.status == gx.Status.converged


CASES = {
    "momentum on the simplex": (gx.momentum(0.5 / STEEPEST), SIMPLEX),
    "adam on the simplex": (gx.adam(0.1), SIMPLEX),
    "nesterov in an l1 ball": (gx.nesterov(0.5 / STEEPEST), L1_BALL),
    "adam in an l2 ball": (gx.adam(0.1), L2_BALL),
    "clipped, in a set that holds nothing back": (
        optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(1 / STEEPEST)),
        WIDE_BALL,
    ),
}


@pytest.mark.parametrize(("tx", "projection"), CASES.values(), ids=CASES.keys())
def test_minimize_in_a_set_with_any_method(x64: None, tx: Any, projection: Any) -> None:
    """x is the minimum in a convex set exactly if x = P(x − g)."""
    start = 3 * jnp.ones(8)  # outside of all sets but one
    found = gx.minimize(squares, start, gx.projected(tx, projection))
    assert found.status == gx.Status.converged
    assert found.steps < 1500
    slope = jax.grad(squares)(found.params) / STEEPEST
    close(projection(found.params - slope), found.params, rtol=0, atol=1e-7)
    close(projection(found.params), found.params, rtol=0, atol=1e-14)


def test_small_changes_do_not_end_a_rest_at_a_bound() -> None:
    """Momentum carries x beyond the minimum, to the bound, and holds it there for some updates."""
    tx = gx.projected(gx.momentum(0.05), NON_NEGATIVE)
    bowl = lambda x: 0.5 * (x - 0.5) ** 2
    points, _ = path(tx, 40, jnp.asarray(3.0), bowl)
    assert jnp.sum(points == 0) > 1
    found = gx.minimize(bowl, 3.0, tx, stop=gx.small_change(1e-6))
    assert found.status == gx.Status.converged
    close(found.params, 0.5, rtol=1e-4)


def test_a_start_at_the_minimum_without_the_penalty_is_no_end() -> None:
    bowl = lambda x: 0.5 * jnp.sum((x - 2.0) ** 2)
    start = jnp.full(3, 2.0)  # the gradient is exactly zero
    penalty, interval = gx.soft_threshold(0.5), lambda x: jnp.clip(x, -1, 1)
    for wrapped, end in (
        (gx.proximal(gx.sgd(0.3), penalty), 1.5),
        (gx.projected(gx.sgd(0.3), interval), 1.0),
    ):
        found = gx.minimize(bowl, start, wrapped, stop=gx.small_gradient(1e-5))
        assert found.status == gx.Status.converged
        close(found.params, jnp.full(3, end), rtol=1e-5)
    found = gx.minimize(bowl, start, gx.proximal(gx.sgd(0.3), penalty))
    assert found.status == gx.Status.converged
    close(found.params, jnp.full(3, 1.5), rtol=1e-5)
    # where float32 ends before the bound the run rests, and does not wait for ever
    tight = gx.minimize(bowl, start, gx.proximal(gx.sgd(1e-2), penalty), tol=1e-12)
    assert tight.status == gx.Status.converged
    assert tight.steps < 3000


@pytest.mark.skipif(STRICT == "nans", reason="NaN is the answer")
def test_a_penalty_has_no_implicit_derivative() -> None:
    def solve(c: Any) -> Any:
        tx = gx.projected(gx.sgd(0.3), NON_NEGATIVE)
        return gx.minimize(lambda x, c: jnp.sum((x - c) ** 2), 1.0, tx, args=(c,)).params

    assert jnp.isnan(jax.grad(solve)(2.0))


# -- what is around and inside


def test_eval_params_gives_the_sparse_point() -> None:
    """Not θ of the interim point in the loop, which is not sparse."""
    start = jnp.asarray([1.0, -0.1, 0.2])
    f = lambda x: 0.5 * jnp.sum((x - jnp.asarray([2.0, 0.05, -0.02])) ** 2)
    tx = gx.proximal(gx.nesterov(0.1), gx.soft_threshold(0.1))
    points, state = path(tx, 20, start, f)
    assert jnp.array_equal(gx.eval_params(state, points[-1]), points[-1])
    assert jnp.array_equal(points[-1] == 0, jnp.asarray([False, True, True]))


def test_parts_and_wrappers() -> None:
    params = {"w": jnp.asarray([1.0, -0.1]), "b": jnp.asarray(0.3)}
    f = lambda p: 0.5 * (jnp.sum(p["w"] ** 2) + (p["b"] - 1) ** 2)
    alone = lambda w: 0.5 * jnp.sum(w**2)
    sparse = gx.proximal(gx.momentum(0.1), gx.soft_threshold(0.5))
    expected, _ = path(sparse, 4, params["w"], alone)
    intercept, _ = path(gx.sgd(0.1), 4, params["b"], lambda b: 0.5 * (b - 1) ** 2)
    labels = {"w": "sparse", "b": "free"}
    parts = {"sparse": sparse, "free": gx.sgd(0.1)}
    points, state = path(gx.partition(parts, labels), 4, params, f)
    close(points, {"w": expected, "b": intercept})
    assert jnp.array_equal(gx.eval_params(state, points)["w"], points["w"])
    # the intercept is not penalised, and both count for the end
    found = gx.minimize(f, params, gx.partition(parts, labels))
    close(found.params, {"w": jnp.zeros(2), "b": jnp.asarray(1.0)}, atol=1e-5)
    assert found.status == gx.Status.converged
    assert jnp.all(found.params["w"] == 0)
    # two minibatches, and a strength in the state
    twice, _ = path(gx.accumulate(sparse, 2), 8, params["w"], alone)
    close(twice[1::2], expected)
    build = lambda strength: gx.proximal(gx.momentum(0.1), gx.soft_threshold(strength))
    injected, _ = path(gx.inject_hyperparams(build)(strength=0.5), 4, params["w"], alone)
    close(injected, expected)


def test_lanes_and_eager_updates_agree(x64: None) -> None:
    start = jnp.linspace(-1, 1, 8)

    def last(rate: Any, strength: Any) -> Any:
        tx = gx.proximal(gx.sgd(rate), gx.soft_threshold(strength))
        return path(tx, 5, start)[0][-1]

    rates, strengths = jnp.asarray([0.5, 0.9]) / STEEPEST, jnp.asarray([1.0, 30.0])
    lanes = jax.jit(jax.vmap(last))(rates, strengths)
    close(lanes[0], jax.jit(last)(rates[0], strengths[0]))
    tx = gx.proximal(gx.sgd(rates[1]), gx.soft_threshold(strengths[1]))
    params, state = start, tx.init(start)
    for _ in range(5):
        params, state = step(tx, params, state, squares)
    close(lanes[1], params)


def test_sharded_parameters() -> None:
    tx = gx.proximal(gx.momentum(0.1), gx.soft_threshold(0.5))
    params = {"w": jnp.linspace(-1, 1, 64).reshape(16, 4)}
    update = jax.jit(lambda p: step(tx, p, tx.init(p), lambda p: jnp.sum(p["w"] ** 2)))
    expected = update(params)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        with jax.set_mesh(mesh):
            found = update(jax.device_put(params, rows))
        assert found[0]["w"].sharding.is_equivalent_to(rows, 2)
        assert found[1].subgradient["w"].sharding.is_equivalent_to(rows, 2)
        chex.assert_trees_all_close(*jax.tree.map(np.asarray, (found, expected)), rtol=1e-6)


# -- what is refused


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, soft = jnp.ones(2), gx.soft_threshold(0.1)
    for name, wrap in (
        ("proximal", lambda tx: gx.proximal(tx, soft)),
        ("projected", lambda tx: gx.projected(tx, NON_NEGATIVE)),
    ):
        for tx in (gx.bfgs(), gx.newton(), gx.trust_region(), gx.coordinate_descent()):
            with pytest.raises(ValueError, match=rf"^{name}\(tx=…\): .*first-order"):
                wrap(tx).init(x)
        with pytest.raises(ValueError, match=rf"^{name}\(tx=…\): .*combine both"):
            wrap(optax.chain(gx.proximal(gx.sgd(0.1), soft))).init(x)
        with pytest.raises(TypeError, match=rf"^{name}: a parameter is complex"):
            wrap(gx.sgd(0.1)).init(x + 1j)
        with pytest.raises(TypeError, match=rf"^{name}: a parameter is complex"):
            gx.minimize(lambda z: jnp.abs(z) ** 2, 1 + 1j, wrap(gx.sgd(0.1)))
    for bad in (lambda p: p[:1], lambda p: {"w": p}):
        tx = gx.projected(gx.sgd(0.1), bad)
        with pytest.raises(ValueError, match=r"^projected\(projection=…\): .*like those"):
            tx.update(x, tx.init(x), x)
