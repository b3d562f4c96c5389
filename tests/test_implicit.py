"""The derivative of the solution of ``minimize`` in the arguments of the objective."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradxform as gx
from tests.methods import METHODS
from tests.thinning import LONG, every

RATE = optax.exponential_decay(0.1, 1, 0.95)  # for methods that never settle at a constant rate
CHANGES: dict[str, dict[str, Any]] = {
    "rprop": {"min_step_size": 1e-16},
    "rmsprop": {"learning_rate": RATE},
    "rmsprop_momentum": {"learning_rate": RATE, "momentum": 0.5},
    "rmsprop_nesterov": {"learning_rate": RATE, "momentum": 0.5},
    "adadelta": {"learning_rate": 0.3, "eps": 0.1},
    "adam": {"learning_rate": RATE, "b1": 0.5, "b2": 0.9},
    "newton": {"learning_rate": 1.0},
    "newton_cg": {"learning_rate": 1.0, "tol": 1e-3},
}
SOLVERS = {
    **{name: method.build(**CHANGES.get(name, {})) for name, method in METHODS.items()},
    "optax.sgd": optax.sgd(0.1, momentum=0.5),
    "optax.adam": optax.adam(RATE, b1=0.5, b2=0.9),
    "optax.lbfgs": optax.lbfgs(),
}
QUICK = gx.sgd(0.2)  # to compile
THETA, WEIGHTS = (0.7, -0.4, 1.1), (1.0, -0.7, 0.4)
DIRECTION = (0.3, 0.9, -0.5)


def bowl(x: dict[str, jax.Array], theta: jax.Array) -> jax.Array:
    """Strongly convex in x and not quadratic; smooth in theta."""
    y = jnp.append(x["a"], x["b"])
    mixed = y[0] * y[1] * jnp.sin(theta[2]) / 2
    return jnp.sum(jnp.exp(theta / 2) * y**2 + 0.1 * y**4 - jnp.sin(theta) * y) + mixed


def solve(theta: jax.Array, tx: Any = QUICK, **options: Any) -> gx.Solution:
    start = {"a": jnp.zeros(2), "b": jnp.ones(())}
    return gx.minimize(bowl, start, tx, args=(theta,), **{"tol": 1e-13, **options})


def number(solution: gx.Solution) -> jax.Array:
    x = solution.params
    return jnp.append(x["a"], x["b"]) @ jnp.asarray(WEIGHTS) + jnp.sin(solution.value)


def difference(f: Callable[[jax.Array], jax.Array]) -> float:
    """The derivative along DIRECTION, to fourth order."""
    theta, v = jnp.asarray(THETA), 2e-3 * jnp.asarray(DIRECTION)
    near, far = f(theta + v) - f(theta - v), f(theta + 2 * v) - f(theta - 2 * v)
    return float((8 * near - far) / (12 * 2e-3))


def compare(one: Any, other: Any, tolerance: float) -> None:
    leaves = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    assert max(float(jnp.max(jnp.abs(x - y))) for x, y in leaves) < tolerance


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", every(4, SOLVERS))
def test_the_derivative_is_that_of_finite_differences(name: str) -> None:
    f = lambda theta: number(solve(theta, SOLVERS[name]))
    theta, direction = jnp.asarray(THETA), jnp.asarray(DIRECTION)
    expected = difference(f)
    assert abs(jax.grad(f)(theta) @ direction - expected) < 1e-8
    assert abs(jax.jvp(f, (theta,), (direction,))[1] - expected) < 1e-8


# -- against the closed form of ridge regression

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(12, 3)), RANDOM.normal(size=12)
RIDGE = (0.1, X, Y)


def ridge(w: jax.Array, weight: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean((x @ w - y) ** 2) + weight * jnp.sum(w**2)


def closed_form(weight: Any, x: Any, y: Any) -> jax.Array:
    return jnp.linalg.solve(x.T @ x / 12 + weight * jnp.eye(3), x.T @ y / 12)


def by_args(*args: Any) -> jax.Array:
    return gx.minimize(ridge, jnp.zeros(3), QUICK, args=args, tol=1e-13).params


def by_closure(*args: Any) -> jax.Array:
    return gx.minimize(lambda w: ridge(w, *args), jnp.zeros(3), QUICK, tol=1e-13).params


def by_compose(weight: Any, x: Any, y: Any) -> jax.Array:
    loss = lambda out, y, weight: jnp.mean((out[0] - y) ** 2) + weight * jnp.sum(out[1] ** 2)
    objective = gx.compose(loss, lambda w, x: (x @ w, w), x=x)
    tx = gx.newton(curvature=gx.gauss_newton())
    args = {"y": y, "weight": weight}
    return gx.minimize(objective, jnp.zeros(3), tx, args=args, tol=1e-13).params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("f", [by_args, by_closure, by_compose])
def test_ridge_regression(f: Callable[..., jax.Array]) -> None:
    loss = lambda f: lambda *args: jnp.sin(f(*args)) @ jnp.asarray(WEIGHTS)
    expected = jax.grad(loss(closed_form), (0, 1, 2))(*RIDGE)
    compare(jax.jit(jax.grad(loss(f), (0, 1, 2)))(*RIDGE), expected, 1e-10)
    if f is not by_compose:
        compare(jax.grad(jax.jit(loss(f)), (0, 1, 2))(*RIDGE), expected, 1e-10)


@pytest.mark.usefixtures("x64")
def test_second_derivatives_and_forward_mode() -> None:
    arguments = (0, 2)
    square = lambda f: lambda *args: jnp.sum(f(*args) ** 2)
    expected = jax.jit(jax.hessian(square(closed_form), arguments))(*RIDGE)
    compare(jax.jit(jax.hessian(square(by_args), arguments))(*RIDGE), expected, 1e-10)
    expected = jax.jit(jax.jacfwd(closed_form))(*RIDGE)
    compare(jax.jit(jax.jacfwd(by_closure))(*RIDGE), expected, 1e-10)
    value = lambda *args: gx.minimize(ridge, jnp.zeros(3), QUICK, args=args, tol=1e-13).value
    expected = jax.grad(lambda *args: ridge(closed_form(*args), *args), arguments)(*RIDGE)
    compare(jax.jit(jax.grad(value, arguments))(*RIDGE), expected, 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("f", [by_args, by_closure] if LONG else [by_closure])
def test_batches(f: Callable[..., jax.Array]) -> None:
    weights = jnp.asarray([0.1, 0.5])
    loss = lambda f: lambda weight: jnp.sum(f(weight, X, Y) ** 2)
    expected = jax.vmap(jax.grad(loss(closed_form)))(weights)
    compare(jax.jit(jax.vmap(jax.grad(loss(f))))(weights), expected, 1e-10)
    batch = lambda weights: jnp.sum(jax.vmap(loss(f))(weights))
    compare(jax.jit(jax.grad(batch))(weights), expected, 1e-10)


@pytest.mark.usefixtures("x64")
def test_a_solve_within_a_solve() -> None:
    """The best weight, found by Newton's method, has a gradient of zero."""

    aim = 0.6 * closed_form(0.1, X, Y) + 0.01

    def error(weight: jax.Array) -> jax.Array:
        w = gx.minimize(ridge, jnp.zeros(3), QUICK, args=(jnp.exp(weight), X, Y), tol=1e-12).params
        return jnp.sum((w - aim) ** 2)

    best = gx.minimize(error, 0.0, gx.newton(), tol=1e-9)
    assert best.converged
    exact = lambda v: jnp.sum((closed_form(jnp.exp(v), X, Y) - aim) ** 2)
    assert abs(jax.grad(exact)(best.params)) < 2e-9


# -- what has no derivative, or another one


def test_a_solve_that_did_not_converge_gives_nan_unless_asked_otherwise() -> None:
    f = lambda theta, **options: number(solve(theta, tol=1e-5, max_steps=2, **options))
    theta = jnp.asarray(THETA)
    assert jnp.isnan(jax.jit(jax.grad(f))(theta)).all()
    assert jnp.isnan(jax.jvp(lambda x: solve(x, max_steps=2).value, (theta,), (theta,))[1])
    always = jax.jit(jax.grad(functools.partial(f, derivative="implicit_always")))(theta)
    converged = jax.jit(jax.grad(lambda theta: number(solve(theta, tol=1e-5))))(theta)
    np.testing.assert_allclose(always, converged, atol=0.2)
    assert jnp.abs(always - converged).max() > 1e-3


def test_a_lane_that_failed_spoils_no_other() -> None:
    def loss(theta: jax.Array) -> jax.Array:
        solutions = jax.vmap(lambda n: solve(theta, tol=1e-4, max_steps=n))(jnp.asarray([99, 2]))
        return jnp.sum(jnp.where(solutions.converged, solutions.params["b"], 0))

    theta = jnp.asarray(THETA)
    alone = jax.grad(lambda theta: solve(theta, tol=1e-4).params["b"])(theta)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(theta), alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"stop": gx.small_change(1e-3)}])
def test_a_penalty_in_the_method_gives_nan(options: dict[str, Any]) -> None:
    """The gradient of the objective is not zero at such a minimum."""
    tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.2))

    def f(a: jax.Array) -> gx.Solution:
        return gx.minimize(lambda w, a: (w - a) ** 2, 0.0, tx, args=(a,), **options)

    assert f(jnp.asarray(1.0)).converged
    assert jnp.isnan(jax.grad(lambda a: f(a).params)(1.0))


def test_without_derivative_one_line_says_so() -> None:
    f = lambda theta: number(solve(theta, tol=1e-4, derivative=None))
    theta = jnp.asarray(THETA)
    assert jnp.isfinite(jax.jit(jax.vmap(f))(theta[None]))
    constant = lambda theta: f(jax.lax.stop_gradient(theta)) * theta[0]
    assert jnp.isfinite(jax.grad(constant)(theta)[0])
    for g in (jax.grad(f), jax.jit(jax.jacfwd(f))):
        with pytest.raises(
            ValueError, match=r"^minimize\(derivative=None\): .*leave derivative out"
        ):
            g(theta)


def test_the_start_and_the_method_have_no_influence_and_frozen_leaves_do_not_move() -> None:
    def f(start: jax.Array, rate: jax.Array, a: jax.Array) -> jax.Array:
        methods: dict[Any, Any] = {"moves": gx.momentum(rate), "stays": optax.set_to_zero()}
        tx = gx.partition(methods, {"x": "moves", "z": "stays"})
        bowl = lambda p: (p["x"] - a * p["z"]) ** 2 + 3 * (p["z"] - a) ** 2
        params = gx.minimize(bowl, {"x": start, "z": 2.0}, tx, tol=1e-5).params
        return params["x"] + 100 * params["z"]

    arguments = jnp.asarray(0.5), jnp.asarray(0.1), jnp.asarray(3.0)
    for g in (jax.grad(f, (0, 1, 2)), jax.jacfwd(f, (0, 1, 2))):
        np.testing.assert_allclose(jax.jit(g)(*arguments), (0, 0, 2), atol=1e-4)


def test_the_second_part_of_the_objective_moves_with_the_solution() -> None:
    def fn(w: jax.Array, a: jax.Array, labels: jax.Array) -> Any:
        return jnp.sum((w - a) ** 2), {"twice": 2 * w * a, "labels": labels}

    labels = jnp.arange(3)  # integers have no derivative, closed over or not
    for has_args in (True, False):

        def f(a: jax.Array, labels: jax.Array, has_args: bool = has_args) -> Any:
            if has_args:
                return gx.minimize(fn, jnp.zeros(3), QUICK, args=(a, labels), has_aux=True)
            return gx.minimize(lambda w: fn(w, a, labels), jnp.zeros(3), QUICK, has_aux=True)

        a = jnp.asarray([1.0, 2.0, 3.0])
        loss = jax.jit(lambda a, labels: jnp.sum(f(a, labels).aux["twice"]))
        np.testing.assert_allclose(jax.grad(loss)(a, labels), 4 * a, rtol=1e-4)
    _, moved = jax.jvp(lambda a: f(a, labels), (a,), (jnp.ones(3),))
    np.testing.assert_allclose(moved.aux["twice"], 4 * a, rtol=1e-4)
    assert moved.grad_norm == 0


# -- singular and indefinite Hessians


@pytest.mark.usefixtures("x64")
def test_of_many_minima_the_solution_moves_least() -> None:
    """Two equal columns, one of zeros: the derivative is that of the pseudo-inverse."""
    x = np.stack([X[:, 0], X[:, 1], X[:, 0], np.zeros(12)], axis=1)
    squares = lambda w, y: jnp.sum((x @ w - y) ** 2)
    f = lambda y: gx.minimize(squares, jnp.zeros(4), gx.sgd(0.02), args=(y,), tol=1e-12).params
    expected = np.linalg.pinv(x)
    compare(jax.jit(jax.jacfwd(f))(Y), expected, 1e-10)
    # the cotangents of reverse mode have a part in the null space
    compare(jax.jit(jax.jacrev(f))(Y), expected, 1e-10)


def test_a_saddle_moves_as_its_equations_say() -> None:
    saddle = lambda w, a: (w[0] - a) ** 2 - (w[1] - 2 * a) ** 2
    f = lambda a: gx.minimize(saddle, jnp.asarray([1.0, 2.0]), QUICK, args=(a,), tol=1e-3).params
    np.testing.assert_allclose(jax.jacfwd(f)(1.0), [1, 2], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_complex_parameters() -> None:
    """z = a + b i solves (1 + t) z = c, where a + b i is the minimum of a quadratic."""
    c = jnp.asarray([1 + 2j, -0.5j])
    fn = lambda z, t: (1 + t) * jnp.sum(jnp.abs(z) ** 2) - 2 * jnp.sum(jnp.real(jnp.conj(c) * z))
    f = lambda t: gx.minimize(fn, jnp.zeros(2, complex), QUICK, args=(t,), tol=1e-12).params
    compare(jax.jvp(f, (1.0,), (1.0,))[1], -c / 4, 1e-10)
    loss = lambda t: jnp.sum(jnp.abs(f(t)) ** 4)
    compare(jax.grad(loss)(1.0), -4 * jnp.sum(jnp.abs(c) ** 4) / 32, 1e-10)


class Node:
    """A pytree node with an array as metadata, which JAX cannot compare."""

    def __init__(self, x: Any, scale: Any) -> None:
        self.x, self.scale = x, scale


jax.tree_util.register_pytree_node(
    Node, lambda node: ((node.x,), node.scale), lambda scale, children: Node(children[0], scale)
)


def test_parameters_in_a_node_that_cannot_be_compared() -> None:
    fn = lambda node, a: jnp.sum((node.scale * node.x - a) ** 2)
    start = Node(jnp.zeros(2), np.asarray([1.0, 2.0], np.float32))
    f = lambda a: gx.minimize(fn, start, gx.sgd(0.1), args=(a,)).params.x
    np.testing.assert_allclose(jax.jit(jax.jacfwd(f))(1.0), [1, 0.5], rtol=1e-4)


# -- precisions, devices, memory, programs


def test_narrow_parameters() -> None:
    scale = jnp.asarray([1.0, 5.0])
    fn = lambda w, a: jnp.sum((w.astype(jnp.float32) - a) ** 2 * scale)

    def f(a: jax.Array) -> jax.Array:
        return gx.minimize(fn, jnp.zeros(2, jnp.bfloat16), gx.sgd(0.1), args=(a,), tol=0.1).params

    derivative = jax.jacrev(f)(jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(derivative, jnp.eye(2), atol=0.02)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit] if LONG else [AxisType.Explicit]
)
def test_eight_devices_give_the_derivative_of_one(kind: AxisType) -> None:
    fn = lambda w, a, c: jnp.sum(jnp.cosh(w - a * c)) + 0.03 * jnp.sum(w) ** 2

    def loss(a: jax.Array, c: jax.Array, start: jax.Array) -> jax.Array:
        return jnp.sum(gx.minimize(fn, start, QUICK, args=(a, c), tol=1e-4).params ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    c, start = np.linspace(-1, 1, 64, dtype=np.float32), np.zeros(64, np.float32)
    alone = gradient(1.0, c, start)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        divided = gradient(1.0, *jax.device_put((c, start), sharding))
    assert divided[1].sharding.is_equivalent_to(sharding, 1)
    for x, y in zip(jax.device_get(divided), jax.device_get(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_a_million_parameters_take_twenty_vectors() -> None:
    fn = lambda x, a: jnp.sum(jnp.cosh(x - a)) + 0.5 * jnp.sum((x[1:] - x[:-1]) ** 2)

    def loss(a: jax.Array, start: jax.Array) -> jax.Array:
        return jnp.sum(gx.minimize(fn, start, gx.sgd(0.1), args=(a,)).params ** 2)

    vector = jax.ShapeDtypeStruct((10**6,), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(vector, vector).compile().memory_analysis()
    assert memory is not None
    assert 0 < memory.temp_size_in_bytes <= 20 * 4 * 10**6


def test_a_solve_that_is_not_differentiated_is_the_same_program() -> None:
    def lowered(derivative: Any) -> str:
        return jax.jit(lambda theta: solve(theta, derivative=derivative)).lower(theta).as_text()

    theta = jnp.asarray(THETA)
    text = lowered("implicit")
    assert text == lowered(None)
    assert text.count("stablehlo.while") == lowered("unrolled").count("stablehlo.while") - 1
    before = jax.jit(lambda theta: jnp.exp(theta)).lower(theta).as_text()
    assert text.count("stablehlo.exponential") == before.count("stablehlo.exponential")


def test_the_derivative_is_compiled_once() -> None:
    traces = []

    def fn(w: jax.Array, a: jax.Array) -> jax.Array:
        traces.append(0)
        return jnp.sum((w - a) ** 2)

    gradient = jax.grad(lambda a: jnp.sum(gx.minimize(fn, jnp.zeros(2), QUICK, args=(a,)).params))
    gradient(jnp.asarray([1.0, 2.0]))
    first = len(traces)
    for a in (3.0, 4.0):
        np.testing.assert_allclose(gradient(jnp.asarray([a, a])), 1, rtol=1e-4)
    assert len(traces) == first


def test_no_tracer_is_kept() -> None:
    with jax.check_tracer_leaks():
        solve = lambda a: gx.minimize(lambda w: (w - a) ** 2, 0.0, gx.sgd(0.1), tol=1e-3).params
        assert abs(jax.jit(jax.grad(solve))(1.0) - 1) < 1e-3
        if LONG:
            assert abs(jax.grad(jax.jit(solve))(1.0) - 1) < 1e-3


# -- the steps themselves


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tx", [gx.momentum(0.1, 0.5), *([gx.newton()] if LONG else [])])
def test_unrolled_steps_have_the_same_derivative_after_convergence(tx: Any) -> None:
    theta = jnp.asarray(THETA)
    f = lambda theta, **options: number(solve(theta, tx, tol=1e-9, **options))
    expected = jax.grad(lambda theta: number(solve(theta)))(theta)
    unrolled = functools.partial(f, derivative="unrolled", max_steps=60)
    np.testing.assert_allclose(jax.grad(unrolled)(theta), expected, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_unrolled_steps_have_the_derivative_of_the_steps() -> None:
    def by_hand(w: jax.Array, a: jax.Array) -> jax.Array:
        for _ in range(3):
            w = w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.cosh(w - a)))(w)
        return jnp.sum(w**2)

    def unrolled(w: jax.Array, a: jax.Array) -> jax.Array:
        fn, tx = lambda w: jnp.sum(jnp.cosh(w - a)), gx.sgd(0.1)
        return jnp.sum(gx.minimize(fn, w, tx, max_steps=3, derivative="unrolled").params ** 2)

    arguments = jnp.asarray([0.3, -1.0]), jnp.asarray([1.0, 0.5])
    compare(jax.grad(unrolled, (0, 1))(*arguments), jax.grad(by_hand, (0, 1))(*arguments), 1e-14)


def test_what_cannot_be_unrolled_says_so() -> None:
    theta = jnp.asarray(THETA)
    with pytest.raises(ValueError, match=r"^minimize\(max_steps=Array.*pass a Python integer"):
        solve(theta, derivative="unrolled", max_steps=jnp.asarray(3))
    tx = gx.trust_region("steihaug")
    f = lambda theta: number(solve(theta, tx, derivative="unrolled", max_steps=2))
    with pytest.raises(NotImplementedError, match=r"^trust_region.* contains a loop"):
        jax.eval_shape(jax.grad(f), theta)
