"""Trust regions within bounds."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import lsq_linear

import gradxform as gx
from tests.methods import step
from tests.thinning import every

rng = np.random.default_rng(5)
Bounds = tuple[Any, Any]


def exact(bounds: Bounds | None = None) -> Any:
    return gx.trust_region("exact", bounds=bounds)


def steihaug(bounds: Bounds | None = None) -> Any:
    return gx.trust_region("steihaug", bounds=bounds, tol=0.1)


def squares(bounds: Bounds | None = None) -> Any:
    return gx.levenberg_marquardt(bounds=bounds)


MAKERS = {"exact": exact, "steihaug": steihaug, "squares": squares}
every_method = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
first_and_last = pytest.mark.parametrize("make", every(2, MAKERS.values()))
second = pytest.mark.parametrize("make", every(2, MAKERS.values(), 1))
of_hessian = pytest.mark.parametrize("make", [exact, steihaug])


def line(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ x - b


def valley(x: jax.Array) -> jax.Array:
    return jnp.concatenate([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


rosenbrock = gx.sum_of_squares(valley)
quartic = lambda x, c: jnp.sum((x - c) ** 4) + jnp.sum((x - c) ** 2) + (jnp.sum(x) - 1) ** 2


@pytest.mark.usefixtures("x64")
@every_method
def test_minimum_of_a_quadratic_in_a_box_is_scipys(make: Any) -> None:
    def solve(a: jax.Array, b: jax.Array, low: jax.Array, high: jax.Array) -> gx.Solution:
        residuals = lambda x: line(x, a, b)
        start = jnp.zeros(6) + 0.1
        bounds = low, high
        return gx.minimize(gx.sum_of_squares(residuals), start, make, bounds=bounds, tol=1e-10)

    solve = jax.jit(solve)
    for _ in range(8):
        a, b = rng.standard_normal((9, 6)), 3 * rng.standard_normal(9)
        low = np.where(rng.random(6) < 0.3, -np.inf, -rng.random(6))
        high = np.where(rng.random(6) < 0.3, np.inf, 0.5 * rng.random(6))
        expected = lsq_linear(a, b, (low, high), tol=1e-14, method="bvls").x
        solution = solve(a, b, low, high)
        np.testing.assert_allclose(solution.params, expected, atol=1e-8)
        assert solution.evaluations <= 40
        # the active bounds are met exactly
        at = (expected == low) | (expected == high)
        np.testing.assert_array_equal(np.asarray(solution.params)[at], expected[at])


@pytest.mark.usefixtures("x64")
@first_and_last
def test_with_bounds_out_of_reach_the_steps_are_those_without(make: Any) -> None:
    start = jnp.asarray([-1.2, 1.0, 0.5, -0.7])
    without = gx.minimize(rosenbrock, start, make(), history=60)
    within = gx.minimize(rosenbrock, start, make, bounds=(-1e6, None), history=60)
    assert within.evaluations == without.evaluations
    assert without.history is not None
    assert within.history is not None
    values = without.history.value
    known = np.asarray(values) > 1e-8  # rounding is larger than the last values
    np.testing.assert_allclose(within.history.value[known], values[known], rtol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3),
    st.lists(st.sampled_from([-np.inf, -2.0, -0.5, 0.1, 0.3]), min_size=3, max_size=3),
    st.lists(st.sampled_from([0.0, 0.1, 1e-6, 0.7, 3.0, np.inf]), min_size=3, max_size=3),
    st.integers(0, 2),
)
def test_a_stock_loop_never_leaves_the_box(start: Any, low: Any, width: Any, i: int) -> None:
    low = np.asarray(low, np.float32)
    high = (np.where(np.isfinite(low), low, 0) + np.asarray(width)).astype(np.float32)
    inside = np.clip(np.asarray(start, np.float32), low, high)
    path = _path_of(list(MAKERS)[i])(inside, low, high)
    assert np.isfinite(path).all()
    assert (path >= low).all()
    assert (path <= high).all()


@functools.cache
def _path_of(name: str) -> Callable[..., jax.Array]:
    def path(start: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        tx = MAKERS[name]((low, high))

        def body(carry: Any, _: None) -> Any:
            return step(tx, *carry, rosenbrock), carry[0]

        return jax.lax.scan(body, (start, tx.init(start)), length=15)[1]

    return jax.jit(path)


@every_method
def test_in_half_precision_too(make: Any) -> None:
    low, high = jnp.asarray([-0.3, 0.2], jnp.bfloat16), jnp.asarray([0.7, 0.21], jnp.bfloat16)
    tx = make((low, high))
    x = jnp.asarray([-0.2, 0.2], jnp.bfloat16)
    one_step = jax.jit(lambda x, s: step(tx, x, s, rosenbrock))
    state = tx.init(x)
    for _ in range(15):
        x, state = one_step(x, state)
        assert x.dtype == jnp.bfloat16
        assert bool(jnp.all((x >= low) & (x <= high)))
    assert rosenbrock(gx.eval_params(state, x)) < rosenbrock(jnp.asarray([-0.2, 0.2]))


@every_method
def test_a_start_outside_is_moved_inside_in_a_stock_loop(make: Any) -> None:
    tx = make((-0.5, 0.5))
    x = jnp.asarray([2.0, 0.1])
    one_step = jax.jit(lambda x, s: step(tx, x, s, rosenbrock))
    moved, state = one_step(x, tx.init(x))
    np.testing.assert_array_equal(moved, np.float32([0.5, 0.1]))
    assert state.info.accepted == 0
    _, state = one_step(moved, state)
    assert state.info.accepted == 1
    np.testing.assert_array_equal(gx.eval_params(state, x), np.float32([0.5, 0.1]))


@every_method
def test_a_bound_that_holds_the_minimum_is_reported(make: Any) -> None:
    @jax.jit
    def solve(high: jax.Array) -> gx.Solution:
        return gx.minimize(rosenbrock, jnp.zeros(2), make, bounds=(-2.0, high), tol=1e-4)

    inside, held = (solve(jnp.asarray([high, 2.0])) for high in (2.0, 0.5))
    assert gx.Status(int(inside.status)).name == "converged"
    assert gx.Status(int(held.status)).name == "at_bound"
    assert held.params[0] == 0.5
    np.testing.assert_allclose(held.params, [0.5, 0.25], rtol=1e-5)
    tx = make((-2.0, jnp.asarray([0.5, 2.0])))
    moved, state = jax.jit(lambda x: step(tx, x, tx.init(x), rosenbrock))(held.params)
    assert jax.grad(rosenbrock)(held.params)[0] < -0.1  # the bound holds x₀ against it
    assert state.info.grad_norm < 1e-3
    assert moved[0] == 0.5


@pytest.mark.usefixtures("x64")
@of_hessian
def test_derivatives_with_active_bounds_are_those_of_finite_differences(make: Any) -> None:
    def minimum(numbers: jax.Array) -> jax.Array:
        c, low, high = numbers[:3], numbers[3], numbers[4:]
        start = jnp.zeros(3) + 0.4
        return gx.minimize(
            quartic, start, make, args=(c,), bounds=(low, high), tol=1e-13, max_steps=100
        ).params

    at = jnp.asarray([0.9, -0.5, 0.6, 0.1, 0.5, 2.0, 3.0])
    minimum = jax.jit(minimum)
    x = minimum(at)
    np.testing.assert_array_equal(x[:2], [0.5, 0.1])
    assert 0.1 < x[2] < 3
    h = 1e-4
    rows = [(minimum(at + h * e) - minimum(at - h * e)) / (2 * h) for e in np.eye(7)]
    found = jax.jacobian(minimum)(at)
    np.testing.assert_allclose(found, np.stack(rows, 1), atol=1e-8)


@second
def test_a_sweep_over_bounds_is_one_program(make: Any) -> None:
    traces = []

    def counted(x: jax.Array) -> jax.Array:
        traces.append(None)
        return valley(x)

    objective = gx.sum_of_squares(counted)

    @jax.jit
    @jax.vmap
    def sweep(high: jax.Array) -> gx.Solution:
        return gx.minimize(objective, jnp.zeros(2), make, bounds=(None, high), tol=1e-4)

    solutions = sweep(jnp.asarray([0.2, 0.5, 0.8, 3.0]))
    first = len(traces)
    np.testing.assert_allclose(solutions.params[:, 0], [0.2, 0.5, 0.8, 1.0], rtol=1e-3)
    assert [gx.Status(int(s)).name for s in solutions.status][:3] == ["at_bound"] * 3
    sweep(jnp.asarray([0.3, 0.4, 0.6, 2.0]))
    assert len(traces) == first


EXACT = exact()


def second_is_fixed(y: jax.Array) -> jax.Array:
    return rosenbrock(jnp.asarray([y[0], 0.3, y[1]]))


@every_method
def test_entries_between_equal_bounds_stay(make: Any) -> None:
    @jax.jit
    def solve(low: jax.Array, high: jax.Array) -> gx.Solution:
        return gx.minimize(rosenbrock, jnp.zeros(3), make, bounds=(low, high), tol=1e-4)

    low, high = jnp.asarray([-jnp.inf, 0.3, -jnp.inf]), jnp.asarray([jnp.inf, 0.3, jnp.inf])
    solution = solve(low, high)
    assert solution.params[1] == jnp.float32(0.3)
    expected = gx.minimize(second_is_fixed, jnp.zeros(2), EXACT, tol=1e-4)
    np.testing.assert_allclose(solution.params[::2], expected.params, rtol=1e-3)
    nothing = solve(jnp.full(3, 0.3), jnp.full(3, 0.3))
    assert gx.Status(int(nothing.status)).name == "at_bound"
    assert nothing.evaluations == 1


@of_hessian
def test_a_concave_function_ends_in_a_corner(make: Any) -> None:
    h = -jnp.eye(3) + 0.2
    f = lambda x: 0.5 * x @ h @ x + 0.1 * jnp.sum(x)
    start = jnp.asarray([0.2, -0.1, 0.3])
    solution = gx.minimize(f, start, make, bounds=(-1.0, 2.0))
    assert set(np.asarray(solution.params).tolist()) <= {-1.0, 2.0}
    assert gx.Status(int(solution.status)).name == "at_bound"
    assert solution.evaluations <= 12


def test_leaves_a_saddle_on_a_face() -> None:
    ridge = lambda x: x[0] - x[1] ** 2 + x[1] ** 4 / 4
    tx = exact((jnp.asarray([0.0, -5.0]), 5.0))
    x = jnp.asarray([0.0, 0.0])  # x₀ is held, and the gradient in x₁ is zero
    state = tx.init(x)
    one_step = jax.jit(lambda x, s: step(tx, x, s, ridge))
    for _ in range(20):
        x, state = one_step(x, state)
    np.testing.assert_allclose(jnp.abs(gx.eval_params(state, x)), [0, 2**0.5], atol=1e-3)


def test_the_full_step_is_that_of_the_free_entries() -> None:
    tx = squares((jnp.asarray([1.0, -9.0]), jnp.asarray([2.0, 9.0])))
    objective = gx.sum_of_squares(lambda x: jnp.asarray([3 * x[0], x[1] - 2, x[0] * 0]))
    x = jnp.asarray([1.0, 1.0])
    _, state = step(tx, x, tx.init(x), objective)
    np.testing.assert_allclose(state.info.expected, 0.5, rtol=1e-6)  # of x₁ alone
    np.testing.assert_allclose(state.info.relative_step, 1.0, rtol=1e-6)
    _, state = step(tx, jnp.asarray([1.0, 2.0]), state, objective)
    assert state.info.expected == 0
    assert state.info.relative_step == 0


@every_method
def test_a_trial_that_is_not_finite_is_rejected(make: Any) -> None:
    walled = gx.sum_of_squares(lambda x: jnp.where(x[0] > 0.6, jnp.nan, valley(x)))
    solution = gx.minimize(walled, jnp.zeros(2), make, bounds=(-1.0, 0.9), max_steps=40)
    assert solution.value < walled(jnp.zeros(2))
    assert bool(jnp.all(jnp.isfinite(solution.params)))


def test_any_tree_of_parameters() -> None:
    params = {"a": jnp.zeros(2), "b": jnp.asarray(0.2)}
    f = lambda p: jnp.sum((p["a"] - 3) ** 2) + (p["b"] + 1) ** 2 + p["b"] * p["a"][0]
    bounds = ({"a": None, "b": 0.1}, {"a": jnp.asarray([1.0, 9.0]), "b": None})
    for make in (exact, steihaug):
        solution = gx.minimize(f, params, make, bounds=bounds)
        np.testing.assert_allclose(solution.params["a"], [1, 3], rtol=1e-5)
        assert solution.params["b"] == jnp.float32(0.1)


@every_method
def test_bad_bounds_are_named(make: Any) -> None:
    name = "levenberg_marquardt" if make is squares else "trust_region"
    with pytest.raises(ValueError, match=rf"^{name}\(bounds=.*low is above high"):
        make((1.0, 0.0))
    with pytest.raises(ValueError, match=rf"^{name}\(bounds=.*: low must have the structure"):
        make(({"a": 0.0}, 1.0)).init(jnp.zeros(2))
    with pytest.raises(TypeError, match=rf"^{name}\(bounds=.*a complex parameter has no bounds"):
        optax.with_extra_args_support(make((0.0, 1.0))).init(jnp.zeros(2, complex))
