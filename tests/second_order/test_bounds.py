"""L-BFGS-B: minima within bounds, the step of the paper, and what a search may not leave."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import gradxform as gx
from gradxform.bounds import Box
from gradxform.second_order.bounded_lbfgs import Model, bounded_step
from testbed import boxes
from tests.methods import step
from tests.thinning import every

rng = np.random.default_rng(7)
CASES, ROWS, COUNT = 24, 10, 6
FACTORS = rng.normal(size=(CASES, ROWS, COUNT)) * np.logspace(0, 1.5, COUNT)
TARGETS = rng.normal(size=(CASES, ROWS))
LOWS = np.where(rng.random((CASES, COUNT)) < 0.3, -np.inf, -rng.random((CASES, COUNT)) / 5)
HIGHS = np.where(rng.random((CASES, COUNT)) < 0.3, np.inf, rng.random((CASES, COUNT)) / 5)


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def distance(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((a @ x - b) ** 2)


@pytest.mark.usefixtures("x64")
def test_the_minima_of_box_quadratics_in_one_program_of_many_boxes() -> None:
    @jax.jit
    @jax.vmap
    def solve(a: jax.Array, b: jax.Array, low: jax.Array, high: jax.Array) -> Any:
        found = gx.minimize(distance, jnp.ones(COUNT), args=(a, b), bounds=(low, high), tol=1e-10)
        return found, found.active_bounds

    solution, active = solve(*map(jnp.asarray, (FACTORS, TARGETS, LOWS, HIGHS)))
    assert bool(solution.converged.all())
    for i in range(CASES):
        x = np.asarray(solution.params[i])
        reference = scipy.optimize.lsq_linear(
            *(FACTORS[i], TARGETS[i], (LOWS[i], HIGHS[i])), tol=1e-14, method="bvls"
        )
        np.testing.assert_allclose(x, reference.x, atol=1e-9)
        np.testing.assert_array_equal(active[i], reference.active_mask)
        np.testing.assert_array_equal(x[active[i] < 0], LOWS[i][active[i] < 0])
        np.testing.assert_array_equal(x[active[i] > 0], HIGHS[i][active[i] > 0])
        at_bound = solution.status[i] == gx.Status.at_bound
        assert bool(at_bound) == bool(np.any(active[i] != 0))
    assert 0.2 < np.mean(np.asarray(active) != 0) < 0.8


# -- the step, against the paper's algorithm on dense matrices


def dense_hessian(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """B after the pairs, the oldest first, by the product form."""
    b = (y[-1] @ y[-1]) / (s[-1] @ y[-1]) * np.eye(s.shape[1])
    for u, v in zip(s, y, strict=True):
        b = b - np.outer(b @ u, b @ u) / (u @ b @ u) + np.outer(v, v) / (u @ v)
    return b


def reference_steps(
    b: np.ndarray, low: np.ndarray, high: np.ndarray, x: np.ndarray, g: np.ndarray
) -> list[np.ndarray]:
    """The step from each minimum along the path of the projected gradient, the first one first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.where(g > 0, (x - low) / g, np.where(g < 0, (x - high) / g, np.inf))
    path = lambda t: np.where(ends <= t, np.where(g > 0, low, high), x - t * g) - x
    breaks, steps, falls = [0.0, *np.sort(ends[np.isfinite(ends)]), np.inf], [], True
    for start, end in itertools.pairwise(breaks):
        if start == end:
            continue
        d = np.where(ends > start, -g, 0)
        slope, curvature = g @ d + d @ b @ path(start), d @ b @ d
        length = -slope / curvature if d.any() else 0.0
        if falls and slope >= 0:
            steps.append(step_from(b, low, high, x, g, path(start), ends > start))
        elif slope < 0 and start + length < end:
            t = start + length
            steps.append(step_from(b, low, high, x, g, path(t), ends > t))
        falls = slope + curvature * (end - start) < 0 if d.any() else False
    return steps


def step_from(
    b: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    x: np.ndarray,
    g: np.ndarray,
    z: np.ndarray,
    free: np.ndarray,
) -> np.ndarray:
    """The minimum in the free variables, and its projection, from the Cauchy point x + z."""
    cauchy, p = x + z, z.copy()
    rest = b[np.ix_(free, ~free)] @ z[~free]
    p[free] = np.linalg.solve(b[np.ix_(free, free)], -(g[free] + rest))
    projected = np.clip(x + p, low, high) - x
    if g @ projected < 0:
        return projected
    room = np.where(p[free] > z[free], (high - cauchy)[free], (low - cauchy)[free])
    return z + min(1.0, np.min(room / (p - z)[free])) * (p - z)


@pytest.mark.usefixtures("x64")
def test_the_step_is_that_of_the_paper() -> None:
    n, m = 12, 4
    ends, firsts = [], []

    @jax.jit
    def found(s: Any, y: Any, gamma: Any, oldest: Any, *rest: Any) -> jax.Array:
        pairs = jnp.concatenate([s, y])
        model = Model(s, y, pairs @ pairs.T, gamma, (jnp.arange(m) - oldest) % m)
        low, high, x, g = rest
        return bounded_step(model, Box(low, high), x, g)

    for case in range(60):
        q = np.random.default_rng(case)
        root = q.normal(size=(n, n)) * np.logspace(0, 1, n)
        hessian = root @ root.T / n + np.eye(n)
        width = 10.0 ** q.uniform(-2, 1)
        low, high = -width * q.random(n), width * q.random(n)
        x = np.where(q.random(n) < 0.2, low, np.where(q.random(n) < 0.2, high, 0.0))
        low[q.random(n) < 0.1], high[q.random(n) < 0.1] = -1e300, 1e300
        g = hessian @ q.normal(size=n)
        count = q.integers(1, m + 1)  # the other slots are empty
        s = np.concatenate([q.normal(size=(count, n)), np.zeros((m - count, n))])
        y = s @ hessian
        shift = q.integers(m) if count == m else 0
        gamma = (s[count - 1] @ y[count - 1]) / (y[count - 1] @ y[count - 1])
        oldest = shift if count == m else count
        slots = np.roll(s, shift, 0), np.roll(y, shift, 0)
        actual = found(*slots, gamma, oldest, low, high, x, g)
        b = dense_hessian(s[:count], y[:count])
        expected = reference_steps(b, low, high, x, g)
        errors = [float(np.max(np.abs(actual - e))) / width for e in expected]
        assert min(errors) < 1e-8, case
        firsts.append(errors[0] < 1e-8)
        ends.append(np.mean((x + actual <= low) | (x + actual >= high)))
    assert np.mean(firsts) > 0.9
    assert min(ends) == 0
    assert max(ends) > 0.7


def test_without_a_bound_in_reach_the_step_is_that_of_lbfgs() -> None:
    x = jnp.asarray([0.4, -0.3, 0.8])
    wide, plain = gx.lbfgs(bounds=(-1e6, None)), gx.lbfgs()
    paths = []
    for tx in (wide, plain):
        at, state = x, tx.init(x)
        one_step = jax.jit(functools.partial(step, tx, value_fn=rosenbrock))
        for _ in range(12):
            at, state = one_step(at, state)
        paths.append(at)
    np.testing.assert_allclose(*paths, rtol=1e-3)


# -- searches


def visited(tx: Any, f: Callable[..., Any], x: Any, steps: int) -> Any:
    """The points of a training loop after each update."""

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        carry = step(tx, *carry, value_fn=f)
        return carry, carry[0]

    return jax.jit(lambda x: jax.lax.scan(body, (x, tx.init(x)), length=steps))(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_training_loop_never_leaves_the_bounds_and_lands_on_them(dtype: Any) -> None:
    low = {"a": jnp.asarray([-0.7, 0.1, -2.0], dtype), "b": jnp.asarray(-0.3, dtype)}
    high = {"a": jnp.asarray([0.6, 0.1, 0.9], dtype), "b": None}
    start = {"a": jnp.asarray([-5.0, 0.1, 0.4], dtype), "b": jnp.asarray(7.0, dtype)}

    def f(p: Any) -> jax.Array:
        return rosenbrock(jnp.append(p["a"], p["b"]).astype(jnp.float32))

    tx = gx.lbfgs(bounds=(low, high), ravel=False)
    (x, state), path = visited(tx, f, start, 60)
    for name in ("a", "b"):
        assert bool(jnp.all(path[name] >= low[name]))
    assert bool(jnp.all(path["a"] <= high["a"]))
    first = jnp.asarray([-0.7, 0.1, 0.4])  # the update itself is rounded
    assert float(jnp.max(jnp.abs(path["a"][0] - first))) <= 8 * float(jnp.finfo(dtype).eps)
    end = gx.eval_params(state, x)
    assert float(end["a"][1]) == float(low["a"][1])
    best = scipy.optimize.minimize(
        lambda z: float(rosenbrock(jnp.asarray(z))),
        np.zeros(4),
        bounds=[(-0.7, 0.6), (0.1, 0.1), (-2, 0.9), (-0.3, None)],
    )
    assert f(end) < best.fun * (1.001 if dtype == jnp.float32 else 1.05)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("box", every(15, boxes.GAY), ids=lambda box: f"{box.problem.number}")
def test_published_boxes(box: boxes.Box) -> None:
    bounds = box.lower, box.upper
    outside = []

    def f(x: jax.Array) -> jax.Array:
        is_outside = jnp.any((x < box.lower) | (x > box.upper))
        jax.debug.callback(lambda out: outside.append(bool(out)), is_outside)
        return box.problem(x)

    _, start = next(boxes.starts(box))
    solution = gx.minimize(f, jnp.asarray(start), bounds=bounds, tol=1e-8)
    jax.effects_barrier()
    assert boxes.judge(box, solution.params)[1] == "global"
    assert len(outside) >= int(solution.evaluations)
    assert not any(outside)


def test_a_falling_function_is_followed_to_the_corner_at_once() -> None:
    solution = gx.minimize(lambda x: -jnp.sum(x), jnp.zeros(3), bounds=(None, jnp.arange(1.0, 4.0)))
    np.testing.assert_array_equal(solution.params, [1, 2, 3])
    assert solution.status == gx.Status.at_bound
    assert solution.evaluations < 8


def test_a_trial_without_a_value_is_stepped_back_from() -> None:
    f = lambda x: -jnp.log(x[0]) + 20 * x[0] + (x[1] - 3) ** 2
    solution = gx.minimize(f, jnp.asarray([5.0, 0.0]), bounds=(-1.0, 2.0))
    assert solution.status == gx.Status.at_bound
    np.testing.assert_allclose(solution.params, [0.05, 2.0], rtol=1e-4)


def test_parameters_that_cannot_move() -> None:
    f = lambda x: jnp.sum((x - jnp.asarray([1.0, 2.0, 3.0])) ** 2)
    held = gx.minimize(f, jnp.zeros(3), bounds=(-1.0, 0.0))
    assert (int(held.steps), int(held.evaluations)) == (0, 1)
    assert held.status == gx.Status.at_bound
    tx = gx.lbfgs(bounds=(-1.0, 0.0))
    updates, _ = step(tx, jnp.zeros(3), tx.init(jnp.zeros(3)), f)
    np.testing.assert_array_equal(updates, jnp.zeros(3))
    sides = (jnp.asarray([-9.0, 0.5, -9.0]), jnp.asarray([9.0, 0.5, 9.0]))
    fixed = gx.minimize(f, jnp.zeros(3), bounds=sides)
    np.testing.assert_allclose(fixed.params, [1.0, 0.5, 3.0], rtol=1e-5)
    np.testing.assert_array_equal(fixed.active_bounds, [0, -1, 0])


# -- derivatives


@pytest.mark.usefixtures("x64")
def test_the_derivative_of_a_solution_with_active_bounds() -> None:
    target = jnp.asarray([0.8, -1.4, 0.3])

    def f(x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cosh(x - target)) + 0.3 * jnp.prod(1 + x) + 0.1 * x[0] * x[2]

    def solve(numbers: jax.Array) -> jax.Array:
        bounds = (numbers[3], jnp.append(numbers[4:], 5.0))
        found = gx.minimize(f, jnp.zeros(3), args=(numbers[:3],), bounds=bounds, tol=1e-13)
        return jnp.append(found.params, found.value)

    at = jnp.concatenate([target, jnp.asarray([-0.7, 0.2, 4.0])])
    active = gx.minimize(f, jnp.zeros(3), args=(target,), bounds=(at[3], 0.2)).active_bounds
    assert sorted(np.asarray(active)) == [-1, 0, 1]
    solve = jax.jit(solve)
    forward = jax.jit(jax.jacfwd(solve))(at)
    h = 1e-3
    for i, e in enumerate(np.eye(6)):
        near, far = (solve(at + k * h * e) - solve(at - k * h * e) for k in (1, 2))
        np.testing.assert_allclose(forward[:, i], (8 * near - far) / (12 * h), atol=1e-8)
    reverse = jax.jit(jax.jacrev(solve))(at)
    np.testing.assert_allclose(reverse, forward, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_an_objective_with_arrays_of_its_own_keeps_its_bounds_under_a_transformation() -> None:
    def residuals(x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.append(x - target, x[0] * x[1])

    def own(target: jax.Array) -> jax.Array:
        fit = jax.tree_util.Partial(residuals, target=target)
        return gx.least_squares(fit, jnp.zeros(2), bounds=(-1.0, 0.5)).params

    def given(target: jax.Array) -> jax.Array:
        args = (target,)
        return gx.least_squares(residuals, jnp.zeros(2), args=args, bounds=(-1.0, 0.5)).params

    target = jnp.asarray([2.0, -0.4])
    found, slopes = jax.jit(lambda y: (own(y), jax.jacfwd(own)(y)))(target)
    np.testing.assert_allclose(found, [0.5, -0.32], rtol=1e-7)
    np.testing.assert_allclose(slopes, [[0, 0], [0, 0.8]], atol=1e-7)
    np.testing.assert_allclose(jax.jacfwd(given)(target), slopes, atol=1e-12)


# -- errors


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.0, 0.0), r"low is above high; exchange them"),
        ((0.0, np.nan), r"high is NaN; use -inf or inf"),
        ((0.0,), r"expected \(low, high\), got 1 entries"),
        (("a", 0.0), r"low must be a real number or array, or None"),
    ],
)
def test_bad_bounds_are_refused_in_one_line(bounds: Any, message: str) -> None:
    for name, call in (
        ("lbfgs", lambda: gx.lbfgs(bounds=bounds)),
        ("minimize", lambda: gx.minimize(jnp.sum, jnp.zeros(2), bounds=bounds)),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\(bounds=.*{message}") as error:
            call()
        assert "\n" not in str(error.value)


def test_bounds_that_do_not_fit_the_parameters() -> None:
    for bounds, message in (
        ((jnp.zeros(3), None), r"low has shape \(3,\) where params has shape \(2,\)"),
        (({"a": 0.0}, 1.0), r"low must have the structure of the parameters"),
    ):
        with pytest.raises(ValueError, match=rf"^lbfgs\(bounds=.*{message}"):
            gx.lbfgs(bounds=bounds).init(jnp.zeros(2))
    with pytest.raises(TypeError, match=r"^lbfgs\(bounds=.*a complex parameter has no bounds"):
        gx.lbfgs(bounds=(0.0, 1.0)).init(jnp.asarray([1j]))


def test_masks_and_missing_leaves() -> None:
    params = {"on": jnp.asarray([3.0, -3.0]), "off": jnp.ones(2), "none": None}
    f = lambda p: jnp.sum((p["on"] - 2) ** 2) + jnp.sum(p["off"] ** 2)
    methods = {"search": gx.lbfgs(bounds=(None, 1.0)), "stay": optax.set_to_zero()}
    tx = gx.partition(methods, {"on": "search", "off": "stay", "none": "stay"})
    solution = gx.minimize(f, params, tx)
    assert solution.status == gx.Status.at_bound
    np.testing.assert_array_equal(solution.params["on"], jnp.ones(2))
