"""Derivatives through updates: finite, and those of finite differences.

One compilation a method here; ``GRADXFORM_LONG=1`` adds the other paths and forward mode.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import gradxform as gx
from gradxform.derivatives import eigh
from tests.methods import METHODS, one_of_each, step
from tests.thinning import LONG, every

A = jnp.asarray([[2.0, 0.5, 0.1], [0.5, 3.0, -0.3], [0.1, -0.3, 1.0]])


def bowl(x: jax.Array) -> jax.Array:
    return 0.5 * x @ A.astype(x.dtype) @ x + 0.1 * jnp.sum(x**4) - x[0] - 0.3 * x[1] + 0.2 * x[2]


def valley(x: jax.Array) -> jax.Array:
    """Rosenbrock's, with one more variable: its first trials are rejected."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + (x[2] - x[0] * x[1]) ** 2


def saddle(x: jax.Array) -> jax.Array:
    bent = x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    return bent + 0.3 * x[0] * x[1] * x[2] + 0.5 * x[2] ** 2


class Path(NamedTuple):
    """Where updates lead that are differentiated."""

    value_fn: Callable[[jax.Array], jax.Array]
    start: tuple[float, float, float]
    updates: int


PATHS = {
    "accepted": Path(bowl, (1.0, -2.0, 0.5), 3),
    "rejected": Path(valley, (-1.2, 1.0, 0.3), 10),
    "saddle": Path(saddle, (1.0, 0.2, 0.4), 6),
    "converged": Path(bowl, (1.0, -2.0, 0.5), 30),
}
DIRECTION, WEIGHTS = (0.3, 0.9, -0.5), (1.0, -0.7, 0.4)

FORWARD_ONLY = (
    "trust_region_steihaug",
    "trust_region_bounded",
    "trust_region_steihaug_bounded",
    "levenberg_marquardt_bounded",
    "hessian_free",
)
# derivatives are those of an exact section or solve, so that must be nearly one
CHANGES: dict[str, dict[str, float]] = {
    "coordinate_descent": {"tol": 1e-12},
    "coordinate_descent_random": {"tol": 1e-12},
    "coordinate_descent_greedy_leaf": {"tol": 1e-12},
    "newton_cg": {"tol": 1e-12, "maxiter": 50},
    "hessian_free": {"maxiter": 2},  # no iteration of CG among rounding errors
}
# of differences: a section's end is known to its resolution alone
WIDTHS = {"coordinate_descent": 6e-4, "hessian_free": 2e-6}
# rules that change sign within rounding of the minimum lead from there anywhere
UNSETTLED = ("rmsprop", "rmsprop_momentum", "rmsprop_nesterov", "adadelta", "adam")


def cases() -> list[Any]:
    found = []
    for name in one_of_each(2):
        for path in PATHS if LONG else ("rejected",):
            settled = not (path == "converged" and name in UNSETTLED)
            # CG ends at negative curvature; the derivative is that of the exact solution
            linear = not (path == "saddle" and name == "newton_cg")
            if settled and linear:
                found.append(pytest.param(name, path, id=f"{name}-{path}"))
    return found


def build(name: str, path: str) -> optax.GradientTransformationExtraArgs:
    method = METHODS[name]
    changes: dict[str, float] = dict(CHANGES.get(name, {}))
    if path == "rejected" and method.has_rate and not method.dense and name != "newton_cg":
        changes["learning_rate"] = 1e-3  # steeper than these are made for
    return optax.with_extra_args_support(method.build(**changes))


def end(name: str, path: str) -> Callable[[jax.Array], jax.Array]:
    """A number that depends on the start: of the accepted point and, before the end, the trial."""
    tx, (value_fn, _, updates) = build(name, path), PATHS[path]
    trial = 0.0 if path == "converged" else 1.0

    def number(start: jax.Array) -> jax.Array:
        def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            return step(tx, *carry, value_fn), None

        (params, state), _ = jax.lax.scan(body, (start, tx.init(start)), length=updates)
        return (trial * params + gx.eval_params(state, params)) @ jnp.asarray(WEIGHTS)

    return number


def finite_difference(f: Callable[[jax.Array], jax.Array], x: jax.Array, h: float) -> float:
    """The derivative along DIRECTION, to fourth order in h."""
    v = h * jnp.asarray(DIRECTION)
    near, far = f(x + v) - f(x - v), f(x + 2 * v) - f(x - 2 * v)
    return float((8 * near - far) / (12 * h))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "path"), every(2, cases()))
def test_derivatives_are_those_of_finite_differences(name: str, path: str) -> None:
    number, start = end(name, path), jnp.asarray(PATHS[path].start)
    reverse = jax.value_and_grad(number)
    h = next((h for part, h in WIDTHS.items() if name.startswith(part)), 1e-5)
    along = jnp.asarray(DIRECTION)
    ways: list[Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = []
    if name in FORWARD_ONLY or LONG:
        ways.append(lambda x: jax.jvp(number, (x,), (along,)))
    if name not in FORWARD_ONLY:
        ways.append(lambda x: jax.tree.map(lambda y: y @ along if y.ndim else y, reverse(x)))
    for way in map(jax.jit, ways):
        derivative = way(start)[1]
        expected = finite_difference(lambda x, way=way: way(x)[0], start, h)
        assert jnp.isfinite(derivative)
        assert abs(derivative - expected) <= 1e-6 * max(1, abs(expected))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_what_cannot_be_reversed_says_what_to_use(name: str) -> None:
    line = r"cannot reverse such a loop: use forward mode"
    method = "trust_region" if "trust_region" in name else name.removesuffix("_bounded")
    with pytest.raises(NotImplementedError, match=rf"^{method}.*{line}"):
        jax.eval_shape(jax.grad(end(name, "accepted")), jnp.asarray(PATHS["accepted"].start))


def test_forward_only_passes_every_other_transformation() -> None:
    tx = gx.trust_region("steihaug")

    def moved(x: jax.Array) -> jax.Array:
        return step(tx, x, tx.init(x), bowl)[0]

    x = jnp.asarray([1.0, -2.0, 0.5])
    assert jax.eval_shape(jax.vmap(jax.jacfwd(moved)), jnp.stack([x, x])).shape == (2, 3, 3)
    assert jax.eval_shape(jax.jacfwd(jax.jacfwd(moved)), x).shape == (3, 3, 3)
    assert jax.eval_shape(jax.jit(jax.checkpoint(moved)), x).shape == (3,)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("values", [(1.0, -2.0, 3.0), (2.0, 2.0, -2.0), (-1.0, -1.0, -1.0)])
def test_newton_with_equal_eigenvalues(values: tuple[float, float, float]) -> None:
    """A definite Hessian takes one way, an indefinite one the other."""
    tx = gx.scale_by_newton(floor=0.4)
    x = jnp.asarray([0.3, -0.2, 0.5])

    def direction(x: jax.Array) -> jax.Array:
        def value_fn(y: jax.Array) -> jax.Array:  # all eigenvalues change, and vectors turn
            bent = (y - 0.3) * (y[::-1] + 0.2) * (y - 0.5)
            return 0.5 * jnp.sum(jnp.asarray(values) * y**2) + jnp.sum(bent * y)

        gradient = jax.grad(value_fn)(x)
        found, _ = tx.update(gradient, tx.init(x), x, value_fn=value_fn)
        return jnp.vdot(jnp.asarray(found), jnp.asarray(WEIGHTS))

    reverse = jax.jit(jax.value_and_grad(direction))
    for start in (x, jnp.zeros(3)):
        expected = finite_difference(lambda x: reverse(x)[0], start, 1e-4)
        assert abs(reverse(start)[1] @ jnp.asarray(DIRECTION) - expected) < 1e-6


@pytest.mark.usefixtures("x64")
def test_derivatives_of_a_matrix_with_equal_eigenvalues() -> None:
    """p of (H + λI)p = −g by the eigenvectors, where H is a multiple of the identity."""

    def solve(t: jax.Array) -> jax.Array:
        values, vectors = eigh((2 + t) * jnp.eye(3))
        return vectors @ ((vectors.T @ jnp.ones(3)) / (values + 1)) @ jnp.asarray(WEIGHTS)

    assert jnp.allclose(jax.grad(solve)(0.0), -sum(WEIGHTS) / 9)


@pytest.mark.parametrize("tx", [gx.bfgs(), gx.lbfgs(), gx.nonlinear_cg(), gx.trust_region()])
def test_reverse_mode_through_minimums_and_zero_gradients_is_finite(
    tx: optax.GradientTransformationExtraArgs,
) -> None:
    def after(x: jax.Array) -> jax.Array:
        state = tx.init(x)
        for _ in range(2):
            x, state = step(tx, x, state, lambda x: jnp.sum(jnp.square(x)))
        return gx.eval_params(state, x) @ jnp.asarray([1.0, 2.0])

    gradient = jax.jit(jax.grad(after))
    for start in ([0.0, 1.0], [0.0, 0.0]):
        assert jnp.isfinite(gradient(jnp.asarray(start))).all()
