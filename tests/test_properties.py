"""Properties over random trees, shapes and numbers."""

import functools
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from tests.methods import METHODS, Method, objective, step
from tests.thinning import every

hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")

leaves = st.builds(
    lambda shape, seed: jax.random.normal(jax.random.key(seed), shape),
    st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    st.integers(0, 100),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=4,
)
unit = st.floats(0, 0.99)


def bowl(tree: Any) -> jax.Array:
    terms = [jnp.sum((i + 1) * (x - 1) ** 2) for i, x in enumerate(jax.tree.leaves(tree))]
    return sum(terms, start=jnp.zeros(()))


@hypothesis.given(trees, st.floats(0, 1))
def test_nesterov_with_no_momentum_is_gradient_descent(params: Any, rate: float) -> None:
    ours, plain = gx.nesterov(rate, 0.0), gx.sgd(rate)
    chex.assert_trees_all_close(
        step(ours, params, ours.init(params), bowl)[0],
        step(plain, params, plain.init(params), bowl)[0],
        rtol=1e-6,
    )


@hypothesis.given(trees, st.floats(1e-3, 1), unit)
def test_theta_of_nesterov_is_theta_of_its_recurrence(
    params: Any, rate: float, alpha: float
) -> None:
    tx = gx.nesterov(rate, alpha)
    state, theta = tx.init(params), params
    for _ in range(3):
        params, state = step(tx, params, state, bowl)
        theta = optax.apply_updates(theta, state.velocity)
        chex.assert_trees_all_close(gx.eval_params(state, params), theta, rtol=1e-4, atol=1e-3)


@hypothesis.given(leaves, st.floats(1e-6, 1e6), st.floats(0.01, 0.9), st.floats(0.01, 0.99))
def test_adaptive_directions_ignore_the_scale_of_the_gradient(
    g: jax.Array, scale: float, b1: float, b2: float
) -> None:
    for tx in (
        gx.scale_by_adam(b1, b2, eps=0.0),
        gx.scale_by_rmsprop(b2, eps=0.0),
        gx.scale_by_adagrad(eps=0.0),
    ):
        direction, _ = tx.update(g, tx.init(g))
        scaled, _ = tx.update(scale * g, tx.init(g))
        np.testing.assert_allclose(scaled, direction, rtol=1e-4)


@hypothesis.given(st.lists(st.floats(-3, 3), min_size=5, max_size=5), st.floats(-4, 4))
def test_coordinate_descent_never_climbs_a_quartic(coefficients: list[float], start: float) -> None:
    quartic = lambda x: sum(c * x**k for k, c in enumerate(coefficients)) + 0.5 * x**4
    tx = gx.coordinate_descent()
    x = jnp.asarray(start)
    after, state = step(tx, x, tx.init(x), quartic)
    size = sum(abs(c * start**k) for k, c in enumerate(coefficients)) + 0.5 * start**4
    assert quartic(after) <= quartic(x) + 1e-5 * (1 + size)
    assert state.info.evaluations <= 21


@hypothesis.given(trees, st.permutations(range(3)))
def test_the_order_of_leaves_changes_nothing(tree: Any, order: list[int]) -> None:
    params = [tree, jnp.asarray(2.0), jnp.asarray([1.0, -1.0])]
    shuffled = [params[i] for i in order]
    tx = gx.rmsprop(0.1, momentum=0.5, nesterov=True)
    updates, _ = tx.update(params, tx.init(params), params)
    others, _ = tx.update(shuffled, tx.init(shuffled), shuffled)
    chex.assert_trees_all_equal(others, [updates[i] for i in order])


few = hypothesis.settings(max_examples=10)
half_trees = st.builds(
    lambda tree, dtypes: jax.tree.map(lambda x: x.astype(dtypes[x.size % 3]), tree),
    st.lists(trees, min_size=1, max_size=2),
    st.permutations(["float16", "bfloat16", "float32"]),
)


@few
@hypothesis.given(st.sampled_from(list(METHODS.values())), half_trees)
def test_any_tree_keeps_its_structure_and_dtypes(method: Method, params: Any) -> None:
    """By tracing alone. A state that changed would break the scan of a training loop."""
    tx = method.build()
    state = jax.eval_shape(tx.init, params)
    assert jax.eval_shape(lambda p, s: step(tx, p, s, bowl), params, state) == (
        jax.eval_shape(lambda: params),
        state,
    )


CHANGED_ORDER = [
    name for name, method in METHODS.items() if not method.needs or name in ("bfgs", "newton_cg")
]


@pytest.mark.parametrize("name", every(2, CHANGED_ORDER))
def test_the_order_of_leaves_changes_no_method(name: str) -> None:
    order = (2, 0, 1)
    params = [jnp.asarray(2.0), jnp.asarray([[1.0, -1.0], [0.5, 3.0]]), jnp.zeros(2)]
    shuffled = [params[i] for i in order]
    back = [order.index(i) for i in range(3)]
    tx = METHODS[name].build()

    def after(params: Any, order: Any) -> Any:
        f = lambda p: objective([p[i] for i in order])
        state = tx.init(params)
        for _ in range(2):
            params, state = step(tx, params, state, f)
        return [params[i] for i in order]

    ours, others = jax.jit(lambda p, q: (after(p, range(3)), after(q, back)))(params, shuffled)
    chex.assert_trees_all_close(others, ours, rtol=1e-4, atol=1e-5)


vectors = st.lists(st.floats(-1, 1), min_size=3, max_size=3)
seeds = st.integers(0, 2**20)


@functools.partial(jax.jit, static_argnums=0)
def newton_path(damped: bool, a: jax.Array, b: jax.Array, y: jax.Array) -> Any:
    """Of f(Ay + b) from y, and of f from Ay + b: x, then A times the other y, plus b."""
    f = lambda x: jnp.sum(jnp.cosh(x)) + jnp.sum(x) ** 2 + x[0] * x[1]
    tx = gx.newton(0.7, damping=0.3 if damped else 0.0)
    x, paths = a @ y + b, []
    for fn, start in ((f, x), (lambda y: f(a @ y + b), y)):
        state, at, path = tx.init(start), start, []
        for _ in range(3):
            at, state = step(tx, at, state, fn)
            path.append(at)
        paths.append(jnp.stack(path))
    return paths[0], paths[1] @ a.T + b


@few
@hypothesis.given(seeds, vectors, vectors)
def test_newton_is_affine_invariant(seed: int, b: list[float], y: list[float]) -> None:
    with jax.enable_x64(True):
        a = np.random.default_rng(seed).normal(size=(3, 3)) + 3 * np.eye(3)
        plain, mapped = newton_path(False, jnp.asarray(a), jnp.asarray(b), jnp.asarray(y))
        np.testing.assert_allclose(mapped, plain, rtol=1e-7, atol=1e-7)


def test_newton_with_damping_is_not() -> None:
    with jax.enable_x64(True):
        a, b, y = jnp.diag(jnp.asarray([1.0, 2.0, 5.0])), jnp.zeros(3), jnp.ones(3)
        plain, mapped = newton_path(True, a, b, y)
        assert jnp.max(jnp.abs(plain - mapped)) > 1e-2


SOLVERS = {
    "newton_cg": lambda: gx.newton_cg(tol=1e-9, forcing="fixed"),
    "steihaug": lambda: gx.trust_region("steihaug", initial_radius=1e6, tol=1e-9),
    "hessian_free": lambda: gx.hessian_free(curvature=gx.hessian(), damping=0.0, maxiter=7),
}


@functools.partial(jax.jit, static_argnums=0)
def one_solve(name: str, matrix: jax.Array, linear: jax.Array) -> Any:
    f = lambda x: 0.5 * x @ matrix @ x - linear @ x
    tx, x = SOLVERS[name](), jnp.zeros_like(linear)
    x, state = step(tx, x, tx.init(x), f)
    return x, optax.tree.get(state, "curvature_products")


@few
@hypothesis.given(st.sampled_from(list(SOLVERS)), st.integers(1, 7), seeds)
def test_conjugate_gradients_end_after_as_many_products_as_eigenvalues(
    name: str, distinct: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        q, _ = np.linalg.qr(rng.normal(size=(7, 7)))
        values = np.linspace(1, 10, distinct)[np.arange(7) % distinct]
        matrix, linear = (q * values) @ q.T, rng.normal(size=7)
        x, products = one_solve(name, jnp.asarray(matrix), jnp.asarray(linear))
        np.testing.assert_allclose(x, np.linalg.solve(matrix, linear), rtol=1e-6, atol=1e-7)
        # Hessian-free goes on by relative progress: to all it was allowed
        assert products <= (7 if name == "hessian_free" else distinct)


@functools.partial(jax.jit, static_argnums=0)
def last_pair(limited: bool, points: jax.Array, grads: jax.Array) -> jax.Array:
    """H y for the last pair: the direction where the gradient is y, from a memory of all."""
    tx: Any = gx.scale_by_lbfgs(3) if limited else gx.scale_by_bfgs()
    state = tx.init(points[0])
    for x, g in zip(points, grads, strict=True):
        _, state = tx.update(g, state, x)
    if not limited:
        return state.inverse_hessian @ (grads[-1] - grads[-2])
    # a point that is no pair: at the same place, where the gradient fell
    return tx.update(grads[-1] - grads[-2], state, points[-1])[0]


@few
@hypothesis.given(st.booleans(), seeds)
def test_the_last_pair_satisfies_the_secant_equation(limited: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        root = rng.normal(size=(4, 4))
        points = rng.normal(size=(5, 4))
        grads = np.sinh(points) + points @ root @ root.T
        found = last_pair(limited, jnp.asarray(points), jnp.asarray(grads))
        np.testing.assert_allclose(found, points[-1] - points[-2], rtol=1e-6, atol=1e-8)


@functools.partial(jax.jit, static_argnums=0)
def scaled_path(name: str, grads: jax.Array, scale: jax.Array) -> jax.Array:
    zero = {"eps": 0.0} if name != "adam" else {"eps": 0.0, "eps_root": 0.0}
    tx = METHODS[name].build(**zero)

    def body(state: Any, g: jax.Array) -> Any:
        updates, state = tx.update(g, state)
        return state, updates

    return jax.lax.scan(body, tx.init(grads[0]), scale * grads)[1]


@few
@hypothesis.given(
    st.sampled_from(["adam", "adagrad", "rmsprop", "rmsprop_nesterov"]),
    seeds,
    st.floats(1e-12, 1e12),
)
def test_whole_paths_ignore_the_scale_of_the_gradients(name: str, seed: int, scale: float) -> None:
    grads = jnp.asarray(np.random.default_rng(seed).normal(size=(20, 3)), jnp.float32)
    plain, scaled = scaled_path(name, grads, jnp.float32(1)), scaled_path(name, grads, scale)
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["coordinate_descent", "newton", "hessian_free"])
def test_chunks_of_the_data_change_no_method(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    model = lambda p, x: jnp.tanh(x @ p["w"]) + p["b"]
    loss = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    params = {"w": jnp.asarray([1.0, -0.5, 0.3]), "b": jnp.asarray(0.1)}
    tx = METHODS[name].build()

    def after(params: Any, **options: Any) -> Any:
        value_fn = gx.compose(loss, model, x=x, y=np.sin(x[:, 0]), **options)
        return step(tx, params, tx.init(params), value_fn)[0]

    whole, pieces = jax.jit(lambda p: (after(p), after(p, chunks=4)))(params)
    chex.assert_trees_all_close(pieces, whole, rtol=1e-4, atol=1e-5)
    assert not np.allclose(whole["w"], params["w"], atol=1e-3) or name == "coordinate_descent"
