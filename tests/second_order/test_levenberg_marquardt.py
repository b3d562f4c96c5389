"""Levenberg–Marquardt: its step against NumPy, its three ways, and NIST's problems."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.info import reported
from gradxform.second_order.subproblems.residuals import normal_axes
from testbed import problems
from testbed.nist import PROBLEMS, correct_digits
from tests.methods import step
from tests.thinning import every

rng = np.random.default_rng(5)
NIST = {problem.name: problem for problem in PROBLEMS}


def valley(x: jax.Array) -> jax.Array:
    """Rosenbrock's function as residuals."""
    return jnp.concatenate([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def augmented(j: np.ndarray, r: np.ndarray, d: np.ndarray, shift: float) -> np.ndarray:
    """The p that minimises ‖r + J p‖² + λ‖D p‖², from the stacked problem."""
    stacked = np.vstack([j, np.sqrt(shift) * np.diag(d)])
    return np.linalg.lstsq(stacked, -np.concatenate([r, np.zeros(len(d))]), rcond=None)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(7, 4), (4, 4), (3, 5)])
@pytest.mark.parametrize("radius", [0.3, 1e6])
def test_the_step_solves_the_stacked_problem(shape: tuple[int, int], radius: float) -> None:
    """With the λ that puts it on the boundary, or with λ = 0 inside; columns of any length."""
    m, n = shape
    scales = np.asarray([1e-6, 1.0, 1e5, 30.0, 1e-2])[:n]
    j, r = rng.normal(size=shape) * scales, rng.normal(size=m)
    fn = gx.sum_of_squares(lambda x: jnp.asarray(j) @ x + jnp.asarray(r))
    tx = gx.levenberg_marquardt(initial_radius=radius)
    x = jnp.zeros(n)
    moved, _ = step(tx, x, tx.init(x), fn)
    p, d = np.asarray(moved), np.linalg.norm(j, axis=0)
    length = np.linalg.norm(d * p)
    if radius > 1e3:
        expected = np.linalg.lstsq(j / d, -r, rcond=None)[0] / d  # the shortest in ‖Dp‖
        np.testing.assert_allclose(d * p, d * expected, rtol=1e-9, atol=1e-11)
        return
    np.testing.assert_allclose(length, radius, rtol=1e-10)
    slope = j.T @ (r + j @ p) / d  # must be −λ D p
    shift = -(slope @ (d * p)) / length**2
    assert shift > 0
    np.testing.assert_allclose(d * p, d * augmented(j, r, d, shift), rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_start_at_zero_tells_no_size() -> None:
    """Powell's badly scaled function: ‖Dx‖ would be the tiny part of the other parameter."""
    problem = next(p for p in problems.PROBLEMS if p.number == 3)
    found = gx.least_squares(problem.residuals, jnp.asarray([0.0, 10.0]), derivative=None)
    assert found.converged
    assert found.value < 1e-20
    assert found.evaluations < 200


def test_no_float32_fit_creeps_along_where_rounding_hides_the_decrease() -> None:
    """Of 4,000 fits these took the most steps while only rejected steps ended none."""
    random = np.random.default_rng(0)
    a, k, c = (random.uniform(*ends, (4000, 1)) for ends in ((0.5, 3), (0.2, 3), (-0.5, 0.5)))
    t = np.linspace(0, 5, 30)
    y = a * np.exp(-k * t) + c + 0.02 * random.normal(size=(4000, 30))
    slow = y[[3369, 2690, 1091, 3943, 539, 1598, 2857, 3264]].astype(np.float32)
    residuals = lambda p, y: p[0] * jnp.exp(-p[1] * t.astype(np.float32)) + p[2] - y
    start = jnp.asarray([1.0, 1.0, 0.0], jnp.float32)

    def fit(y: jax.Array) -> gx.Solution:
        return gx.least_squares(residuals, start, args=(y,), derivative=None)

    found = jax.jit(jax.vmap(fit))(jnp.asarray(slow))
    assert found.converged.all()
    assert found.evaluations.max() <= 20


@pytest.mark.usefixtures("x64")
def test_the_condition_number_is_not_squared() -> None:
    """A Hilbert-like matrix whose JᵀJ is singular in float64."""
    n = 9
    j = 1.0 / (np.arange(n)[:, None] + np.arange(n)[None, :] + 1.0)
    truth = np.ones(n)
    residuals = lambda x: jnp.asarray(j) @ (x - truth)
    start = jnp.asarray(rng.normal(size=n))
    solution = gx.least_squares(residuals, start, max_steps=50)
    np.testing.assert_allclose(solution.params, truth, atol=1e-3)
    gram = gx.minimize(
        gx.sum_of_squares(residuals),
        start,
        gx.levenberg_marquardt(curvature=gx.gauss_newton()),
        max_steps=50,
        stop=gx.small_step(),
    )
    assert np.abs(solution.params - truth).max() < 0.1 * np.abs(gram.params - truth).max()


@pytest.mark.usefixtures("x64")
# from their far starts a trial point of these two overflows
@pytest.mark.parametrize("name", sorted({"BoxBOD", "MGH17", *every(6, NIST)}))
@pytest.mark.parametrize("which", [0, 1])
def test_nist_certifies_the_parameters(name: str, which: int) -> None:
    problem = NIST[name]
    start = jnp.asarray(problem.starts[which], float)
    solution = gx.least_squares(problem.residuals, start, derivative=None)
    assert solution.converged, gx.Status(int(solution.status)).name
    assert correct_digits(problem, solution.params) >= 6


@pytest.mark.usefixtures("x64")
def test_few_residuals_of_many_parameters_and_many_of_both() -> None:
    """The m × m system and the conjugate gradients find what the singular values find."""
    a, b = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 40), (6,)))
    residuals = lambda x: jnp.tanh(a @ x / 8) - 0.3 * jnp.tanh(b)
    start = jnp.asarray(0.1 * rng.normal(size=40))
    expected = gx.least_squares(residuals, start)
    assert expected.value < 1e-25
    few = gx.levenberg_marquardt(max_size=10)
    products = gx.levenberg_marquardt(max_size=2, tol=1e-8)
    for tx in (few, products):
        found = gx.minimize(
            gx.sum_of_squares(residuals), start, tx, stop=gx.small_step(), derivative=None
        )
        assert found.value < 1e-20
        # each step stays in the span of the gradients, so does the distance from the start
        away = found.params - start
        onto = a.T @ np.linalg.lstsq(np.asarray(a.T), np.asarray(away), rcond=None)[0]
        np.testing.assert_allclose(away, onto, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_the_first_step_of_the_three_ways_is_the_same_within_one_radius() -> None:
    """For orthonormal columns, where D = I up to a factor."""
    q, _ = np.linalg.qr(rng.normal(size=(8, 5)))
    r = jnp.asarray(rng.normal(size=8))
    fn = gx.sum_of_squares(lambda x: jnp.asarray(q) @ x + r)
    x = jnp.ones(5)
    moves = [
        step(tx, x, tx.init(x), fn)[0] - x
        for tx in (
            gx.levenberg_marquardt(initial_radius=0.1),
            gx.levenberg_marquardt(initial_radius=0.1, max_size=4),
        )
    ]
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(moves[0]), 0.1, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_another_loss_takes_its_gauss_newton_matrix() -> None:
    x, w = rng.normal(size=(60, 3)), np.asarray([1.0, -2.0, 0.5])
    y = (x @ w + rng.normal(size=60) > 0).astype(float)
    loss = lambda z, y: jnp.mean(jnp.logaddexp(0, z) - y * z)
    fn = gx.compose(loss, lambda w, x: x @ w, x=x, y=y)
    found = gx.minimize(fn, jnp.zeros(3), gx.levenberg_marquardt(), tol=1e-10)
    expected = gx.minimize(fn, jnp.zeros(3), gx.newton(), tol=1e-10)
    np.testing.assert_allclose(found.params, expected.params, atol=1e-8)
    assert found.evaluations < 12


def test_an_objective_that_tells_no_residuals_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^levenberg_marquardt needs to know .*gx\.compose"):
        gx.minimize(lambda x: jnp.sum(x**2), jnp.ones(2), gx.levenberg_marquardt())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(5, 3), (2, 3)])
def test_derivatives_of_the_singular_values_and_axes(shape: tuple[int, int]) -> None:
    """The functions of them that a step uses, against finite differences."""
    k, r = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape[0]))

    def damped(k: jax.Array, r: jax.Array) -> jax.Array:
        values, axes, slopes = normal_axes(k, r)
        return axes @ (slopes / (values + 0.1))

    direction = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape[0]))
    value, change = jax.jvp(damped, (k, r), direction)
    np.testing.assert_allclose(value, np.linalg.solve(k.T @ k + 0.1 * np.eye(3), k.T @ r))
    h = 1e-6
    ahead, behind = (damped(k + s * direction[0], r + s * direction[1]) for s in (h, -h))
    np.testing.assert_allclose(change, (ahead - behind) / (2 * h), atol=1e-8)


def test_lanes_take_the_steps_that_they_take_alone() -> None:
    starts = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    solve = lambda x: gx.least_squares(valley, x, max_steps=200)
    together = jax.vmap(solve)(starts)
    assert together.converged.all()
    for i in range(2):
        alone = solve(starts[i])
        chex.assert_trees_all_close(together.params[i], alone.params, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_what_is_reported() -> None:
    solution = gx.least_squares(valley, jnp.asarray([-1.2, 1.0]))
    state = solution.loop.state
    (relative,) = reported(state, "relative_step")
    assert 0 <= relative < 0.1
    assert int(solution.curvature_products) == 2 * int(state.info.accepted)
    # as many residuals as parameters: the full step expects to remove all of them
    np.testing.assert_allclose(state.info.expected, state.info.value, rtol=1e-9)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_residuals_that_are_not_finite_beyond_the_start(bad: float) -> None:
    """A wall at 3: the radius shrinks until the steps stay before it."""
    residuals = lambda x: jnp.where(x > 3, bad, jnp.stack([x[0] - 2, 10 * jnp.log(x[1] / 2)]))
    solution = gx.least_squares(residuals, jnp.asarray([1.0, 0.1]))
    assert solution.converged
    np.testing.assert_allclose(solution.params, 2.0, rtol=1e-4)


def test_a_plateau_on_which_squares_underflow_is_no_solution() -> None:
    """The far start of MGH10 in float32: the model and its derivatives vanish."""
    problem = NIST["MGH10"]
    start = jnp.asarray(problem.starts[0], jnp.float32)
    solution = gx.least_squares(problem.residuals, start, derivative=None)
    assert not solution.converged or correct_digits(problem, solution.params) > 2
