import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from testbed.problems import PROBLEMS, starts
from tests.methods import run, step
from tests.thinning import every


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(rosenbrock))


@jax.jit
def along(t: Any, x: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Value and slope of rosenbrock at the step t from x in the direction d."""
    return jax.value_and_grad(lambda t: rosenbrock(x + t * d))(t)


def follow(tx: Any, f: Any, start: Any, steps: int) -> list[tuple[Any, Any]]:
    """(trial point, state) after each update of a stock loop."""
    one_step = jax.jit(lambda x, s: step(tx, x, s, f))
    x, state, seen = start, tx.init(start), []
    for _ in range(steps):
        x, state = one_step(x, state)
        seen.append((x, state))
    return seen


@pytest.mark.usefixtures("x64")
def test_accepted_points_satisfy_the_strong_wolfe_conditions() -> None:
    tx = gx.bfgs(decrease=0.1, curvature=0.7)
    seen = follow(tx, rosenbrock, jnp.asarray([-1.2, 1.0, -0.5, 2.0]), 60)
    checked = 0
    for (_, before), (_, after) in itertools.pairwise(seen):
        if (
            after.info.accepted == before.info.accepted
            or rosenbrock(before.accepted.params) < 1e-12
        ):
            continue
        x, d, t = before.accepted.params, before.direction, after.info.step_length
        value, slope = along(0.0, x, d)
        end_value, end_slope = along(t, x, d)
        np.testing.assert_allclose(after.accepted.params, x + t * d, rtol=1e-9, atol=1e-12)
        assert slope < 0
        assert end_value <= value + 0.1 * t * slope + 1e-6 * abs(value)
        assert abs(end_slope) <= 0.7 * abs(slope) + 1e-9
        checked += 1
    assert checked > 20


@pytest.mark.usefixtures("x64")
def test_values_of_accepted_points_never_rise() -> None:
    for tx in (gx.bfgs(), gx.lbfgs(5), gx.nonlinear_cg("hager_zhang")):
        seen = follow(tx, rosenbrock, jnp.asarray([-1.2, 1.0]), 150)
        values = [float(VALUE_AND_GRAD(gx.eval_params(state, x))[0]) for x, state in seen]
        assert np.all(np.diff(values) <= 1e-12)
        assert values[-1] < 1e-8


@functools.cache
def searching(**search: Any) -> tuple[Any, Any]:
    tx = gx.with_line_search(optax.identity(), **search)
    return tx.init, jax.jit(lambda g, state, x, value: tx.update(g, state, x, value=value))


class Replay:
    """Feeds recorded (value, slope) pairs to a search along one axis, whatever the trial point."""

    def __init__(self, **search: Any) -> None:
        init, self.update = searching(**search)
        self.x = jnp.asarray(1.0)
        self.state = init(self.x)
        self.trials: list[float] = []

    def __call__(self, value: float, slope: float) -> None:
        # the direction is -1 after the first call, so the gradient is minus the slope
        direction = float(self.state.direction) or -1.0
        gradient = jnp.asarray(slope / direction)
        updates, self.state = self.update(gradient, self.state, self.x, jnp.asarray(value))
        self.x = self.x + updates
        self.trials.append(float(self.state.section.t))
        assert np.isfinite(self.x)


@pytest.mark.parametrize("bad", [(np.nan, -1.0), (np.inf, np.nan), (-np.inf, -1.0), (0.5, np.nan)])
def test_a_trial_that_is_not_finite_is_stepped_back_from(bad: tuple[float, float]) -> None:
    replay = Replay()
    replay(1.0, -1.0)
    for _ in range(3):
        replay(*bad)
    first, *later = replay.trials
    assert np.all(np.diff([first, *later]) < 0)
    assert int(replay.state.info.non_finite) == 3
    replay(0.99, -0.1)  # the fault is over
    assert int(replay.state.info.accepted) == 2


def test_an_ever_falling_function_is_followed_outwards() -> None:
    replay = Replay()
    replay(1.0, -1.0)
    for k in range(4):
        replay(0.5 - k, -1.0)
    assert np.all(np.diff(replay.trials) > 0)


def test_a_search_that_fails_resets_once_and_then_reports_a_stall() -> None:
    replay = Replay(max_trials=5)
    replay(1.0, -1.0)
    for _ in range(5):
        replay(2.0, 1.0)
    assert int(replay.state.info.resets) == 1
    assert not replay.state.info.stalled
    for _ in range(5):
        replay(2.0, 1.0)
    assert bool(replay.state.info.stalled)
    assert float(replay.x) == 1.0


def test_a_failed_search_goes_to_the_best_point_it_saw() -> None:
    replay = Replay(max_trials=4, curvature=0.2)
    replay(1.0, -1.0)
    replay(0.5, -0.9)  # better, but too steep to be accepted
    best = replay.trials[0]
    for _ in range(3):
        replay(3.0, 5.0)
    assert replay.trials[-1] == pytest.approx(best)
    replay(0.5, -0.9)
    assert int(replay.state.info.accepted) == 2


def test_a_bracket_that_no_longer_moves_the_parameters_ends_the_search() -> None:
    replay = Replay()
    replay(1e-12, -1.0)
    while not int(replay.state.info.resets):
        replay(1.5, 1.0)
    assert len(replay.trials) < 12  # float32 numbers near 1 begin to move at a step of 1e-7


@pytest.mark.parametrize("build", [gx.bfgs, gx.lbfgs, gx.nonlinear_cg])
def test_rounding_is_reported_as_a_stall_after_a_few_evaluations(build: Any) -> None:
    f = lambda x: 1e4 + jnp.sum(jnp.asarray([1.0, 3.0, 9.0]) * (x - jnp.pi) ** 2)
    solution = gx.minimize(f, jnp.ones(3), build(), tol=1e-12)
    assert solution.status in (gx.Status.converged, gx.Status.stalled)
    assert solution.evaluations < 60
    np.testing.assert_allclose(solution.params, np.pi, atol=1e-2)


def test_a_walk_that_comes_no_further_begins_anew_and_then_stalls() -> None:
    meyer = next(p for p in PROBLEMS if p.number == 10)  # float32 sees nothing but noise there
    start = next(x for factor, x in starts(meyer) if factor == 10)
    solution = gx.minimize(meyer, jnp.asarray(start, jnp.float32), gx.bfgs(), max_steps=1000)
    assert solution.status == gx.Status.stalled
    assert solution.evaluations < 200


def test_an_ascent_direction_is_replaced_by_the_gradient() -> None:
    tx = gx.with_line_search(optax.scale(-1.0))
    seen = follow(tx, lambda x: jnp.sum(x**2), jnp.ones(2), 20)
    x, state = seen[-1]
    assert jnp.max(jnp.abs(gx.eval_params(state, x))) < 1e-2
    assert int(state.info.resets) > 0


@pytest.mark.parametrize("build", every(2, [gx.bfgs, gx.lbfgs, gx.nonlinear_cg]))
def test_the_unit_of_the_objective_changes_nothing(build: Any) -> None:
    start = jnp.asarray([-1.2, 1.0])
    fn = lambda x, c: c * rosenbrock(x)
    solve = lambda c: gx.minimize(fn, start, build(), args=(c,), tol=c * 1e-2)
    plain = solve(1.0)
    for scale in (1e-16, 1e16):
        scaled = solve(scale)
        assert scaled.status == gx.Status.converged, scale
        np.testing.assert_allclose(scaled.params, plain.params, atol=2e-2)
        assert abs(int(scaled.evaluations) - int(plain.evaluations)) <= 0.35 * plain.evaluations


@pytest.mark.parametrize("build", every(2, [gx.bfgs, gx.lbfgs, gx.nonlinear_cg], 1))
def test_the_unit_of_the_parameters_changes_nothing(build: Any) -> None:
    def solve(d: float) -> gx.Solution:
        start = d * jnp.asarray([-1.2, 1.0])
        return gx.minimize(fn, start, build(), args=(d,), tol=1e-2 / d)

    fn = lambda x, d: rosenbrock(x / d)

    plain = solve(1.0)
    for unit in (1e-16, 1e16):
        scaled = solve(unit)
        assert scaled.status == gx.Status.converged, unit
        np.testing.assert_allclose(scaled.params / unit, plain.params, atol=3e-2)
        assert abs(int(scaled.evaluations) - int(plain.evaluations)) <= 0.35 * plain.evaluations


EDGES = {
    "log": (lambda x: x - jnp.log(x), 40.0, 1.0),
    "log near its edge": (lambda x: x - jnp.log(x), 1e-4, 1.0),
    "two edges": (lambda x: -jnp.log(x) - jnp.log(1 - x), 0.999, 0.5),
    "exponential": (lambda x: jnp.exp(x) - 2 * x, 30.0, np.log(2)),
    "cliff to NaN": (lambda x: jnp.where(x < 0, jnp.nan, (x - 1) ** 2), 30.0, 1.0),
    "huge gradient": (lambda x: 1e20 * (x - 3) ** 2, -500.0, 3.0),
}


@pytest.mark.parametrize(
    ("name", "build"),
    [
        (name, build)
        for i, name in enumerate(EDGES)
        for build in every(3, [gx.bfgs, gx.lbfgs, gx.nonlinear_cg], i % 3)
    ],
)
def test_edges_cliffs_and_overflow(name: str, build: Any) -> None:
    f, start, minimum = EDGES[name]
    solution = gx.minimize(f, start, build(), tol=1e-3, max_steps=500)
    assert solution.status in (gx.Status.converged, gx.Status.stalled)
    np.testing.assert_allclose(solution.params, minimum, rtol=2e-3)


def test_unbounded_below_is_reported_and_never_nan() -> None:
    solution = gx.minimize(lambda x: -jnp.sum(x), jnp.zeros(2), gx.lbfgs(), max_steps=200)
    assert solution.status != gx.Status.converged
    assert jnp.isfinite(solution.value)
    assert solution.value < -1e3


def test_optax_searches_compose_with_our_directions() -> None:
    f = lambda p: rosenbrock(p)
    start = jnp.asarray([-1.2, 1.0])
    directions = (gx.scale_by_bfgs(), gx.scale_by_lbfgs(), gx.scale_by_nonlinear_cg())
    searches = (
        optax.scale_by_zoom_linesearch(max_linesearch_steps=20),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=20),
    )
    for i, direction in enumerate(directions):
        for search in every(2, searches, i % 2):
            tx = optax.chain(direction, optax.scale(-1.0), search)
            solution = gx.minimize(f, start, tx, tol=1e-2, max_steps=2000)
            assert solution.value < 0.1


def test_first_order_directions_take_a_search_too() -> None:
    tx = gx.with_line_search(gx.scale_by_adam(), unit_step=False)
    solution = gx.minimize(rosenbrock, jnp.asarray([-1.2, 1.0]), tx, tol=1e-2, max_steps=3000)
    assert solution.value < 0.1


def test_composes_in_a_chain_with_clipping_of_the_direction() -> None:
    tx = gx.with_line_search(optax.chain(gx.scale_by_lbfgs(), optax.clip_by_global_norm(1.0)))
    x, state = jax.jit(lambda x: run_on(tx, rosenbrock, x))(jnp.asarray([-1.2, 1.0]))
    assert rosenbrock(gx.eval_params(state, x)) < 1e-3


def run_on(tx: Any, f: Any, x: jax.Array) -> tuple[Any, Any]:
    def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        return step(tx, *carry, f), None

    carry, _ = jax.lax.scan(body, (x, tx.init(x)), length=100)
    return carry


def test_missing_arguments_are_named() -> None:
    tx, x = gx.bfgs(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"bfgs needs value=…"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=r"bfgs needs params=…"):
        tx.update(x, tx.init(x), value=1.0)
    with pytest.raises(ValueError, match=r"value must return one real number.*shape \(2,\)"):
        tx.update(x, tx.init(x), x, value=x)


def test_works_inside_optax_wrappers_on_a_subtree() -> None:
    params = {"on": jnp.asarray([-1.2, 1.0]), "off": jnp.asarray(3.0)}
    tx = optax.partition(
        {"search": gx.lbfgs(), "none": optax.set_to_zero()}, {"on": "search", "off": "none"}
    )
    f = lambda p: rosenbrock(p["on"]) + p["off"] ** 2
    end, state = jax.jit(lambda p: run_on(tx, f, p))(params)
    assert rosenbrock(gx.eval_params(state, end)["on"]) < 1e-4
    assert end["off"] == 3.0
    assert run(optax.masked(gx.sgd(0.1), True), params["on"], 2)[0].shape == (2,)


@pytest.mark.parametrize(
    ("build", "most"),
    [
        (gx.nonlinear_cg, 10),
        (lambda: gx.nonlinear_cg("hager_zhang"), 10),
        (gx.bfgs, 1e4),
        (gx.lbfgs, 1e4),
    ],
)
def test_no_search_begins_far_beyond_the_last_step(build: Any, most: float) -> None:
    """Also at the minimum, where the slope is rounding alone and nothing else bounds the trial."""
    fn = lambda x, unit: jnp.sum(jnp.asarray([0.55, 0.3]) * (x / unit) ** 2)
    tx = build()

    @jax.jit
    def turn(x: jax.Array, state: Any, unit: jax.Array) -> Any:
        value, grads = jax.value_and_grad(fn)(x, unit)
        before = gx.eval_params(state, x)
        updates, state = tx.update(grads, state, x, value=value)
        after, x = gx.eval_params(state, x), x + updates
        return x, state, jnp.max(jnp.abs(after - before)), jnp.max(jnp.abs(x - after))

    for unit in (1e-8, 1.0, 1e8):
        x = unit * jnp.asarray([2.0, 0.0])
        state, last = tx.init(x), 0.0
        for _ in range(25):
            x, state, moved, ahead = turn(x, state, jnp.float32(unit))
            last = float(moved) if moved > 0 else last
            if last > 0 and state.section.trials == 0:
                assert float(ahead) <= 1.001 * most * last


@pytest.mark.parametrize("build", [gx.bfgs, gx.lbfgs, gx.nonlinear_cg])
def test_value_and_gradient_of_the_accepted_point_are_reported(build: Any) -> None:
    for x, state in follow(build(), rosenbrock, jnp.asarray([-1.2, 1.0]), 12):
        value, grad = VALUE_AND_GRAD(gx.eval_params(state, x))
        np.testing.assert_allclose(state.info.value, value, rtol=1e-4)
        np.testing.assert_allclose(state.info.grad_norm, jnp.max(jnp.abs(grad)), rtol=1e-2)


def test_a_trial_lost_to_nan_does_not_hold_the_search_for_long() -> None:
    """Nothing is known beyond such a point, so a good descent before it is accepted."""
    fn = lambda x: (x - 5.0) ** 2
    tx = gx.with_line_search(optax.identity(), unit_step=False, curvature=0.1)
    x = jnp.asarray(0.5)
    state = tx.init(x)
    accepted = []
    for k in range(12):
        value, grad = jax.value_and_grad(fn)(x)
        updates, state = tx.update(grad, state, x, value=jnp.nan if k == 1 else value)
        x = optax.apply_updates(x, updates)
        accepted.append(int(state.info.accepted))
    assert accepted[0] == accepted[1] == 1
    assert accepted[9] > 1
