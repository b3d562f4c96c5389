from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.methods import objective, run, step
from tests.reference import first_order as slides
from tests.thinning import every

rng = np.random.default_rng(3)
FACTOR = rng.normal(size=(6, 6))
HESSIAN, LINEAR, START = FACTOR @ FACTOR.T + np.eye(6), rng.normal(size=6), rng.normal(size=6)


def split(x: np.ndarray) -> dict[str, Any]:
    return {"a": jnp.asarray(x[:1].reshape(())), "b": jnp.asarray(x[1:].reshape(5, 1)), "c": {}}


def joined(tree: Any) -> Any:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def quadratic(tree: Any) -> jax.Array:
    x = joined(tree)
    return 0.5 * x @ jnp.asarray(HESSIAN) @ x - jnp.asarray(LINEAR) @ x


def path(tx: optax.GradientTransformation, steps: int) -> tuple[np.ndarray, list[int], Any]:
    params = split(START)
    state, points, chosen = tx.init(params), [], []
    one_step = jax.jit(lambda p, s: step(tx, p, s, quadratic))
    for _ in range(steps):
        params, state = one_step(params, state)
        points.append(np.asarray(joined(params)))
        chosen.append(int(state.info.block))
    return np.array(points), chosen, state


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", ["cyclic", "random", "greedy"])
def test_is_exact_on_a_quadratic_pytree(order: Any) -> None:
    ours, chosen, state = path(gx.coordinate_descent(order), 40)
    lecture = np.array(slides.coordinate_descent(HESSIAN, LINEAR, START, chosen))
    np.testing.assert_allclose(ours, lecture, rtol=0, atol=1e-12)
    assert state.info.evaluations <= 2 * 40 + 5  # the point itself and one Newton step


@pytest.mark.usefixtures("x64")
def test_orders_choose_as_they_say() -> None:
    _, cyclic, _ = path(gx.coordinate_descent("cyclic"), 13)
    assert cyclic == [*range(6), *range(6), 0]
    _, drawn, _ = path(gx.coordinate_descent("random", seed=1), 60)
    assert set(drawn) == set(range(6))
    assert path(gx.coordinate_descent("random", seed=1), 60)[1] == drawn
    assert path(gx.coordinate_descent("random", seed=2), 60)[1] != drawn
    points, greedy, _ = path(gx.coordinate_descent("greedy"), 10)
    for x, chosen in zip([START, *points], greedy, strict=False):
        assert chosen == np.argmax(np.abs(HESSIAN @ x - LINEAR))


@pytest.mark.usefixtures("x64")
def test_leaf_blocks_take_the_exact_line_minimum() -> None:
    points, chosen, _ = path(gx.coordinate_descent("cyclic", "leaf"), 4)
    assert chosen == [0, 1, 0, 1]
    x = START
    for after, leaf in zip(points, chosen, strict=True):
        g = HESSIAN @ x - LINEAR
        d = -np.where(np.arange(6) >= 1, g, 0) if leaf else -np.where(np.arange(6) < 1, g, 0)
        x = x + (d @ d) / (d @ HESSIAN @ d) * d
        np.testing.assert_allclose(after, x, atol=1e-12)


SECTIONS = {
    "log cosh, far out": (lambda x: jnp.log(jnp.cosh(x)), 20.0, 0.0),
    "quartic": (lambda x: (x - 2) ** 4, 10.0, 2.0),
    "double well from its concave part": (lambda x: x**4 / 4 - x**2 / 2, 0.1, 1.0),
    "sine": (lambda x: jnp.sin(x), 1.6, 3 * np.pi / 2),
    "domain edge": (lambda x: x - jnp.log(x), 1e-3, 1.0),
    "domain edge from far": (lambda x: x - jnp.log(x), 50.0, 1.0),
    "gaussian dip from its tail": (lambda x: -jnp.exp(-(x**2) / 2), 3.0, 0.0),
    "huge curvature": (lambda x: 1e8 * (x - 1) ** 2, 5.0, 1.0),
    "tiny curvature": (lambda x: 1e-8 * (x - 1000.0) ** 2, 0.0, 1000.0),
    "kink": (lambda x: jnp.abs(x - 1) + 0.1 * (x - 1) ** 2, 4.0, 1.0),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("f", "start", "minimum"), every(2, SECTIONS.values()), ids=every(2, SECTIONS)
)
def test_sections_that_are_not_quadratic(f: Any, start: float, minimum: float) -> None:
    tx = gx.coordinate_descent(max_newton_steps=60)
    update = jax.jit(lambda x, state: step(tx, x, state, f))
    x, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    values = [f(x)]
    for _ in range(10):
        x, state = update(x, state)
        values.append(f(x))
    assert np.all(np.diff(values) <= 1e-14 * np.abs(values[0]))
    np.testing.assert_allclose(x, minimum, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("f", "start", "minimum"),
    [
        (lambda x: jnp.exp(x) - 5 * x, -80.0, np.log(5)),
        (lambda x: jnp.exp(x) - 5 * x, -30.0, np.log(5)),
        (lambda x: jnp.log(jnp.cosh(x)), 50.0, 0.0),
        *SECTIONS.values(),
    ],
    ids=["exponential, far", "exponential", "log cosh, no curvature", *SECTIONS],
)
def test_sections_in_float32_with_the_defaults(f: Any, start: float, minimum: float) -> None:
    solution = gx.minimize(f, start, gx.coordinate_descent(), tol=1e-8, max_steps=20)
    np.testing.assert_allclose(solution.params, minimum, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("block", ["coordinate", "leaf"])
@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25])
def test_the_unit_of_the_objective_changes_nothing(block: Any, factor: float) -> None:
    f = lambda x: factor * jnp.sum((x - 1) ** 2)
    tx = gx.coordinate_descent(block=block)
    solution = gx.minimize(f, jnp.asarray([-1.2, 3.0]), tx, tol=1e-3 * factor, max_steps=4)
    np.testing.assert_allclose(solution.params, 1.0, atol=1e-3)


@pytest.mark.parametrize("f", [lambda x: x, lambda x: -jnp.exp(x), lambda x: x**3])
def test_unbounded_sections_stay_finite_in_one_update(f: Any) -> None:
    tx = gx.coordinate_descent()
    x = jnp.asarray(0.5)
    after, state = step(tx, x, tx.init(x), f)
    assert jnp.isfinite(after)
    assert f(after) < f(x)
    assert state.info.evaluations <= 21


def test_a_start_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    tx = gx.coordinate_descent()
    x = jnp.asarray(-1.0)
    after, state = step(tx, x, tx.init(x), lambda x: x - jnp.log(x))
    assert after == x
    assert state.info.non_finite == 1


def test_rosenbrock_values_never_rise() -> None:
    f = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    tx = gx.coordinate_descent()
    x, state = jnp.asarray([-1.2, 1.0]), tx.init(jnp.zeros(2))
    one_step = jax.jit(lambda x, s: step(tx, x, s, f))
    values = [float(f(x))]
    for _ in range(60):
        x, state = one_step(x, state)
        values.append(float(f(x)))
    assert np.all(np.diff(values) <= 1e-6 * values[0])
    assert values[-1] < 0.2 * values[0]


def test_data_reach_value_fn_by_keyword() -> None:
    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ w - y) ** 2)

    x, y = jnp.asarray([[1.0, 0.0], [0.0, 2.0]]), jnp.asarray([3.0, 4.0])
    tx = gx.coordinate_descent()
    w, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    for _ in range(2):
        updates, state = tx.update(w, state, w, value_fn=loss, x=x, y=y, unused=None)
        w = w + updates
    np.testing.assert_allclose(w, [3.0, 2.0], rtol=1e-5)


def test_seeds_are_swept_by_vmap() -> None:
    params = {"w": jnp.arange(8.0)}

    def chosen(seed: jax.Array) -> jax.Array:
        _, state = run(gx.coordinate_descent("random", seed=seed), params, 1)
        return state.info.block

    assert len(set(np.asarray(jax.vmap(chosen)(jnp.arange(20))))) > 3


def test_missing_arguments_are_named() -> None:
    tx = gx.coordinate_descent()
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=r"coordinate_descent needs value_fn=…"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=r"coordinate_descent needs params=…"):
        tx.update(x, tx.init(x), value_fn=objective)
    with pytest.raises(ValueError, match=r"value_fn must return one real number.*shape \(2,\)"):
        tx.update(x, tx.init(x), x, value_fn=lambda x: x)
    with pytest.raises(ValueError, match=r"order='sideways'.*'cyclic', 'random', 'greedy'"):
        gx.coordinate_descent("sideways")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"block='row'.*'coordinate', 'leaf'"):
        gx.coordinate_descent(block="row")  # pyright: ignore[reportArgumentType]


def test_nothing_to_optimise() -> None:
    tx = gx.coordinate_descent()
    params = {"empty": jnp.zeros((0,))}
    updates, _ = tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.zeros(()))
    assert updates["empty"].shape == (0,)
