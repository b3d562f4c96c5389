import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx

rng = np.random.default_rng(5)
X, Y = rng.normal(size=(24, 3)), rng.normal(size=(24, 2))


def net(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def squares(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


def fit(dtype: Any = jnp.float32, **options: Any) -> Any:
    """The objective of a small net."""
    return gx.compose(squares, net, x=jnp.asarray(X, dtype), y=jnp.asarray(Y, dtype), **options)


def weights(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    a = np.random.default_rng(1).normal(size=(3, 5))
    return {"a": jnp.asarray(a, dtype), "b": jnp.asarray(a.T[:, :2], dtype)}


def follow(tx: Any, value_fn: Any, params: Any, steps: int) -> list[tuple[Any, Any, float]]:
    """Parameters, state and value before each update, and after the last."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, new = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), new

    path, state = [], tx.init(params)
    for _ in range(steps + 1):
        path.append((params, state, float(value_fn(params))))
        params, state = step(params, state)
    return path


def martens(
    f: Any, gradient: Any, matrix: Any, x: np.ndarray, *, damping: float, maxiter: int, steps: int
) -> list[tuple[np.ndarray, float, int]]:
    """The paper's recipe with a dense matrix, in NumPy: points, dampings and values taken."""
    lam, start, path = damping, np.zeros_like(x), []
    for _ in range(steps):
        g, b = gradient(x), matrix(x) + lam * np.eye(len(x))
        q = lambda p, g=g, b=b: g @ p + 0.5 * p @ b @ p
        p = 0.95 * start if q(0.95 * start) < 0 else 0 * x
        r = b @ p + g
        d, qs, kept, i = -r, [q(p)], {}, 0
        while i < maxiter:
            alpha = (r @ r) / (d @ b @ d)
            p, previous = p + alpha * d, r @ r
            r = r + alpha * b @ d
            d = (r @ r) / previous * d - r
            i += 1
            qs.append(q(p))
            if i in {math.ceil(1.3**j) for j in range(40)}:
                kept[i] = p
            k = max(10, i // 10)
            if i > k and qs[i] < 0 and (qs[i] - qs[i - k]) / qs[i] < k * 5e-4:
                break
        start, best, best_f = p, p, f(x + p)
        values = 1
        for j in sorted(kept, reverse=True)[:5]:
            if j == i:
                continue
            values += 1
            if f(x + kept[j]) >= best_f:
                break
            best, best_f = kept[j], f(x + kept[j])
        alpha = 1.0
        rho = (best_f - f(x)) / q(best)
        while f(x + alpha * best) > f(x) + 0.01 * alpha * (g @ best):
            alpha, values = 0.8 * alpha, values + 1
        x = x + alpha * best
        lam *= 1.5 if rho < 0.25 else 1 / 1.5 if rho > 0.75 else 1
        path.append((x, lam, values))
    return path


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("damping", "maxiter"), [(1.0, 7), (1e-4, 12)])
def test_is_the_recipe(damping: float, maxiter: int) -> None:
    """The second case is one that steps back to earlier iterates and shortens steps."""
    params, value_fn = weights(jnp.float64), fit(jnp.float64)
    x, unravel = ravel_pytree(params)
    outputs = lambda x: net(unravel(x), jnp.asarray(X)).ravel()
    jacobian = jax.jit(jax.jacobian(outputs))
    expected = martens(
        lambda x: float(value_fn(unravel(jnp.asarray(x)))),
        lambda x: np.asarray(ravel_pytree(jax.grad(value_fn)(unravel(jnp.asarray(x))))[0]),
        lambda x: 2 / 24 * np.asarray(jacobian(x)).T @ np.asarray(jacobian(x)),
        np.asarray(x),
        damping=damping,
        maxiter=maxiter,
        steps=8,
    )
    path = follow(gx.hessian_free(damping=damping, maxiter=maxiter), value_fn, params, 8)
    taken = 0
    for (ours, state, _), (theirs, lam, values) in zip(path[1:], expected, strict=True):
        np.testing.assert_allclose(ravel_pytree(ours)[0], theirs, rtol=1e-9)
        np.testing.assert_allclose(state.damping, lam, rtol=1e-12)
        taken += values
        assert int(state.info.evaluations) == taken


@pytest.mark.usefixtures("x64")
def test_the_first_damping_is_the_curvature_along_the_gradient() -> None:
    scales = jnp.asarray([1.0, 4.0, 9.0])
    value_fn = gx.compose(lambda y: 0.5 * jnp.sum(scales * y**2), lambda x: x)
    x = jnp.asarray([1.0, 1.0, 1.0])
    tx = gx.hessian_free(progress=0.0)
    value, g = jax.value_and_grad(value_fn)(x)
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    updates, state = update(g, tx.init(x), x, value=value)
    along = g @ (scales * g) / (g @ g)
    np.testing.assert_allclose(updates, -g / (scales + along), rtol=1e-10)
    assert float(state.info.ratio) > 0.75  # the model is damped, the objective is not
    np.testing.assert_allclose(state.damping, along / 1.5)
    assert int(state.info.curvature_products) == 1 + 3
    assert int(state.info.iterations) == 3


def test_the_value_never_rises() -> None:
    for size in (1.0, 3.0):
        params = jax.tree.map(lambda p, size=size: size * p, weights())
        path = follow(gx.hessian_free(damping=1e-6), fit(), params, 30)
        values = [value for *_, value in path]
        assert all(b <= a * (1 + 2e-6) for a, b in itertools.pairwise(values))
        assert values[-1] < 0.7 * values[0]


def test_info_tells_value_and_gradient_of_the_point_of_the_update() -> None:
    value_fn = fit()
    path = follow(gx.hessian_free(damping=1e-6), value_fn, weights(), 4)
    for (params, *_), (_, state, _) in itertools.pairwise(path):
        value, grads = jax.value_and_grad(value_fn)(params)
        largest = jnp.max(jnp.abs(ravel_pytree(grads)[0]))
        np.testing.assert_allclose(state.info.value, value, rtol=1e-5)
        np.testing.assert_allclose(state.info.grad_norm, largest, rtol=1e-4)


def test_has_stalled_where_rounding_hides_what_a_step_gains() -> None:
    """And not before: neither at the start nor while the value falls."""
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    value_fn = gx.compose(squares, lambda w, x: jnp.sinh(x @ w), x=x, y=y)
    start, tx = jnp.ones((3, 2)), gx.hessian_free()
    solution = gx.minimize(value_fn, start, tx, tol=1e-12)
    assert solution.status == gx.Status.at_precision
    assert solution.evaluations < 300
    assert solution.grad_norm < 1e-3
    path = follow(tx, value_fn, start, 30)
    falls = [b < a for (*_, a), (*_, b) in itertools.pairwise(path)]
    assert not any(state.info.stalled for _, state, _ in path[: falls.index(False) + 1])


def test_a_sub_batch_is_drawn_anew_and_counted_as_a_part() -> None:
    tx = gx.hessian_free(curvature_batch_size=6, damping=1.0)
    params, value_fn = weights(), fit()
    path = follow(tx, value_fn, params, 3)
    info = path[-1][1].info
    work = info.curvature_products / 4 + info.evaluations / 3
    np.testing.assert_allclose(info.gradient_equivalents, work, rtol=1e-6)
    assert path[-1][2] < path[0][2]

    # other examples with another seed, and in another update; all of them are the whole
    value, grads = jax.value_and_grad(value_fn)(params)

    @functools.partial(jax.jit, static_argnums=0)
    def moved(size: int, seed: int, count: int) -> jax.Array:
        tx = gx.hessian_free(curvature_batch_size=size, damping=1.0, seed=jnp.asarray(seed))
        state = tx.init(params)._replace(count=jnp.asarray(count))
        updates, _ = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return ravel_pytree(updates)[0]

    part = moved(6, 0, 0)
    for other in (moved(6, 1, 0), moved(6, 0, 1)):
        assert jnp.abs(other - part).max() > 1e-3
    np.testing.assert_allclose(moved(24, 0, 0), moved(24, 1, 1), atol=1e-5)


def test_data_by_keyword_and_in_chunks() -> None:
    params, whole = weights(), fit()
    value, grads = jax.value_and_grad(whole)(params)
    expected = None
    for value_fn, data in (
        (whole, {}),
        (gx.compose(squares, net), dict(whole.data)),
        (fit(chunks=4), {}),
    ):
        tx = gx.hessian_free(curvature_batch_size=12)
        update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
        updates, _ = update(grads, tx.init(params), params, value=value, **data)
        updates = np.asarray(ravel_pytree(updates)[0])
        expected = updates if expected is None else expected
        np.testing.assert_allclose(updates, expected, atol=1e-5)


@pytest.mark.parametrize("unit", [1e-16, 1e16])
def test_units_of_the_objective_do_not_matter(unit: float) -> None:
    scaled = gx.compose(lambda outputs, y: unit * squares(outputs, y), net, **fit().data)
    ends = [follow(gx.hessian_free(), f, weights(), 6)[-1] for f in (fit(), scaled)]
    np.testing.assert_allclose(ends[1][2], unit * ends[0][2], rtol=1e-3)


def test_nothing_moves_where_value_or_gradient_is_not_finite() -> None:
    tx, params, value_fn = gx.hessian_free(), weights(), fit()
    value, grads = jax.value_and_grad(value_fn)(params)
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    _, state = update(grads, tx.init(params), params, value=value)
    bad = {**grads, "b": grads["b"].at[0, 0].set(jnp.nan)}
    for count, (f, g) in enumerate(((jnp.nan, grads), (value, bad)), start=1):
        updates, after = update(g, state, params, value=jnp.asarray(f, jnp.float32))
        assert not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
        assert int(after.info.non_finite) == count
        np.testing.assert_array_equal(after.damping, state.damping)
        np.testing.assert_array_equal(after.direction["a"], state.direction["a"])
        state = after


def test_steps_back_from_where_the_objective_is_not_defined() -> None:
    """The full step from x = 3 leaves the domain of the logarithm."""
    value_fn = gx.compose(lambda y: y - jnp.log(y), lambda x: x)
    tx = gx.hessian_free(curvature=gx.hessian(), damping=0.0)
    path = follow(tx, value_fn, jnp.asarray(3.0), 12)
    assert float(path[1][0]) > 0
    assert float(path[1][1].info.step_length) < 1
    np.testing.assert_allclose(path[-1][0], 1.0, atol=1e-3)


def test_a_curvature_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    broken = lambda value_fn, params: lambda v: jax.tree.map(lambda x: x * jnp.nan, v)
    path = follow(gx.hessian_free(curvature=broken), fit(), weights(), 2)
    assert int(path[-1][1].info.rejected) == 2
    assert path[-1][2] == path[0][2]


@pytest.mark.parametrize("start", [[1.0, 0.1], [0.3, -1e-3], [1e-3, 1.0]])
def test_leaves_the_saddle(start: list[float]) -> None:
    saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    solution = gx.minimize(
        saddle, jnp.asarray(start), gx.hessian_free(curvature=gx.hessian()), tol=1e-3
    )
    assert gx.Status(int(solution.status)) == gx.Status.converged
    np.testing.assert_allclose(solution.value, -1.0, atol=1e-5)


def test_a_preconditioner_saves_iterations() -> None:
    scales = jnp.geomspace(1, 1e4, 40)
    value_fn = gx.compose(lambda y: 0.5 * jnp.sum(scales * (y - 1) ** 2), lambda x: x)
    iterations = [
        int(follow(tx, value_fn, jnp.zeros(40), 1)[-1][1].info.iterations)
        for tx in (
            gx.hessian_free(damping=1.0, progress=1e-7),
            gx.hessian_free(
                damping=1.0, progress=1e-7, preconditioner=gx.hutchinson_diagonal(1, power=0.75)
            ),
        )
    ]
    assert iterations[1] < 0.7 * iterations[0]


def test_half_precision_parameters_reach_the_loss_of_float32() -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights())
    ends = [follow(gx.hessian_free(), fit(), params, 25)[-1][2] for params in (weights(), half)]
    assert ends[1] < 1.05 * ends[0]


def test_what_it_cannot_use_is_refused_by_name() -> None:
    params, plain = weights(), lambda p: squares(net(p, jnp.asarray(X)), jnp.asarray(Y))
    grads = jax.grad(plain)(params)

    def update(tx: Any, value_fn: Any) -> None:
        tx.update(grads, tx.init(params), params, value=1.0, value_fn=value_fn)

    with pytest.raises(ValueError, match=r"^hessian_free.*gx\.compose\(loss, model\)"):
        update(gx.hessian_free(), plain)
    with pytest.raises(ValueError, match=r"curvature_batch_size=4\).*gx\.compose"):
        update(gx.hessian_free(curvature=gx.hessian(), curvature_batch_size=4), plain)
    with pytest.raises(ValueError, match=r"curvature_batch_size=30.*24 examples"):
        update(gx.hessian_free(curvature_batch_size=30), fit())
    with pytest.raises(ValueError, match=r"multiple of 2"):
        update(gx.hessian_free(curvature_batch_size=7), fit(chunks=2))
    closed = gx.compose(lambda z: squares(z, jnp.asarray(Y)), lambda p: net(p, jnp.asarray(X)))
    with pytest.raises(ValueError, match="common leading axis"):
        update(gx.hessian_free(curvature_batch_size=4), closed)
    with pytest.raises(ValueError, match="hessian_free needs value_fn="):
        gx.hessian_free().update(grads, gx.hessian_free().init(params), params, value=1.0)
    with pytest.raises(ValueError, match=r"hessian_free\(preconditioner=…\)"):
        update(gx.hessian_free(preconditioner=lambda product, g, count: (lambda r: 1.0, 0)), fit())
    with pytest.raises(TypeError, match=r"curvature_batch_size=0\.25\)"):
        gx.hessian_free(curvature_batch_size=0.25)  # pyright: ignore[reportArgumentType]
