"""Derivatives by forward mode alone, of functions that JAX can and cannot reverse."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from tests.thinning import every

TIMES = np.linspace(0.2, 2.0, 7)


def smooth(p: Any, x: jax.Array, shift: Any = 0.0) -> jax.Array:
    """A function that both modes can differentiate."""
    hidden = jnp.tanh(x @ p["w"] + p["b"] + shift)
    return jnp.sum(hidden**2) + jnp.prod(p["b"]) * jnp.sum(jnp.exp(p["w"]))


def smooth_params() -> Any:
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}


def decay(p: Any, until: jax.Array) -> jax.Array:
    """y′ = −k y − q y² from y = a at 0 until a time, in Heun steps of adaptive length."""

    def slope(y: jax.Array) -> jax.Array:
        return -p["k"] * y - p["q"] * y**2

    def body(state: Any) -> Any:
        t, y = state
        h = jnp.minimum(0.02 / (0.1 + jax.lax.stop_gradient(jnp.abs(slope(y)))), until - t)
        middle = y + h * slope(y)
        return t + h, y + h / 2 * (slope(y) + slope(middle))

    start = (jnp.zeros_like(until), p["a"] + jnp.zeros_like(until))
    return jax.lax.while_loop(lambda state: state[0] < until, body, start)[1]


TRUE = {"a": 1.5, "k": 0.8, "q": 0.4}


def measured() -> jax.Array:
    truth = jax.tree.map(jnp.asarray, TRUE)
    return jax.jit(jax.vmap(lambda t: decay(truth, t)))(jnp.asarray(TIMES))


def misfit(p: Any, times: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(lambda t: decay(p, t))(times) - y) ** 2)


def close(actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: jax.value_and_grad(f),
        lambda f: jax.grad(f, argnums=(0, 1)),
        lambda f: jax.hessian(f),
        lambda f: jax.jacrev(jax.grad(f)),
        lambda f: lambda p, x: jax.jvp(lambda p: jax.grad(f)(p, x), (p,), (p,)),
        lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (x + 1,)),
        lambda f: jax.grad(lambda p, x: jnp.sum(jax.grad(f)(p, x)["w"] ** 3)),
        lambda f: jax.vmap(jax.grad(lambda p, x: f(p, x[None])), in_axes=(None, 0)),
        lambda f: jax.grad(lambda p, x: jnp.sum(jax.vmap(lambda x: f(p, x[None]))(x) ** 2)),
        lambda f: lambda p, x: jax.grad(lambda x: f(p, x, shift=jnp.sum(x)))(x),
    ],
    ids=[
        *("value_and_grad", "argnums", "hessian", "reverse over reverse", "product", "jvp"),
        *("third", "vmap of grad", "grad of vmap", "keyword"),
    ],
)
def test_derivatives_are_those_of_reverse_mode(derivative: Any, x64: None) -> None:
    p, x = smooth_params(), jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    close(jax.jit(derivative(gx.forward_mode(smooth)))(p, x), jax.jit(derivative(smooth))(p, x))


def test_complex_arguments_and_results(x64: None) -> None:
    def fn(z: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        phase = jnp.exp(1j * c) * z**3
        return jnp.sum(jnp.abs(phase - (1 + 2j)) ** 2 * c), phase

    z, c = jnp.asarray([0.5 + 1j, -1.0 + 0.25j]), jnp.asarray([0.3, 0.7])
    for argnums in ((0, 1), 0, 1):
        gradient = lambda f, k=argnums: jax.grad(lambda *x: f(*x)[0], argnums=k)(z, c)
        close(gradient(gx.forward_mode(fn)), gradient(fn))
    pull = lambda f: jax.vjp(lambda z: f(z, c)[1], z)[1](z + 1)
    close(pull(gx.forward_mode(fn)), pull(fn))


def test_a_loop_that_reverse_mode_refuses(x64: None) -> None:
    p, y = {"a": 1.0, "k": 1.0, "q": 0.1}, measured()
    p, times = jax.tree.map(jnp.asarray, p), jnp.asarray(TIMES)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(misfit)(p, times, y)
    fn = gx.forward_mode(misfit)
    close(jax.jit(jax.grad(fn))(p, times, y), jax.jit(jax.jacfwd(misfit))(p, times, y))
    expected = jax.jit(jax.jacfwd(jax.jacfwd(misfit)))(p, times, y)
    close(jax.jit(jax.hessian(fn))(p, times, y), expected)


def test_a_rule_that_cannot_be_transposed(x64: None) -> None:
    """x² by a rule that finds the tangent 2 x t in a loop."""

    @jax.custom_jvp
    def square(x: jax.Array) -> jax.Array:
        return x**2

    @square.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x,), (t,) = primals, tangents
        twice = jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + x * t), (0, 0 * t)
        )
        return square(x), twice[1]

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(square)(3.0)
    close(jax.grad(gx.forward_mode(square))(3.0), 6.0)


METHODS = {
    "bfgs": gx.bfgs,
    "lbfgs": gx.lbfgs,
    "newton_cg": lambda: gx.with_line_search(gx.scale_by_newton_cg()),
    "trust_region": gx.trust_region,
}


@pytest.mark.parametrize("name", every(2, METHODS))
def test_minimize_fits_a_simulation(name: str, x64: None) -> None:
    args = (jnp.asarray(TIMES), measured())
    start = {"a": 1.0, "k": 0.5, "q": 0.1}
    solution = gx.minimize(gx.forward_mode(misfit), start, METHODS[name](), args=args, tol=1e-9)
    assert gx.Status(int(solution.status)) == gx.Status.converged
    close(solution.params, TRUE, rtol=1e-3)


def test_gauss_newton_of_a_simulation(x64: None) -> None:
    model = gx.forward_mode(lambda p, t: jax.vmap(lambda t: decay(p, t))(t))
    fn = gx.compose(lambda f, y: jnp.mean((f - y) ** 2), model, t=jnp.asarray(TIMES), y=measured())
    tx = gx.trust_region(curvature=gx.gauss_newton())
    solution = gx.minimize(fn, {"a": 1.0, "k": 0.5, "q": 0.1}, tx, tol=1e-9)
    close(solution.params, TRUE, rtol=1e-4)


def test_minimize_compiles_once_for_a_function_wrapped_once() -> None:
    traces = []

    def fn(x: jax.Array, target: jax.Array) -> jax.Array:
        traces.append(None)
        return jnp.sum((x - target) ** 2)

    wrapped, counts = gx.forward_mode(fn), []
    for target in (1.0, 2.0, 3.0):
        solution = gx.minimize(wrapped, jnp.zeros(2), gx.sgd(0.5), args=(jnp.full(2, target),))
        np.testing.assert_allclose(solution.params, target)
        counts.append(len(traces))
    assert counts[0] == counts[2]


def test_only_what_is_differentiated_costs_a_pass() -> None:
    wrapped = gx.forward_mode(lambda p, data: jnp.sum((p[0] * data - p[1]) ** 2))
    gradient = jax.jit(jax.grad(wrapped)).lower(jnp.ones(2), jnp.ones(77)).as_text()
    assert "tensor<2x77xf32>" in gradient
    assert "77x77" not in gradient


def test_pairs_integers_and_whatever_is_no_array(x64: None) -> None:
    @gx.forward_mode
    def fn(p: Any, labels: Any, *, power: int, name: str = "sum") -> Any:
        assert name == "sum"
        value = jnp.sum(p["w"][labels] ** power)
        return value, {"count": jnp.sum(labels), "largest": jnp.max(p["w"])}

    p, labels = {"w": jnp.asarray([1.0, 2.0, 3.0])}, jnp.asarray([0, 2])
    (value, aux), grads = jax.jit(
        lambda p, labels: jax.value_and_grad(fn, has_aux=True)(p, labels, power=3)
    )(p, labels)
    close((value, aux["largest"], grads["w"]), (28.0, 3.0, jnp.asarray([3.0, 0.0, 27.0])))
    assert aux["count"] == 2
    assert aux["count"].dtype == jnp.int64
    solution = gx.minimize(
        gx.forward_mode(lambda x: (jnp.sum((x - 1) ** 2), x)), jnp.zeros(2), has_aux=True
    )
    close(solution.aux, jnp.ones(2), rtol=1e-6)


def test_closed_over_arrays_have_derivatives_too(x64: None) -> None:
    def outer(f: Any) -> Any:
        def value(c: jax.Array) -> jax.Array:
            inner = f(lambda x: jnp.sum(x**3 * c))
            return jax.grad(inner)(c * jnp.ones(2))[0] + inner(jnp.asarray(2.0))

        return value

    for c in (jnp.asarray(1.5), jnp.asarray([0.5, 2.0])):
        evaluate = lambda f, c=c: jax.vmap(jax.value_and_grad(outer(f)))(jnp.atleast_1d(c))
        close(evaluate(gx.forward_mode), evaluate(lambda f: f))


def test_without_derivatives_it_is_the_function_itself() -> None:
    seen = []

    def fn(x: Any, flag: Any) -> Any:
        seen.append(x)
        return "text" if flag else x  # neither an array nor traceable

    wrapped, x = gx.forward_mode(fn), jnp.ones(2)
    assert wrapped(x, True) == "text"
    assert wrapped(x, False) is x
    assert all(s is x for s in seen)
    assert inspect.signature(wrapped) == inspect.signature(fn)
    assert wrapped.__name__ == "fn"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_and_empty_leaves(dtype: str) -> None:
    p = {"a": jnp.ones(2, dtype), "none": jnp.zeros((0, 3), dtype), "f": jnp.ones((), jnp.float32)}
    fn = lambda p: jnp.sum(p["a"].astype(jnp.float32) * p["f"]) + jnp.sum(p["none"])
    grads = jax.grad(gx.forward_mode(fn))(p)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, p)
    chex.assert_trees_all_equal(grads, jax.grad(fn)(p))
