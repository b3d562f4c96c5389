import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx

rng = np.random.default_rng(5)
FACTOR = rng.normal(size=(6, 6))
HESSIAN = FACTOR @ FACTOR.T + np.eye(6)
POINTS = [rng.normal(size=6) for _ in range(9)]


def reference_bfgs(
    points: list[np.ndarray], memory: int | None = None, self_scaling: bool = False
) -> np.ndarray:
    """H by the textbook product form from the pairs of a quadratic (N&W eqs. 6.17, 6.20, 7.20)."""
    pairs = [(b - a, HESSIAN @ (b - a)) for a, b in itertools.pairwise(points)]
    first = pairs[0] if memory is None else pairs[-1]
    h = (first[0] @ first[1]) / (first[1] @ first[1]) * np.eye(6)
    for s, y in pairs if memory is None else pairs[-memory:]:
        rho = 1 / (s @ y)
        if self_scaling:
            h = h * max(1, s @ y / (y @ h @ y))
        left = np.eye(6) - rho * np.outer(s, y)
        h = left @ h @ left.T + rho * np.outer(s, s)
    return h


def walked(tx: Any) -> tuple[jax.Array, Any]:
    """The direction and the state after all the points."""
    state, direction = tx.init(jnp.zeros(6)), None
    for x in POINTS:
        direction, state = tx.update(jnp.asarray(HESSIAN @ x), state, jnp.asarray(x))
    return direction, state


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("self_scaling", [False, True])
def test_bfgs_is_the_textbook_update(self_scaling: bool) -> None:
    direction, state = walked(gx.scale_by_bfgs(self_scaling=self_scaling))
    h = reference_bfgs(POINTS, self_scaling=self_scaling)
    np.testing.assert_allclose(state.inverse_hessian, h, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(direction, h @ HESSIAN @ POINTS[-1], rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_secant_equation() -> None:
    _, state = walked(gx.scale_by_bfgs())
    s = POINTS[-1] - POINTS[-2]
    np.testing.assert_allclose(state.inverse_hessian @ (HESSIAN @ s), s, rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ravel", [True, False])
@pytest.mark.parametrize("memory", [1, 3, 5, 8])
def test_lbfgs_is_bfgs_of_its_last_pairs(memory: int, ravel: bool) -> None:
    direction, _ = walked(gx.scale_by_lbfgs(memory, ravel=ravel))
    expected = reference_bfgs(POINTS, memory) @ HESSIAN @ POINTS[-1]
    np.testing.assert_allclose(direction, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_lbfgs_is_optax_lbfgs() -> None:
    ours, _ = walked(gx.scale_by_lbfgs(4))
    theirs, _ = walked(optax.scale_by_lbfgs(4))
    np.testing.assert_allclose(ours, theirs, rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tx", [gx.scale_by_bfgs(), gx.scale_by_lbfgs()], ids=["bfgs", "lbfgs"])
@pytest.mark.parametrize("bad", ["negative", "nan", "zero"])
def test_a_bad_pair_is_left_out_and_counted(tx: Any, bad: str) -> None:
    state = tx.init(jnp.zeros(6))
    for x in POINTS[:3]:
        _, state = tx.update(jnp.asarray(HESSIAN @ x), state, jnp.asarray(x))
    x = POINTS[3]
    g = {"negative": -HESSIAN @ x, "nan": np.full(6, np.nan), "zero": HESSIAN @ POINTS[2]}[bad]
    x = POINTS[2] if bad == "zero" else x
    _, after = tx.update(jnp.asarray(g), state, jnp.asarray(x))
    assert int(after.info.skipped) == (bad != "zero")  # the same point again is no pair
    assert int(after.info.pairs) == int(state.info.pairs)
    # the memory is what it was, so a good gradient gets a good direction again
    good = jnp.asarray(HESSIAN @ POINTS[2])
    again, _ = tx.update(good, after, jnp.asarray(POINTS[2]))
    assert jnp.isfinite(again).all()
    assert good @ again > 0


@pytest.mark.parametrize("factor", [1e-16, 1e16])
def test_direction_does_not_depend_on_the_unit_of_the_objective(factor: float) -> None:
    def direction(tx: Any, c: float) -> jax.Array:
        state, d = tx.init(jnp.zeros(6)), None
        for x in POINTS[:5]:
            d, state = tx.update(
                jnp.asarray(c * (HESSIAN @ x), jnp.float32), state, jnp.asarray(x, jnp.float32)
            )
        return d

    for tx in (gx.scale_by_bfgs(), gx.scale_by_lbfgs()):
        np.testing.assert_allclose(direction(tx, factor), direction(tx, 1.0), rtol=2e-2)


@pytest.mark.usefixtures("x64")
def test_ends_on_a_quadratic_within_a_few_more_steps_than_its_dimension() -> None:
    f = lambda x: 0.5 * x @ jnp.asarray(HESSIAN) @ x
    for tx in (gx.bfgs(curvature=0.1), gx.lbfgs(curvature=0.1)):
        solution = gx.minimize(f, jnp.asarray(POINTS[0]), tx, tol=1e-8)
        assert solution.status == gx.Status.converged
        assert solution.evaluations <= 40


def test_self_scaling_helps_where_the_curvature_falls() -> None:
    f = lambda x: jnp.sum(x**4 + x**2 * jnp.arange(1.0, 5.0))
    counts = [
        int(gx.minimize(f, jnp.full(4, 100.0), gx.bfgs(self_scaling=on), tol=1e-3).evaluations)
        for on in (True, False)
    ]
    assert counts[0] < 0.8 * counts[1]


def test_many_leaves_compile_and_run_as_one_vector() -> None:
    params = [jnp.full(4, 0.1 * i) for i in range(60)]
    f = lambda p: sum(jnp.sum((i + 1.0) * (x - 1) ** 2) for i, x in enumerate(p))
    solution = gx.minimize(f, params, gx.lbfgs(), tol=1e-2)
    assert solution.status == gx.Status.converged
    state = gx.scale_by_lbfgs().init(params)
    assert state.s.shape == (10, 240)


@pytest.mark.usefixtures("x64")
def test_no_more_evaluations_than_scipy_on_rosenbrock() -> None:
    from scipy.optimize import minimize

    f = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    for n in (10, 100):
        start = np.tile([-1.2, 1.0], n // 2)
        ours = gx.minimize(f, jnp.asarray(start), gx.lbfgs(), tol=1e-6)
        theirs = minimize(
            jax.jit(jax.value_and_grad(f)),
            start,
            jac=True,
            method="L-BFGS-B",
            options={"gtol": 1e-6, "ftol": 0.0, "maxfun": 10_000, "maxiter": 10_000},
        )
        assert ours.status == gx.Status.converged
        assert ours.evaluations <= 1.1 * theirs.nfev


def test_memory_size_must_be_static() -> None:
    with pytest.raises(TypeError, match=r"memory_size.*static_args"):
        gx.scale_by_lbfgs(jnp.asarray(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="memory_size"):
        gx.lbfgs(0)
