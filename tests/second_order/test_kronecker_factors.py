"""The factors against dense matrices, and the roots and inverses that they are made of."""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import gradxform as gx
from gradxform.objective import Composed
from gradxform.second_order import kronecker_factors as kf
from gradxform.second_order import quadratic_model as quadratic
from gradxform.second_order import random_passes as passes
from tests.thinning import every

rng = np.random.default_rng(3)
pytestmark = pytest.mark.usefixtures("x64")


def squares(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=tuple(range(1, y.ndim))))


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(outputs)[jnp.arange(len(y)), y])


def gauss_newton(value_fn: Composed, params: Any) -> np.ndarray:
    """The dense matrix JᵀHJ."""
    loss, model = value_fn.parts()
    start, unravel = ravel_pytree(params)

    @jax.jit
    def matrix(x: jax.Array) -> jax.Array:
        y, unravel_y = ravel_pytree(model(unravel(x)))
        jacobian = jax.jacobian(lambda x: ravel_pytree(model(unravel(x)))[0])(x)
        return jacobian.T @ jax.hessian(lambda y: loss(unravel_y(y)))(y) @ jacobian

    return np.asarray(matrix(start))


def dense_factors(matrix: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """E[V Vᵀ] and E[Vᵀ V] if ``matrix`` is the covariance of the entries of V."""
    four = matrix.reshape(rows, columns, rows, columns)
    return np.einsum("iaja->ij", four), np.einsum("iaib->ab", four)


def mean_factors(
    value_fn: Composed, params: Any, *, probes: int, lanczos: int = 1, part: int | None = None
) -> kf.Factors:
    """The mean of the factors of many probes."""
    value, none = value_fn(params), kf.no_factors(params, 4096)
    times = 1 if part is None else value_fn.examples // part
    of = passes.Part(value_fn if part is None else value_fn.spread(part), times)

    @jax.jit
    @jax.vmap
    def one(key: jax.Array) -> kf.Factors:
        at = passes.linearised(of, params)
        at = passes.scaled(at, of, passes.is_sum(at, of, value))
        v, _ = passes.probe(at, params, key, lanczos)
        return kf.averaged(none, v, jnp.asarray(1.0))

    many = one(jax.random.split(jax.random.key(0), probes))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), many)


def each_leaf(params: Any, factors: kf.Factors) -> tuple[list[Any], list[Any]]:
    is_pair = lambda x: isinstance(x, kf.Pair)
    return jax.tree.leaves(params), jax.tree.leaves(factors, is_leaf=is_pair)


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_of_one_linear_layer_the_mean_is_exact_to_two_percent() -> None:
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    value_fn = gx.compose(squares, lambda w, x: x @ w, x=x, y=y)
    w = jnp.asarray(rng.normal(size=(4, 3)))
    pair = mean_factors(value_fn, w, probes=10_000)
    second_moment = x.T @ x / 6
    assert isinstance(pair, kf.Pair)
    assert error(pair.left, 3 * second_moment) < 0.02
    assert error(pair.right, np.trace(second_moment) * np.eye(3)) < 0.02
    np.testing.assert_allclose(gauss_newton(value_fn, w), np.kron(second_moment, np.eye(3)))


TOKENS = rng.integers(0, 5, size=(6, 4))


def tied(p: Any, x: jax.Array) -> jax.Array:
    """An embedding that also makes the logits."""
    return jnp.tanh(p["table"][x].mean(1) * p["scale"]) @ p["table"].T


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    h = x
    for _ in range(3):
        h = jnp.tanh(h @ p["w"] + p["b"])
    return h


def attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("ntd,dhk->nthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k))
    return jnp.einsum("nhts,nshk->nthk", weights, v).sum((1, 3))


def convolution(p: Any, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(y).sum((1, 2))


def array(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


MODELS: dict[str, tuple[Callable[..., Any], Any, Any, Any]] = {
    "tied": (tied, {"table": array(5, 3), "scale": array(3)}, TOKENS, TOKENS[:, 0]),
    "recurrent": (recurrent, {"w": array(3, 3), "b": array(3)}, array(6, 3), TOKENS[:, 0] % 3),
    "attention": (
        attention,
        {"q": array(4, 3, 2), "k": array(4, 3, 2) / 2, "v": array(4, 3, 2) + 1},
        array(6, 2, 4),
        TOKENS[:, 0] % 3,
    ),
    "convolution": (convolution, array(2, 2, 2, 3), array(6, 3, 3, 2), TOKENS[:, 0] % 3),
}


@pytest.mark.parametrize("name", every(2, MODELS))
def test_shared_weights_count_each_use(name: str) -> None:
    """Both uses of a tied embedding, each step of a recurrence, each place of a convolution."""
    model, params, x, y = MODELS[name]
    value_fn = gx.compose(cross_entropy, model, x=x, y=y)
    factors = mean_factors(value_fn, params, probes=2000, lanczos=5)
    matrix, start = gauss_newton(value_fn, params), 0
    for leaf, factor in zip(*each_leaf(params, factors), strict=True):
        block = matrix[start : start + leaf.size, start : start + leaf.size]
        start += leaf.size
        cut = kf.layout(leaf.shape)
        if not isinstance(factor, kf.Pair) or cut is None:
            assert error(factor, np.diag(block)) < 0.1
            continue
        assert not cut.stack
        for found, expected in zip(
            factor, dense_factors(block, cut.rows, cut.columns), strict=True
        ):
            assert error(found, expected) < 0.1


def test_a_part_of_a_sum_counts_for_the_whole() -> None:
    """The data repeat, so that each part has the curvature of the whole."""
    x, y = (np.repeat(rng.normal(size=(4, n)), 3, axis=0) for n in (4, 2))
    w = jnp.asarray(rng.normal(size=(4, 2)))
    model = lambda w, x: jnp.tanh(x @ w)
    total = lambda outputs, y: 0.5 * jnp.sum((outputs - y) ** 2)
    for loss, scale in ((squares, 1), (total, 3)):
        value_fn = gx.compose(loss, model, x=x, y=y)
        part = passes.Part(value_fn.spread(4), 3)
        at = passes.linearised(part, w)
        assert float(passes.scaled(at, part, passes.is_sum(at, part, value_fn(w))).scale) == scale
    whole, part = (mean_factors(value_fn, w, probes=2000, part=n) for n in (12, 4))
    for ours, theirs in zip(part, whole, strict=True):
        assert error(ours, theirs) < 0.15


# -- roots


def symmetric(values: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values),) * 2))
    return (q * values) @ q.T


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        (np.full(8, 3.0), 1),
        (np.full(8, 3.0), 4),
        (np.repeat([0.0, 2.0, 5.0], 3), 3),
        (np.repeat([0.0, 2.0, 5.0], 3), 6),
        (np.geomspace(1e-3, 1, 8), 8),
        (np.zeros(4), 3),
    ],
)
def test_root_times_is_the_square_root(values: np.ndarray, steps: int) -> None:
    matrix = symmetric(values)
    x = np.random.default_rng(1).choice([-1.0, 1.0], size=len(values))
    product = lambda x: {"y": matrix @ x["y"]}
    root, convex = jax.jit(lambda x: passes.root_times(product, x, steps))({"y": jnp.asarray(x)})
    np.testing.assert_allclose(root["y"], symmetric(np.sqrt(values)) @ x, rtol=1e-7, atol=1e-7)
    assert bool(convex)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_negative_curvature_is_seen_and_left_out(steps: int) -> None:
    matrix = symmetric(np.asarray([-3.0, -2.0, 0.5, 1.0]))
    x = jnp.asarray([1.0, -1.0, 1.0, 1.0])
    root, convex = passes.root_times(lambda x: matrix @ x, x, steps)
    assert not bool(convex)
    assert np.isfinite(root).all()
    tiny, convex = passes.root_times(lambda x: -1e-30 * x, x, steps)
    assert not bool(convex)
    np.testing.assert_array_equal(tiny, 0)


def test_a_curvature_that_is_not_finite_is_not_called_indefinite() -> None:
    root, convex = passes.root_times(lambda x: x * jnp.nan, jnp.ones(3), 3)
    assert not np.isfinite(root).any()
    assert bool(convex)


# -- layouts


@given(st.lists(st.integers(1, 40), max_size=5))
@settings(max_examples=60, deadline=None)
def test_layouts(shape: list[int]) -> None:
    cut = kf.layout(shape)
    turned = kf.layout(shape[::-1])
    if cut is None:
        # a vector, or all but one axis of one
        assert turned is None
        assert sum(n > 1 for n in shape) <= 1
        return
    assert turned is not None
    assert math.prod(cut.stack) * cut.rows * cut.columns == math.prod(shape)
    assert min(cut.rows, cut.columns) > 1
    if not cut.stack and not turned.stack:
        assert sorted(cut[1:]) == sorted(turned[1:])
    if not cut.stack:
        # no cut has a smaller sum of sides
        sums = [
            math.prod(shape[:i]) + math.prod(shape[i:])
            for i in range(1, len(shape))
            if min(math.prod(shape[:i]), math.prod(shape[i:])) > 1
        ]
        assert cut.rows + cut.columns == min(sums)


def test_a_stack_of_matrices() -> None:
    assert kf.layout((12, 64, 64)) == kf.Layout((12,), 64, 64)
    assert kf.layout((3, 5, 5), stacked=True) == kf.Layout((3,), 5, 5)
    assert kf.layout((3, 5, 5), stacked=False) == kf.Layout((), 15, 5)
    assert kf.layout((3, 5), stacked=True) is None
    assert kf.layout((2, 3, 4, 6)) == kf.Layout((), 6, 24) or kf.layout((2, 3, 4, 6)) == kf.Layout(
        (), 24, 6
    )
    assert kf.layout(()) is None


def test_each_kind_of_factor_is_applied_as_its_dense_form() -> None:
    """Matrices, long sides with only the diagonal, stacks and vectors."""
    params = {"long": array(7, 3), "matrix": array(4, 3), "stack": array(2, 3, 4), "v": array(5)}
    params["wide"] = array(3, 7)
    options = kf.Options(2, 20, 0.9, 6, 4, 0)
    factors, _ = kf.first_estimate(options, params)
    v = jax.tree.map(lambda x: array(*x.shape) + 1, params)
    lam = jnp.asarray(0.3)

    @jax.jit
    def divided(v: Any) -> Any:
        means = kf.averaged(factors, v, jnp.asarray(1.0))
        estimate = kf.Estimate(means, kf.inverses_of(means, params, lam))
        return kf.divided(params, estimate, lam)

    found = divided(v)
    np.testing.assert_allclose(found["v"], params["v"] / (v["v"] ** 2 + lam))

    def expected(g: np.ndarray, v: np.ndarray) -> np.ndarray:
        left, right = (a if len(a) <= 6 else np.diag(np.diag(a)) for a in (v @ v.T, v.T @ v))
        (m, n), tau, gamma = g.shape, np.sqrt(np.sum(v**2)), np.sqrt(0.3)
        pi = np.sqrt(n / m)
        left, right = left / tau + pi * gamma * np.eye(m), right / tau + gamma / pi * np.eye(n)
        return np.linalg.solve(left, g) @ np.linalg.inv(right)

    for name in ("long", "wide", "matrix"):
        np.testing.assert_allclose(
            found[name], expected(np.asarray(params[name]), np.asarray(v[name])), rtol=1e-9
        )
    for i in range(2):
        one = expected(np.asarray(params["stack"][i]), np.asarray(v["stack"][i]))
        np.testing.assert_allclose(found["stack"][i], one, rtol=1e-9)


@pytest.mark.parametrize(("bad", "samples"), [(jnp.inf, 1), (1e200, 1), (jnp.inf, 2)])
def test_a_probe_that_is_not_finite_leaves_the_factors(
    bad: float, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one whose square is not."""
    params = {"w": array(4, 3), "b": array(3)}
    options = kf.Options(2, 20, 0.9, 6, 4, 0, samples)
    first = kf.first_estimate(options, params)
    v = {**params, "b": params["b"].at[1].set(bad)}

    def refreshed(v: Any, estimate: kf.Estimate, count: int) -> kf.Refreshed:
        monkeypatch.setattr(passes, "probe", lambda *_, **__: passes.Probe(v, jnp.array(True)))
        lam, linearised = jnp.asarray(0.1), cast(Any, lambda: None)
        return kf.refreshed(options, estimate, params, linearised, jnp.asarray(count), lam)

    sound = refreshed(params, first, 0)
    after = refreshed(v, sound.estimate, 3)
    assert (bool(sound.finite), bool(after.finite)) == (True, False)
    for x, y in zip(*map(jax.tree.leaves, (sound.estimate, after.estimate)), strict=True):
        np.testing.assert_array_equal(x, y)


# -- the quadratic model


def model_of(g: np.ndarray, matrix: np.ndarray, directions: np.ndarray) -> quadratic.Model:
    pairs = (0, 0), (0, 1), (1, 1)
    bent = directions @ matrix @ directions.T
    plain = directions @ directions.T
    return quadratic.Model(
        jnp.asarray(directions @ g),
        jnp.stack([bent[i, j] for i, j in pairs]),
        jnp.stack([plain[i, j] for i, j in pairs]),
    )


@pytest.mark.parametrize(("unit", "length"), [(1e-12, 1e3), (1.0, 1e3), (1e12, 1e3), (1.0, 1e-3)])
def test_the_minimum_of_the_quadratic_model(unit: float, length: float) -> None:
    """With |μ| ≤ 1, which a short second direction reaches."""
    g, matrix = unit * rng.normal(size=5), unit * symmetric(np.asarray([0.0, 0.1, 1.0, 2.0, 5.0]))
    directions = rng.normal(size=(2, 5)) * [[1.0], [length]]
    lam = 0.3 * unit
    model = model_of(g, matrix, directions)
    m = directions @ (matrix + lam * np.eye(5)) @ directions.T
    b = directions @ g
    alpha, mu = quadratic.minimum(model, lam, None, None)
    expected = np.linalg.solve(m, -b)
    if length < 1:
        assert abs(expected[1]) > 1
        expected[1] = np.sign(expected[1])
        expected[0] = -(b[0] + expected[1] * m[0, 1]) / m[0, 0]
    np.testing.assert_allclose((alpha, mu), expected, rtol=1e-4)
    _, mu = quadratic.minimum(model, lam, 0.2, None)
    np.testing.assert_allclose(mu, -(b[1] + 0.2 * m[0, 1]) / m[1, 1], rtol=1e-9)
    alpha, _ = quadratic.minimum(model, lam, None, 0.9)
    np.testing.assert_allclose(alpha, -(b[0] + 0.9 * m[0, 1]) / m[0, 0], rtol=1e-9)
    assert list(map(float, quadratic.minimum(model, lam, 0.2, 0.9))) == [0.2, 0.9]
    d = 0.2 * directions[0] + 0.9 * directions[1]
    change = quadratic.predicted(model, jnp.asarray(0.2), jnp.asarray(0.9))
    np.testing.assert_allclose(change, g @ d + 0.5 * d @ matrix @ d, rtol=1e-9)


def test_without_a_last_step_or_with_a_parallel_one() -> None:
    g, matrix = rng.normal(size=5), symmetric(np.asarray([0.1, 0.1, 1.0, 2.0, 5.0]))
    d = rng.normal(size=5)
    alone = -(g @ d) / (d @ matrix @ d)
    alpha, mu = quadratic.minimum(model_of(g, matrix, np.stack([d, 0 * d])), 0.0, None, None)
    np.testing.assert_allclose((alpha, mu), np.asarray([alone, 0.0]), rtol=1e-5)
    alpha, mu = quadratic.minimum(model_of(g, matrix, np.stack([d, 2 * d])), 0.0, None, None)
    np.testing.assert_allclose(alpha + 2 * mu, alone, rtol=1e-4)
    alpha, mu = quadratic.minimum(model_of(0 * g, matrix, np.stack([0 * d, d])), 0.0, None, None)
    assert (float(alpha), float(mu)) == (0, 0)


def test_early_updates_invert_twice_in_each_doubling_of_the_count() -> None:
    counts = jnp.arange(300)
    early = np.flatnonzero(kf.is_early(counts, 20))
    assert early.tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def test_the_model_along_two_directions_is_that_of_the_objective() -> None:
    x, y = rng.normal(size=(6, 4)), rng.integers(0, 3, size=6)
    value_fn = gx.compose(cross_entropy, lambda w, x: jnp.tanh(x @ w), x=x, y=y)
    w, d, e = array(4, 3), array(4, 3) + 1, array(4, 3) * 2 - 1
    at = passes.linearised(passes.Part(value_fn, 1), w)
    g = jax.grad(value_fn)(w)
    found = quadratic.model_along(at, g, d, e)
    matrix = gauss_newton(value_fn, w)
    directions = np.stack([np.ravel(d), np.ravel(e)])
    expected = model_of(np.ravel(g), matrix, directions)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
