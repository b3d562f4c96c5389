import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

rng = np.random.default_rng(11)


def symmetric(eigenvalues: Any) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return q * np.asarray(eigenvalues) @ q.T


def direction_on(matrix: Any, g: Any, **options: Any) -> tuple[jax.Array, Any]:
    """The direction and the state on a quadratic with this Hessian and, at 0, this gradient."""
    tx = gx.scale_by_newton_cg(**options)
    matrix, g = jnp.asarray(matrix), jnp.asarray(g)
    f = lambda x: 0.5 * x @ matrix @ x + g @ x
    x = jnp.zeros_like(g)
    return jax.jit(lambda g: tx.update(g, tx.init(x), x, value_fn=f))(g)


class Counter:
    """A curvature that counts its products as they are made."""

    def __init__(self) -> None:
        self.made = 0

    def add(self) -> None:
        self.made += 1

    def __call__(self, value_fn: Any, params: Any) -> Any:
        product = gx.hessian()(value_fn, params)

        def counted(v: Any) -> Any:
            jax.debug.callback(self.add)
            return product(v)

        return counted


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_solves_the_damped_system(alpha: float) -> None:
    matrix, g = symmetric(np.linspace(0.1, 10, 12)), rng.normal(size=12)
    d, state = direction_on(matrix, g, damping=alpha, tol=1e-10)
    np.testing.assert_allclose(d, np.linalg.solve(matrix + alpha * np.eye(12), g), rtol=1e-8)
    assert int(state.info.fallbacks) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-3])
def test_tol_is_the_relative_residual(tol: float) -> None:
    matrix, g = symmetric(np.geomspace(1, 100, 30)), rng.normal(size=30)
    d, state = direction_on(matrix, g, tol=tol, forcing="fixed")
    residual = np.linalg.norm(matrix @ d - g) / np.linalg.norm(g)
    assert 1e-3 * tol < residual <= tol
    assert int(state.info.curvature_products) <= 30
    few, state = direction_on(matrix, g, tol=tol, forcing="fixed", maxiter=2)
    assert int(state.info.curvature_products) == 2
    assert np.linalg.norm(matrix @ few - g) > residual * np.linalg.norm(g)


@pytest.mark.usefixtures("x64")
def test_takes_as_many_iterations_as_there_are_eigenvalues() -> None:
    for distinct in (1, 2, 5):
        matrix = symmetric(np.repeat(np.arange(1.0, 1 + distinct), 20 // distinct))
        _, state = direction_on(matrix, rng.normal(size=len(matrix)), tol=1e-8)
        assert int(state.info.curvature_products) == distinct


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("warm_start", [0.0, 0.5])
def test_counts_the_products_it_makes(inverse: bool, warm_start: float) -> None:
    """In any unit of the objective, and where the curvature is negative."""
    counter = Counter()

    @jax.jit
    def update(matrix: jax.Array, unit: jax.Array, state: Any, x: jax.Array) -> Any:
        diagonal = lambda product, g, count: (lambda v: v / unit, 0)
        tx = gx.scale_by_newton_cg(
            curvature=counter,
            tol=1e-3,
            warm_start=warm_start,
            preconditioner=diagonal if inverse else None,
        )
        return tx.update(matrix @ x, state, x, value_fn=lambda x: 0.5 * x @ matrix @ x)[1]

    start = gx.scale_by_newton_cg(warm_start=warm_start).init(jnp.zeros(25))
    for unit, least in itertools.product([1e-12, 1.0, 1e10], [0.1, -0.4]):
        matrix = jnp.asarray(unit * symmetric(np.linspace(least, 4, 25)), jnp.float32)
        x = jnp.asarray(rng.normal(size=25), jnp.float32)
        state, counter.made = start, 0
        for _ in range(2):
            state = update(matrix, jnp.float32(unit), state, x)
            jax.effects_barrier()
            assert int(state.info.curvature_products) == counter.made > 0


def test_no_ascent_and_no_nan_on_indefinite_systems() -> None:
    """Random symmetric matrices with a fifth to all of their eigenvalues negative."""
    rng = np.random.default_rng(0)  # in one of 8,000, rounding leaves no direction of descent
    n, lanes = 10, 200
    eigenvalues = rng.normal(size=(lanes, n)) * 10.0 ** rng.uniform(-3, 3, size=(lanes, n))
    eigenvalues[:, :2] = -np.abs(eigenvalues[:, :2])
    eigenvalues[:20] = -np.abs(eigenvalues[:20])
    matrices = jnp.asarray(np.stack([symmetric(e) for e in eigenvalues]), jnp.float32)
    g = jnp.asarray(rng.normal(size=(lanes, n)), jnp.float32)
    tx = gx.scale_by_newton_cg(tol=1e-3)

    @jax.jit
    @jax.vmap
    def directions(matrix: jax.Array, g: jax.Array) -> Any:
        f = lambda x: 0.5 * x @ matrix @ x + g @ x
        return tx.update(g, tx.init(g), jnp.zeros(n), value_fn=f)

    d, state = directions(matrices, g)
    assert jnp.isfinite(d).all()
    assert (jnp.sum(d * g, axis=1) > 0).all()
    assert int(state.info.fallbacks.sum()) == 0  # so each of them used the curvature


@pytest.mark.usefixtures("x64")
def test_negative_curvature_turns_the_steps_of_conjugate_gradients() -> None:
    """Along the eigenvectors of two eigenvalues, |λ| takes the place of λ."""
    matrix, g = np.diag([2.0, -4.0]), np.array([1.0, 0.0])
    np.testing.assert_allclose(direction_on(matrix, g)[0], [0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(direction_on(matrix, g[::-1].copy())[0], [0.0, 0.25], atol=1e-12)
    # by hand: γ₀ = 2, p₀ = (1, 1), p₀ᵀHp₀ = −2, r₁ = (3, −3), γ₁ = 18, p₁ = (12, 6), 144
    d, state = direction_on(matrix, np.array([1.0, 1.0]), tol=1e-8)
    np.testing.assert_allclose(d, np.array([1.0, 1.0]) + 18 / 144 * np.array([12.0, 6.0]))
    assert int(state.info.curvature_products) == 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bound", [None, 10.0])
@pytest.mark.parametrize(
    ("diagonal", "made"), [((1.0, 0.0), 2), ((1.0, 2.0, 0.0), 3), ((0.0, 0.0), 1)]
)
def test_counts_the_product_that_finds_no_curvature(
    bound: float | None, diagonal: tuple[float, ...], made: int
) -> None:
    """CG ends before a direction without curvature, and says so."""
    counter = Counter()
    g = np.ones(len(diagonal))
    d, state = direction_on(np.diag(diagonal), g, curvature=counter, tol=1e-8, bound=bound)
    jax.effects_barrier()
    assert int(state.info.curvature_products) == counter.made == made
    assert np.all(np.abs(d) < 10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_unit_of_a_preconditioner_does_not_matter(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        diagonal = np.geomspace(1, 100, 20)
        root = jnp.asarray(np.sqrt(diagonal), dtype)

        @jax.jit
        def solve(unit: jax.Array) -> tuple[jax.Array, Any]:
            inverse = lambda product, g, count: (lambda v: (unit * v / root).astype(dtype), 0)
            matrix, g = np.diag(diagonal).astype(dtype), np.ones(20, dtype)
            return direction_on(matrix, g, tol=1e-4, forcing="fixed", preconditioner=inverse)

        expected, usual = solve(jnp.asarray(1.0, dtype))
        assert usual.info.curvature_products == 14
        for unit in (1e-20, 1e-16, 1e-12, 1e20):
            d, state = solve(jnp.asarray(unit, dtype))
            np.testing.assert_allclose(d, expected, rtol=1e-4 if dtype == "float32" else 1e-12)
            assert state.info.curvature_products == 14


@pytest.mark.parametrize(("dtype", "little"), [("float32", 1e-12), ("float64", 1e-30)])
def test_very_little_curvature_is_not_zero(dtype: str, little: float) -> None:
    """Brown's badly scaled function has 1e-12 of the largest curvature along its valley."""
    with jax.enable_x64(dtype == "float64"):
        diagonal = np.asarray([1.0, little])
        d, _ = direction_on(np.diag(diagonal).astype(dtype), np.ones(2, dtype))
        np.testing.assert_allclose(d, 1 / diagonal, rtol=1e-5)


def test_a_search_solves_browns_badly_scaled_function_in_float32() -> None:
    residuals = lambda x: jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])
    brown = lambda x: jnp.sum(residuals(x) ** 2)
    tx = gx.with_line_search(gx.scale_by_newton_cg())
    solution = gx.minimize(brown, jnp.ones(2), tx, max_steps=200)
    np.testing.assert_allclose(solution.params, [1e6, 2e-6], rtol=1e-6)
    assert solution.value < 1e-6


def test_where_the_curvature_is_negative_the_direction_is_bounded() -> None:
    """A little curvature leads far, which negative curvature shows to be beyond the model."""
    matrix = np.diag([1.0, 1e-4, -1e-3]).astype(np.float32)
    g = np.ones(3, np.float32)
    longest = lambda bound: bound * (g @ g) / np.linalg.norm(matrix @ g)
    for bound in (2.0, 10.0):
        d, state = direction_on(matrix, g, tol=1e-4, bound=bound)
        assert np.linalg.norm(d) <= 1.0001 * longest(bound)
        assert int(state.info.fallbacks) == 0
    unbounded, _ = direction_on(matrix, g, tol=1e-4)
    assert np.linalg.norm(unbounded) > longest(10)
    definite = np.diag([1.0, 1e-4]).astype(np.float32)
    d, _ = direction_on(definite, g[:2], tol=1e-4, bound=2.0)
    np.testing.assert_allclose(d, [1.0, 1e4], rtol=1e-3)


def test_damping_does_not_hide_negative_curvature() -> None:
    """What is left of it is little curvature, and leads as far."""
    matrix = np.diag([1.0, 1e-4, -1e-3]).astype(np.float32)
    g = np.ones(3, np.float32)
    for damping in (1.1e-3, 1e-2):
        d, _ = direction_on(matrix, g, tol=1e-4, bound=2.0, damping=damping)
        longest = 2 * (g @ g) / np.linalg.norm(matrix @ g + damping * g)
        assert np.linalg.norm(d) <= 1.0001 * longest
    d, _ = direction_on(abs(matrix), g, tol=1e-4, bound=2.0, damping=1e-2)
    np.testing.assert_allclose(d, 1 / (np.diag(abs(matrix)) + 1e-2), rtol=1e-3)


def test_a_long_step_that_rises_is_shortened() -> None:
    """Little curvature at a point where the quartic has little, next to a steep wall."""

    def valley(x: jax.Array) -> jax.Array:
        return x[0] ** 2 + 1e-6 * x[1] ** 2 + jnp.exp(x[1] - 30)

    x, curvatures = jnp.asarray([1.0, 5.0]), jnp.asarray([2.0, 2e-6])
    tilted = lambda x: valley(x) - 1e-4 * x[1]
    for bound, evaluations in ((10.0, 2), (None, 0)):
        tx = gx.newton_cg(tol=1e-6, bound=bound)
        grads = jax.grad(tilted)(x)
        updates, state = tx.update(grads, tx.init(x), x, value_fn=tilted)
        assert gx.info.total(state, "evaluations") == evaluations
        rises = tilted(x + updates) > tilted(x)
        assert bool(rises) == (bound is None)
        longest = 10 * float(grads @ grads) / np.linalg.norm(curvatures * grads)
        assert (np.linalg.norm(updates) > longest) == (bound is None)


def test_no_update_on_a_small_net_multiplies_the_loss_by_a_hundred() -> None:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x @ params[-1] - y) ** 2)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def losses(key: jax.Array, damping: float) -> jax.Array:
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (64, 4))
        y = jnp.sin(jnp.sum(x, axis=1, keepdims=True))
        sizes = zip(keys[1:], (4, 32, 32), (32, 32, 1), strict=True)
        params = [jax.random.normal(k, (m, n)) / np.sqrt(m) for k, m, n in sizes]
        tx = gx.newton_cg(damping=damping)
        value_fn = lambda params: loss(params, x, y)

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=12)[1]

    for damping in (0.0, 1e-2):
        values = losses(jax.random.split(jax.random.key(0), 20), damping)
        assert (values[:, 1:] < 100 * values[:, :-1]).all()
        assert (values[:, -1] < 0.5 * values[:, 0]).all()


@pytest.mark.parametrize("curvature", [0.0, float("nan"), float("inf")])
def test_without_usable_curvature_the_direction_is_the_gradient(curvature: float) -> None:
    g = np.array([3.0, 0.0, -1.0], np.float32)
    d, state = direction_on(np.diag(np.full(3, curvature)), g)
    np.testing.assert_array_equal(d, g)
    assert int(state.info.fallbacks) == 1


def test_a_warm_start_from_the_solution_takes_one_product() -> None:
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(symmetric(np.linspace(1, 100, 20)), jnp.float32)
    f = lambda x: 0.5 * x @ matrix @ x
    x = jnp.asarray(rng.normal(size=20), jnp.float32)
    for warm_start, most in ((0.999, 3), (0.0, 30)):
        tx = gx.scale_by_newton_cg(tol=1e-2, forcing="fixed", warm_start=warm_start)
        d, state = tx.update(matrix @ x, tx.init(x), x, value_fn=f)
        first = int(state.info.curvature_products)
        again, state = tx.update(matrix @ x, state, x, value_fn=f)
        second = int(state.info.curvature_products) - first
        assert (second <= most) & (warm_start > 0 or second == first > 3)
        np.testing.assert_allclose(again, d, rtol=0.1, atol=0.1)


def test_eisenstat_walker() -> None:
    """η₀ = η; then 0.9 (‖g‖/‖g_old‖)², held back while 0.9 η_old² is above 0.1."""
    tx, x = gx.scale_by_newton_cg(tol=0.5), jnp.ones(2)
    state, seen = tx.init(x), []
    for size in (1.0, 0.1, 0.05, 0.5):
        g = size * jnp.asarray([0.6, 0.8])
        _, state = tx.update(g, state, x, value_fn=lambda x: jnp.sum(x**2))
        seen.append(float(state.info.tol))
    np.testing.assert_allclose(seen, [0.5, 0.225, 0.225, 0.5], rtol=1e-5)


def test_a_preconditioner_saves_products() -> None:
    matrix = np.diag(np.geomspace(1, 100, 60)) + 0.02 * symmetric(rng.normal(size=60))
    g = rng.normal(size=60).astype(np.float32)
    made = {}
    for name, inverse in (("none", None), ("diagonal", gx.hutchinson_diagonal(4))):
        d, state = direction_on(matrix.astype(np.float32), g, tol=1e-3, preconditioner=inverse)
        assert np.linalg.norm(matrix @ d - g) < 2e-3 * np.linalg.norm(g)
        made[name] = int(state.info.curvature_products)
    assert made["diagonal"] < made["none"] / 2


def test_a_preconditioner_of_another_structure_is_refused() -> None:
    params = {"w": jnp.ones(3)}
    wrong = lambda product, g, count: (lambda v: v["w"], 0)
    tx = gx.scale_by_newton_cg(preconditioner=wrong)
    with pytest.raises(ValueError, match=r"preconditioner=….*like the parameters.*returned \(3,\)"):
        tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["w"] ** 2))


def test_ends_in_a_minimum_from_the_ridge_of_a_saddle() -> None:
    ridge = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    starts = ([1.0, 1e-3], [1.0, -1e-4], [0.0, 1e-2])
    methods = (gx.newton_cg(), gx.with_line_search(gx.scale_by_newton_cg()))
    for tx, start in itertools.product(methods, starts):
        solution = gx.minimize(ridge, jnp.asarray(start), tx, tol=1e-5)
        assert solution.status == gx.Status.converged
        np.testing.assert_allclose(solution.value, -1, rtol=1e-4)


@pytest.mark.parametrize("factor", [1e-16, 1e16])
def test_the_unit_of_the_objective_does_not_matter(factor: float) -> None:
    matrix = symmetric([-1.0, 0.5, 2.0, 7.0])
    g = rng.normal(size=4)
    cast = lambda x: jnp.asarray(factor * x, jnp.float32)
    expected, _ = direction_on(jnp.asarray(matrix, jnp.float32), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(direction_on(cast(matrix), cast(g))[0], expected, rtol=1e-3)


def test_leaves_of_several_dtypes_and_without_entries() -> None:
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((2, 2)), "none": jnp.zeros((0, 3))}
    f = lambda p: jnp.sum(3 * p["a"].astype(jnp.float32) ** 2) + jnp.sum(p["b"] ** 2)
    tx = gx.newton_cg(tol=1e-5)
    updates, state = tx.update(jax.grad(f)(params), tx.init(params), params, value_fn=f)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(f(after), 0, atol=1e-6)
    assert int(state[0].info.curvature_products) == 2
    nothing = gx.newton_cg()
    assert nothing.update({}, nothing.init({}), {}, value_fn=lambda p: jnp.zeros(()))[0] == {}


def test_missing_arguments_and_bad_choices_are_named() -> None:
    tx, x = gx.newton_cg(), jnp.ones(2)
    with pytest.raises(ValueError, match="newton_cg needs value_fn="):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=r"forcing='exact'\).*'eisenstat_walker', 'fixed'"):
        gx.newton_cg(forcing="exact")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"tol=1\.0\).*below 1"):
        gx.newton_cg(tol=1.0)


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    tx = gx.scale_by_newton_cg(warm_start=0.5)
    f = lambda x: jnp.sum(jnp.cosh(x * jnp.asarray([1.0, 2.0])))
    x = jnp.asarray([1.0, -0.5])
    _, before = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
    updates, after = tx.update(jnp.asarray([jnp.nan, 1.0]), before, x, value_fn=f)
    np.testing.assert_array_equal(updates, 0)
    assert float(before.grad_norm) > 0
    assert np.all(np.asarray(before.direction) != 0)
    for kept in ("grad_norm", "direction"):
        np.testing.assert_array_equal(getattr(after, kept), getattr(before, kept))
    assert after.info.tol == before.info.tol
    assert (int(before.info.skipped), int(after.info.skipped)) == (0, 1)
