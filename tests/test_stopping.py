"""Stop rules: when a run ends, and what it is then called."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from tests.thinning import every

START = jnp.asarray([-1.2, 1.0])


def rosenbrock(x: jax.Array) -> jax.Array:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def bowl(x: jax.Array) -> jax.Array:
    return 1 + jnp.sum((x - 1) ** 2)


def status(solution: gx.Solution) -> str:
    return gx.Status(int(solution.status)).name


def test_a_small_gradient_is_measured_as_asked() -> None:
    first = np.abs(jax.grad(rosenbrock)(START)).max()
    for rule, bound in (
        (gx.small_gradient(atol=1e-2), lambda s: 1e-2),
        (gx.small_gradient(rtol=1e-3), lambda s: 1e-3 * first),
        (gx.small_gradient(value_rtol=0.5), lambda s: 0.5 * s.value),
        (gx.small_gradient(1e-5, rtol=1e-2), lambda s: 1e-2 * first),
    ):
        solution = gx.minimize(rosenbrock, START, stop=rule, history=2)
        assert status(solution) == "converged"
        assert solution.grad_norm <= bound(solution)
        if bound(solution) > 1e-3:  # it stopped no later than it could
            assert solution.history is not None
            assert solution.history.grad_norm[0] > bound(solution)


@pytest.mark.parametrize("tx", every(2, [gx.bfgs(), gx.sgd(0.1), gx.trust_region()]))
def test_small_changes_end_a_run(tx: Any) -> None:
    loose, tight = (
        gx.minimize(bowl, jnp.zeros(2), tx, stop=gx.small_change(rtol, of="params"))
        for rtol in (1e-1, 1e-4)
    )
    assert status(loose) == status(tight) == "converged"
    assert loose.steps <= tight.steps
    np.testing.assert_allclose(tight.params, 1, rtol=1e-2)
    by_value = gx.minimize(bowl, jnp.zeros(2), tx, stop=gx.small_change(1e-3, of="value"))
    assert status(by_value) == "converged"
    assert by_value.value < 1.1


def test_a_change_is_one_between_accepted_points() -> None:
    """A trial point close to another one is no small step."""
    seen = []

    def rule(progress: gx.Progress) -> jax.Array:
        jax.debug.callback(lambda c: seen.append(float(c)), progress.params_change)
        return progress.evaluations >= 12

    gx.minimize(rosenbrock, START, stop=rule)
    points = [START]
    gx.minimize(
        rosenbrock,
        START,
        progress=lambda s: points.append(s.loop.state.accepted.params),
        progress_every=1,
        max_steps=10,
    )
    jumps = {round(float(np.abs(b - a).max()), 5) for a, b in itertools.pairwise(points)}
    assert np.isinf(seen[0])
    assert {round(c, 5) for c in seen[2:11] if np.isfinite(c)} <= jumps


def test_a_target_and_a_budget_stop_without_success() -> None:
    target = gx.minimize(rosenbrock, START, stop=gx.reached(1.0))
    assert status(target) == "stopped"
    assert target.value <= 1
    assert not target.converged
    for number in (1, 7):
        spent = gx.minimize(rosenbrock, START, stop=gx.max_evaluations(number))
        assert (status(spent), int(spent.evaluations)) == ("stopped", number)


def test_rules_combine() -> None:
    small, budget = gx.small_gradient(1e-2), gx.max_evaluations(10)
    either = gx.minimize(rosenbrock, START, stop=small | budget)
    both = gx.minimize(rosenbrock, START, stop=small & budget)
    assert (status(either), int(either.evaluations)) == ("stopped", 10)
    assert status(both) == "converged"
    assert both.evaluations > 10
    mine = lambda progress: progress.value < 1e-2
    for rule in (mine | budget, budget | mine):
        assert status(gx.minimize(rosenbrock, START, stop=rule)) == "stopped"
    own = gx.minimize(rosenbrock, START, stop=mine & small)
    assert status(own) == "converged"
    assert own.value < 1e-2


def test_numbers_of_rules_are_traced_and_have_a_verdict_in_each_lane() -> None:
    count = []

    def counted(x: jax.Array) -> jax.Array:
        count.append(None)
        return rosenbrock(x)

    bounds = [1e-1, 1e-2, 1e-3]
    alone = [
        gx.minimize(counted, START, stop=gx.small_gradient(b) | gx.max_evaluations(100))
        for b in bounds
    ]
    assert len(count) <= 2  # once more, because the counter itself is read
    lanes = jax.vmap(
        lambda b: gx.minimize(rosenbrock, START, stop=gx.small_gradient(b) | gx.reached(-1.0))
    )(jnp.asarray(bounds))
    assert lanes.converged.all()
    np.testing.assert_allclose([s.steps for s in alone], lanes.steps, atol=3)
    assert lanes.steps[0] < lanes.steps[2]


def test_a_flat_point_ends_every_run() -> None:
    solution = gx.minimize(bowl, jnp.ones(2), gx.sgd(0.1), stop=gx.reached(-5.0))
    assert (status(solution), int(solution.steps)) == ("converged", 0)


def test_the_default_rule_serves_both_precisions() -> None:
    def fit(y: jax.Array) -> jax.Array:
        start = jnp.zeros(2)
        found = gx.least_squares(lambda x, y: x - y, start, args=(y,), derivative=None)
        return found.params

    assert jax.jit(fit)(jnp.ones(2)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert gx.least_squares(lambda x: x - 1, jnp.zeros(2)).params.dtype == jnp.float64


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^minimize\(tol=0.1\): a stop rule takes the place"):
        gx.minimize(bowl, START, tol=0.1, stop=gx.reached(0.0))
    with pytest.raises(TypeError, match=r"^minimize\(stop=3\): expected a function"):
        gx.minimize(bowl, START, stop=3)  # type: ignore[arg-type]
    for bad in (lambda p: p.value, lambda p: p.params > 0, lambda p: None):
        with pytest.raises(TypeError, match=r"^minimize\(stop=.*must return one boolean"):
            gx.minimize(bowl, START, stop=bad)
    with pytest.raises(ValueError, match=r"^small_gradient\(atol=0\): all bounds are zero"):
        gx.small_gradient()
    with pytest.raises(TypeError, match="combine stop rules"):
        gx.reached(1.0) & 3  # type: ignore[operator]


def test_numbers_of_rules_and_of_args_do_not_mix() -> None:
    fn = lambda x, shift: jnp.sum((x - shift) ** 2) + 1
    for stop in (gx.small_change(1e-6), gx.small_gradient(1e-4) & gx.reached(1.5)):
        solution = gx.minimize(fn, jnp.zeros(2), args=(3.0,), stop=stop)
        np.testing.assert_allclose(solution.params, 3, rtol=1e-3)


# -- the default, and what is a success


def test_the_default_bound_follows_the_scale_of_the_problem() -> None:
    for unit in (1e-18, 1e-9, 1.0):
        solution = gx.minimize(lambda x, unit=unit: unit * jnp.sum((x - 1) ** 4), jnp.zeros(2))
        assert solution.converged
        np.testing.assert_allclose(solution.params, 1, atol=2e-2)
    at_the_minimum = gx.minimize(bowl, 1 + jnp.asarray([1e-7, 0.0]), gx.sgd(0.1))
    assert (status(at_the_minimum), int(at_the_minimum.steps)) == ("converged", 0)


@pytest.mark.parametrize("tx", every(2, [gx.bfgs(), gx.lbfgs(), gx.trust_region()]))
def test_a_float32_fit_at_its_minimum_is_a_success(tx: Any) -> None:
    t = jnp.linspace(0, 4, 40)
    y = 3 * jnp.exp(-0.7 * t) + 0.05 * jnp.sin(50 * t)
    fit = lambda p: 100 * jnp.sum((p[0] * jnp.exp(-p[1] * t) - y) ** 2)
    solution = gx.minimize(fit, jnp.asarray([1.0, 0.1]), tx, tol=1e-12)
    assert status(solution) == "at_precision"
    assert solution.converged
    assert "precision of float32" in str(solution)
    np.testing.assert_allclose(solution.params, [3, 0.7], atol=0.05)


@pytest.mark.parametrize("build", [gx.bfgs, gx.trust_region])
def test_a_failed_search_is_no_success(build: Any) -> None:
    @jax.custom_jvp
    def wrong(x: jax.Array) -> jax.Array:
        return jnp.sum((x - 1) ** 2)

    wrong.defjvp(lambda p, t: (wrong(*p), -jnp.sum(2 * (p[0] - 1) * t[0])))
    kink = lambda x: 1 + jnp.sum(jnp.abs(x - jnp.asarray([0.3, 0.7])))
    for fn in (wrong, kink):
        solution = gx.minimize(fn, jnp.zeros(2), build())
        assert status(solution) == "stalled"
        assert not solution.converged
