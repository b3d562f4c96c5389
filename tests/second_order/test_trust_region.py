import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform.second_order.subproblems import exact as module
from tests.methods import step

rng = np.random.default_rng(11)
SOLVERS = ("exact", "steihaug")
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def ridge(x: jax.Array) -> jax.Array:
    """Its saddle is at 0, its minima, of value −1, at (0, ±√2)."""
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4


def follow(tx: Any, f: Any, start: Any, steps: int) -> list[tuple[Any, Any]]:
    """(trial point, state) after each update of a stock loop."""
    one_step = jax.jit(lambda x, s: step(tx, x, s, f))
    x, state, seen = start, tx.init(start), []
    for _ in range(steps):
        x, state = one_step(x, state)
        seen.append((x, state))
    return seen


def first_step(tx: Any, f: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    moved, state = step(tx, x, tx.init(x), f)
    return moved - x, state


# -- the subproblem


def quadratic(h: Any, g: Any) -> Any:
    return lambda x: x @ g + 0.5 * x @ h @ x


@functools.partial(jax.jit, static_argnums=(0, 5))
def quadratic_step(
    solver: Any, h: Any, g: Any, radius: Any, unit: Any = 1.0, scaling: Any = "none"
) -> Any:
    """The first step from 0, with the objective and the parameters in other units."""
    c, d = jnp.broadcast_arrays(*unit) if isinstance(unit, tuple) else (unit, unit)
    f = lambda x: c * quadratic(h, g)(x / d)
    tx = gx.trust_region(solver, scaling=scaling, initial_radius=radius * d, tol=1e-8)
    return first_step(tx, f, jnp.zeros_like(g))


def symmetric(eigenvalues: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with these eigenvalues, ascending, and its axes."""
    axes, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))
    return (axes * np.asarray(eigenvalues)) @ axes.T, axes


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("radius", [1e-6, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("scaling", ["none", "curvature"])
@pytest.mark.parametrize(
    "case", ["definite", "indefinite", "singular", "hard", "nearly hard", "saddle"]
)
def test_exact_step_satisfies_the_conditions_of_optimality(
    case: str, scaling: str, radius: float
) -> None:
    """N&W Theorem 4.1 for q = Dp: (K + λI)q = −b, K + λI ⪰ 0, λ ≥ 0 and λ(Δ − ‖q‖) = 0."""
    spectra = {"definite": [0.5, 2.0, 2.0, 40.0], "singular": [0.0, 0.0, 1.0, 3.0]}
    eigenvalues = spectra.get(case, [-2.0, -1.0, 0.3, 5.0])
    k, axes = symmetric(eigenvalues)
    if scaling == "curvature":
        k *= [[0.01], [1], [7], [30]] * np.asarray([0.01, 1, 7, 30])
    columns = np.linalg.norm(k, axis=0)
    d = np.sqrt(columns / max(columns)) if scaling == "curvature" else np.ones(4)
    k_scaled = k / d[:, None] / d
    eigenvalues, axes = np.linalg.eigh(k_scaled)
    along = rng.normal(size=4)
    along *= {"hard": [0, 1, 1, 1], "nearly hard": [1e-11, 1, 1, 1], "saddle": [0] * 4}.get(case, 1)
    b = axes @ along

    p, state = quadratic_step("exact", k, d * b, radius, 1.0, scaling)
    q = d * np.asarray(p)
    length, size = float(np.linalg.norm(q)), max(1.0, eigenvalues[-1])
    lam = max(0.0, -(q @ (k_scaled @ q + b)) / (q @ q))
    assert length <= radius * (1 + 1e-9)
    np.testing.assert_allclose(k_scaled @ q + lam * q, -b, atol=1e-7 * max(1.0, length * size))
    assert lam >= -eigenvalues[0] - 1e-7 * size
    assert lam * (radius - length) <= 1e-7 * size * max(1.0, radius)
    np.testing.assert_allclose(state.predicted, -(b @ q + 0.5 * q @ k_scaled @ q), rtol=1e-6)
    np.testing.assert_allclose(state.length, length, rtol=1e-9)


@every_solver
def test_step_in_float32_and_in_any_unit(solver: Any) -> None:
    h, axes = symmetric([-2.0, -1.0, 0.3, 5.0])
    h, g = h.astype("f4"), (axes @ np.asarray([0.1, 1.0, -1.0, 0.5])).astype("f4")
    reference, _ = quadratic_step(solver, h, g, 1.0, (1.0, 1.0))
    np.testing.assert_allclose(jnp.linalg.norm(reference), 1.0, rtol=1e-5)
    for c, d in [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e10), (1.0, 1e-10), (1e-16, 1e-8)]:
        p, _ = quadratic_step(solver, h, g, 1.0, (c, d))
        np.testing.assert_allclose(p / d, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_steihaug_within_the_radius_is_newtons_step_and_beyond_it_on_the_boundary() -> None:
    h, _ = symmetric([0.5, 2.0, 3.0, 40.0])
    g = rng.normal(size=4)
    newton = -np.linalg.solve(h, g)
    p, state = quadratic_step("steihaug", h, g, 100.0)
    np.testing.assert_allclose(p, newton, rtol=1e-6)
    assert state.info.curvature_products == 4
    for radius in (1e-3, 0.4 * np.linalg.norm(newton)):
        p, state = quadratic_step("steihaug", h, g, radius)
        np.testing.assert_allclose(jnp.linalg.norm(p), radius, rtol=1e-9)
        np.testing.assert_allclose(state.predicted, -(g @ p + 0.5 * p @ h @ p), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_steihaug_goes_to_the_boundary_along_negative_curvature() -> None:
    h, axes = symmetric([-2.0, 0.3, 1.0, 5.0])
    g = axes @ np.ones(4)
    p, state = quadratic_step("steihaug", h, g, 3.0)
    np.testing.assert_allclose(jnp.linalg.norm(p), 3.0, rtol=1e-9)
    assert state.info.negative_curvature == 1
    best, _ = quadratic_step("exact", h, g, 3.0)
    assert quadratic(h, g)(best) * (1 + 1e-9) <= quadratic(h, g)(p) < 0


@every_solver
def test_first_radius_follows_the_units_of_objective_and_parameters(solver: Any) -> None:
    units = jnp.asarray([(1.0, 1.0), (1e-20, 1.0), (1e20, 1.0), (1.0, 1e6), (1.0, 1e-6)])

    @jax.jit
    @jax.vmap
    def radius(unit: jax.Array) -> jax.Array:
        c, d = unit
        x = jnp.asarray([-1.2, 1.0]) * d
        _, state = first_step(gx.trust_region(solver), lambda x: c * rosenbrock(x / d), x)
        return state.radius / d

    radii = radius(units)
    np.testing.assert_allclose(radii, radii[0], rtol=1e-3)


# -- the radius and the ratio, by a replay of values


@functools.partial(jax.jit, static_argnums=0)
def replayed(solver: Any, radius: Any, gradient: Any, state: Any, x: Any, value: Any) -> Any:
    tx = gx.trust_region(solver, initial_radius=radius)
    updates, state = tx.update(gradient, state, x, value=value, value_fn=lambda x: 0.5 * x**2)
    return x + updates, state


class Replay:
    """Feeds values and gradients of one parameter to the method, with H = 1 throughout."""

    def __init__(self, solver: Any, initial_radius: float) -> None:
        self.x = jnp.asarray(1.0)
        self.state = gx.trust_region(solver).init(self.x)
        self.solver, self.radius = solver, initial_radius

    def __call__(self, value: float, gradient: float) -> Any:
        self.x, self.state = replayed(
            self.solver, self.radius, jnp.asarray(gradient), self.state, self.x, jnp.asarray(value)
        )
        assert jnp.isfinite(self.x)
        return self.state


@every_solver
def test_good_steps_widen_the_radius_and_poor_ones_narrow_it(solver: Any) -> None:
    replay = Replay(solver, initial_radius=0.125)
    state = replay(10.0, 4.0)
    predicted = 4 * 0.125 - 0.5 * 0.125**2
    np.testing.assert_allclose(state.predicted, predicted, rtol=1e-6)
    state = replay(10.0 - predicted, 4.0)
    assert float(state.radius) == 0.25
    state = replay(float(state.value) - 0.6 * float(state.predicted), 4.0)
    assert float(state.radius) == 0.25
    np.testing.assert_allclose(state.info.ratio, 0.6, rtol=1e-4)
    state = replay(float(state.value) - 0.1 * float(state.predicted), 4.0)
    assert int(state.info.accepted) == 4
    assert 0.025 <= float(state.radius) <= 0.125
    state = replay(float(state.value) + 1.0, 4.0)
    assert int(state.info.rejected) == 1
    assert float(state.radius) < 0.125


@every_solver
@pytest.mark.parametrize("bad", [(np.nan, 1.0), (np.inf, np.nan), (-np.inf, 1.0), (0.5, np.nan)])
def test_a_trial_that_is_not_finite_shrinks_the_radius(solver: Any, bad: Any) -> None:
    replay = Replay(solver, initial_radius=0.5)
    first = replay(10.0, 4.0)
    state = [replay(*bad) for _ in range(3)][-1]
    np.testing.assert_allclose(state.radius, 0.5e-3, rtol=1e-5)
    assert int(state.info.non_finite) == 3
    assert float(state.params) == float(first.params)
    np.testing.assert_allclose(replay.x, state.params - 0.5e-3, rtol=1e-6)
    state = replay(10.0 - float(state.predicted), 4.0)  # the fault is over
    assert int(state.info.accepted) == 2


@every_solver
def test_where_rounding_hides_the_value_the_gradients_decide(solver: Any) -> None:
    replay = Replay(solver, initial_radius=1e-4)
    replay(1e6, 1e-2)
    state = replay(1e6, 0.9e-2)  # downhill at both ends
    assert int(state.info.accepted) == 2
    np.testing.assert_allclose(state.info.ratio, 0.95, rtol=2e-2)
    state = replay(1e6, -5e-2)  # a minimum was passed
    assert int(state.info.rejected) == 1


@every_solver
def test_a_first_value_that_is_not_finite_is_waited_for(solver: Any) -> None:
    replay = Replay(solver, 0.5)
    state = replay(np.nan, np.nan)
    assert float(replay.x) == 1.0
    assert not state.info.stalled
    state = replay(10.0, 4.0)
    assert int(state.info.accepted) == 1
    assert float(replay.x) != 1.0


@every_solver
def test_stalls_when_the_radius_no_longer_moves_the_parameters(solver: Any) -> None:
    replay = Replay(solver, 0.5)
    replay(1.0, 1.0)
    stalled = [bool(replay(2.0, 1.0).info.stalled)]
    while not stalled[-1] and len(stalled) < 40:
        stalled.append(bool(replay(2.0, 1.0).info.stalled))
    assert 3 < len(stalled) < 40
    assert float(replay.x) == 1.0
    replay(1.0, 1.0)  # of an objective that has changed meanwhile, it begins again
    assert float(replay.x) == 0.5


# -- whole solves


@pytest.mark.usefixtures("x64")
@every_solver
def test_accepted_values_never_rise_and_eval_params_is_the_accepted_point(solver: Any) -> None:
    start = jnp.asarray([-1.2, 1.0, -1.2, 1.0])
    seen = follow(gx.trust_region(solver), rosenbrock, start, 60)
    values = [float(rosenbrock(gx.eval_params(state, x))) for x, state in seen]
    assert np.all(np.diff(values) <= 1e-12)
    assert jnp.max(jnp.abs(jax.grad(rosenbrock)(seen[-1][1].params))) < 1e-6
    assert int(seen[-1][1].info.rejected) > 0  # and so eval_params was not the trial point


def test_a_rejected_trial_costs_no_hessian() -> None:
    seen = follow(gx.trust_region(), rosenbrock, jnp.asarray([-1.2, 1.0]), 25)
    info = seen[-1][1].info
    assert info.rejected > 0
    assert info.curvature_products == 2 * info.accepted


@every_solver
def test_one_newton_step_solves_a_convex_quadratic(solver: Any) -> None:
    h, _ = symmetric([0.5, 2.0, 3.0, 40.0])
    f = quadratic(h.astype("f4"), np.ones(4, "f4"))
    tx = gx.trust_region(solver, initial_radius=100.0, tol=1e-6)
    solution = gx.minimize(f, jnp.zeros(4), tx, tol=1e-4)
    assert solution.status == gx.Status.converged
    assert solution.evaluations == 2


def test_leaves_an_exact_saddle_in_a_stock_loop() -> None:
    seen = follow(gx.trust_region(), ridge, jnp.zeros(2), 40)
    x, state = seen[-1]
    np.testing.assert_allclose(ridge(gx.eval_params(state, x)), -1.0, atol=1e-5)
    assert int(seen[0][1].info.negative_curvature) == 1
    assert not seen[0][1].info.stalled


@pytest.mark.parametrize("start", [(1.0, 0.0), (100.0, 0.0), (1e-3, 0.0)])
def test_from_the_ridge_it_ends_in_a_minimum(start: tuple[float, float]) -> None:
    solution = gx.minimize(ridge, jnp.asarray(start), gx.trust_region(), tol=1e-4)
    assert solution.status == gx.Status.converged
    np.testing.assert_allclose(solution.value, -1.0, atol=1e-5)


@every_solver
def test_the_units_of_objective_and_parameters_change_nothing(solver: Any) -> None:
    units = jnp.asarray([(1.0, 1.0), (1e-16, 1.0), (1e16, 1.0), (1.0, 1e-8), (1.0, 1e8)])

    @jax.jit
    @jax.vmap
    def solve(unit: jax.Array) -> Any:
        c, d = unit
        start = jnp.asarray([-1.2, 1.0]) * d
        f = lambda x: c * rosenbrock(x / d)
        solution = gx.minimize(f, start, gx.trust_region(solver), tol=c / d * 1e-2)
        return solution.status, solution.params / d, solution.evaluations

    status, params, evaluations = solve(units)
    assert np.all(status == gx.Status.converged)
    np.testing.assert_allclose(params, np.ones((5, 2)), atol=3e-2)
    assert np.ptp(evaluations) <= 3


@pytest.mark.usefixtures("x64")
def test_scaled_by_the_curvature_the_unit_of_each_parameter_does_not_turn_the_step() -> None:
    """Of a separable objective; within a ball it does."""
    units = jnp.asarray([1e-5, 1.0, 1e3])
    f = lambda x: jnp.sum(jnp.cosh(x) + x**4 / 4 - jnp.sin(3 * x))
    start = jnp.asarray([3.0, -2.0, 1.5])

    def steps(scaling: Any) -> list[jax.Array]:
        tx = gx.trust_region(scaling=scaling)
        pairs = ((first_step(tx, lambda x, u=u: f(x / u), start * u)[0], u) for u in (1.0, units))
        return [p / u for p, u in pairs]

    one, other = steps("curvature")
    np.testing.assert_allclose(other, one, rtol=1e-9)
    one, other = steps("none")
    assert jnp.max(jnp.abs(other - one)) > 0.05


def test_a_parameter_without_curvature_or_gradient_stays() -> None:
    f = lambda x: rosenbrock(x[:2])
    solution = gx.minimize(f, jnp.asarray([-1.2, 1.0, 7.0]), gx.trust_region(), tol=1e-4)
    assert solution.status == gx.Status.converged
    np.testing.assert_allclose(solution.params, [1, 1, 7], atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_negative_curvature_within_rounding_counts_as_none() -> None:
    """Taken for curvature, its large promise would be broken and the radius vanish."""
    h, axes = symmetric([-5e-16, 0.5, 1.0, 1.0])
    g = axes @ np.asarray([1e-3, 1.0, 1.0, 1.0])
    _, state = quadratic_step("exact", h, g, 1e13)
    assert state.info.negative_curvature == 0
    assert float(state.predicted) < 1.1e-3 * 1e13  # the gradient's part; curvature's is 2.5e10
    h, axes = symmetric([-2e-13, 0.5, 1.0, 1.0])
    _, state = quadratic_step("exact", h, axes @ np.asarray([0.0, 1.0, 1.0, 1.0]), 1e9)
    assert state.info.negative_curvature == 1


EDGES = {
    "log": (lambda x: x - jnp.log(x), 40.0, 1.0),
    "log near its edge": (lambda x: x - jnp.log(x), 1e-4, 1.0),
    "two edges": (lambda x: -jnp.log(x) - jnp.log(1 - x), 0.999, 0.5),
    "exponential": (lambda x: jnp.exp(x) - 2 * x, 30.0, np.log(2)),
    "cliff to NaN": (lambda x: jnp.where(x < 0, jnp.nan, (x - 1) ** 2), 30.0, 1.0),
    "huge gradient": (lambda x: 1e20 * (x - 3) ** 2, -500.0, 3.0),
    "nearly overflowing": (lambda x: 1e35 * (x - 3) ** 2, 30.0, 3.0),
}


@every_solver
def test_edges_cliffs_and_overflow(solver: Any) -> None:
    functions, starts, minima = zip(*EDGES.values(), strict=True)

    @jax.jit
    def solve_all(starts: jax.Array) -> Any:
        def solve(case: Any) -> Any:
            i, start = case
            f = lambda x: jax.lax.switch(i, functions, x)
            solution = gx.minimize(f, start, gx.trust_region(solver), tol=1e-3, max_steps=300)
            return solution.params, solution.status

        return jax.lax.map(solve, (jnp.arange(len(starts)), starts))

    params, status = solve_all(jnp.asarray(starts))
    np.testing.assert_allclose(params, minima, rtol=2e-3)
    assert np.isin(status, [gx.Status.converged, gx.Status.stalled]).all()


def test_near_a_minimum_of_large_value_float32_goes_on_by_the_gradient() -> None:
    """Rounding of the value alone would leave x uncertain to a part in a thousand."""
    f = lambda x: 1e4 + rosenbrock(x)
    solution = gx.minimize(f, jnp.asarray([-1.2, 1.0]), gx.trust_region(), tol=1e-4)
    assert solution.status == gx.Status.converged
    np.testing.assert_allclose(solution.params, 1.0, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_gauss_newton_within_a_radius_is_levenberg_marquardt() -> None:
    model = lambda x: jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    value_fn = gx.compose(lambda y: jnp.sum(y**2), model)
    for solver in SOLVERS:
        tx = gx.trust_region(solver, curvature=gx.gauss_newton(), tol=1e-8)
        x, state = follow(tx, value_fn, jnp.asarray([-1.2, 1.0]), 60)[-1]
        assert value_fn(gx.eval_params(state, x)) < 1e-15
        assert int(state.info.negative_curvature) == 0


def test_traced_once_with_data_and_a_bound() -> None:
    traces = []

    def value_fn(x: jax.Array, target: jax.Array) -> jax.Array:
        traces.append(None)
        return jnp.sum((x - target) ** 2)

    tx = gx.trust_region(max_radius=0.5)
    x = jnp.zeros(2)
    state = tx.init(x)
    target = jnp.asarray([3.0, 4.0])

    @jax.jit
    def one(x: jax.Array, state: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(value_fn)(x, target)
        updates, state = tx.update(grads, state, x, value=value, value_fn=value_fn, target=target)
        return optax.apply_updates(x, updates), state

    points = [x]
    for _ in range(20):
        x, state = one(x, state)
        points.append(x)
    lengths = [float(jnp.linalg.norm(b - a)) for a, b in itertools.pairwise(points)]
    assert max(lengths) <= 0.5 * (1 + 1e-5)
    np.testing.assert_allclose(x, target, rtol=1e-5)
    assert len(traces) <= 2


@pytest.mark.parametrize(("size", "solver"), [(4, "exact"), (5, "steihaug")])
def test_by_default_up_to_max_size_is_solved_exactly(size: int, solver: Any) -> None:
    start = jnp.linspace(-1.2, 1.0, size)
    ends = [
        follow(gx.trust_region(**options, max_size=4), rosenbrock, start, 8)[-1]
        for options in ({}, {"solver": solver})
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_default_takes_any_number_of_parameters() -> None:
    start = jnp.linspace(0, 1, 2001)
    f = lambda x: jnp.sum((x - 1) ** 2 + 0.1 * (x - 1) ** 4)
    assert gx.minimize(f, start, gx.trust_region(), tol=1e-4).status == gx.Status.converged


@pytest.mark.usefixtures("x64")
@every_solver
def test_info_tells_value_and_gradient_of_the_accepted_point(solver: Any) -> None:
    seen = follow(gx.trust_region(solver), rosenbrock, jnp.asarray([-1.2, 1.0, -1.2, 1.0]), 60)
    assert int(seen[-1][1].info.rejected) > 0
    for x, state in seen:
        value, grads = jax.value_and_grad(rosenbrock)(gx.eval_params(state, x))
        np.testing.assert_allclose(state.info.value, value, rtol=1e-9, atol=1e-20)
        np.testing.assert_allclose(
            state.info.grad_norm, jnp.max(jnp.abs(grads)), rtol=1e-9, atol=1e-9
        )


def test_bad_arguments_are_named() -> None:
    x = jnp.ones(2)
    tx = gx.trust_region()
    arguments = {"value": 1.0, "value_fn": rosenbrock}
    for name in arguments:
        rest = {k: v for k, v in arguments.items() if k != name}
        with pytest.raises(ValueError, match=rf"trust_region needs {name}=…"):
            tx.update(x, tx.init(x), x, **rest)
    with pytest.raises(ValueError, match=r"trust_region needs params=…"):
        tx.update(x, tx.init(x), **arguments)
    with pytest.raises(ValueError, match=r"solver='exct'.*'exact', 'steihaug'"):
        gx.trust_region("exct")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"scaling='diagonal'.*'curvature', 'none'"):
        gx.trust_region(scaling="diagonal")  # pyright: ignore[reportArgumentType]
    for name in ("initial_radius", "max_radius"):
        with pytest.raises(ValueError, match=rf"\({name}=0\)"):
            gx.trust_region(**cast(Any, {name: 0}))
    with pytest.raises(ValueError, match=r"decrease=0\.3\)"):
        gx.trust_region(decrease=0.3)
    with pytest.raises(TypeError, match=r"curvature=3\): expected a curvature"):
        gx.trust_region(curvature=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"max_size=10\): there are 11 parameters.*steihaug"):
        gx.trust_region("exact", max_size=10).init(jnp.zeros(11))
    gx.trust_region("steihaug", max_size=10).init(jnp.zeros(11))


def test_secular_solution_reaches_rounding_in_its_fixed_steps() -> None:
    """Over spectra and gradients of widely spread sizes, in float32."""

    def norm(key: jax.Array) -> jax.Array:
        sizes, signs, spread = jax.random.split(key, 3)
        b = 10 ** jax.random.uniform(sizes, (8,), minval=-8, maxval=3)
        b = b * jnp.sign(jax.random.normal(signs, (8,)))
        above = jnp.sort(10 ** jax.random.uniform(spread, (8,), minval=-6, maxval=2))
        u, _ = module._secular_solution(b, above - above[0], jnp.zeros(()))
        return jnp.linalg.norm(u)

    norms = jax.vmap(norm)(jax.random.split(jax.random.key(0), 1000))
    assert float(jnp.max(norms)) < 1 + 1e-4
    assert float(jnp.min(norms)) > 1 - 1e-4
