"""The path of a method does not depend on the unit of the objective or of the parameters.

Units are powers of two, by which floating-point numbers are multiplied without rounding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
import pytest

import gradxform as gx
from gradxform.second_order.nonlinear_cg import Beta
from tests.methods import step
from tests.thinning import every


def objective(x: jax.Array) -> jax.Array:
    """Convex, with rejected trials on the way, its minimum away from 0."""
    bent = jnp.sum(jnp.asarray([1.0, 30.0, 4.0]) * (x - 0.5) ** 2) + jnp.sum((x - 0.5) ** 4)
    return bent + (x[0] * x[1] - x[2]) ** 2


class Invariance(NamedTuple):
    """What the theory of a method says of objectives c f(θ / s), from s θ₀."""

    build: Callable[[], optax.GradientTransformation]
    objective: bool = True  #: the path is the same for every c
    parameters: bool = True  #: the path is s times the path for s = 1


def hessian_free(preconditioner: Any = None) -> optax.GradientTransformation:
    return gx.hessian_free(curvature=gx.hessian(), maxiter=3, preconditioner=preconditioner)


def with_zeros(diagonal: Any) -> Any:
    """Preconditions by a diagonal estimate that is 0 somewhere."""

    def build(product: Any, like: Any, count: Any) -> Any:
        return diagonal(lambda v: jnp.asarray([1.0, 1.0, 0.0]) * product(v), like, count)

    return build


def preconditioned(preconditioner: Any) -> Callable[[], optax.GradientTransformation]:
    return lambda: gx.newton_cg(0.5, preconditioner=preconditioner, tol=1e-8)


#: Rates with a unit (sgd, momentum, nesterov, delta_bar_delta) follow neither, and are left out.
TABLE = {
    "adagrad": Invariance(lambda: gx.adagrad(0.05, eps=0.0), parameters=False),
    "rmsprop": Invariance(lambda: gx.rmsprop(0.05, eps=0.0), parameters=False),
    "adam": Invariance(lambda: gx.adam(0.05, eps=0.0), parameters=False),
    "coordinate_descent": Invariance(gx.coordinate_descent),
    "coordinate_descent_greedy": Invariance(lambda: gx.coordinate_descent(order="greedy")),
    "coordinate_descent_leaf": Invariance(lambda: gx.coordinate_descent(block="leaf")),
    "bfgs": Invariance(gx.bfgs),
    "lbfgs": Invariance(gx.lbfgs),
    "lbfgs_tree": Invariance(lambda: gx.lbfgs(ravel=False)),
    **{
        f"nonlinear_cg_{beta}": Invariance(functools.partial(gx.nonlinear_cg, beta))
        for beta in get_args(Beta)
    },
    "steepest_descent": Invariance(lambda: gx.with_line_search(optax.identity(), unit_step=False)),
    "newton": Invariance(gx.newton),
    "newton_search": Invariance(lambda: gx.with_line_search(gx.scale_by_newton())),
    "newton_cg": Invariance(lambda: gx.newton_cg(0.5)),
    "newton_cg_diagonal": Invariance(preconditioned(gx.hutchinson_diagonal(2))),
    "newton_cg_nystrom": Invariance(preconditioned(gx.nystrom(2))),
    "trust_region": Invariance(gx.trust_region),
    "trust_region_ball": Invariance(lambda: gx.trust_region(scaling="none")),
    "trust_region_steihaug": Invariance(lambda: gx.trust_region("steihaug")),
    "hessian_free": Invariance(hessian_free),
    "hessian_free_diagonal": Invariance(lambda: hessian_free(gx.hutchinson_diagonal(2))),
    "hessian_free_zeros": Invariance(
        lambda: hessian_free(with_zeros(gx.hutchinson_diagonal(2, floor=0.0)))
    ),
    "hessian_free_nystrom": Invariance(lambda: hessian_free(gx.nystrom(2))),
}
UNITS = [(c, 0) for c in (-66, 66)] + [(0, s) for s in (-33, 33)] + [(66, -33), (-66, 33)]
UPDATES = 8


def paths(tx: optax.GradientTransformation, units: list[tuple[int, int]]) -> jax.Array:
    """The accepted points over s, a row for each pair of powers c and s."""
    tx = optax.with_extra_args_support(tx)

    def path(c: jax.Array, s: jax.Array) -> jax.Array:
        value_fn = lambda x: c * objective(x / s)
        start = s * jnp.asarray([2.0, -1.0, 0.3])

        def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
            params, state = step(tx, *carry, value_fn)
            return (params, state), gx.eval_params(state, params)

        return jax.lax.scan(body, (start, tx.init(start)), length=UPDATES)[1] / s

    powers = 2.0 ** jnp.asarray(units, float)
    return jax.jit(jax.vmap(path))(powers[:, 0], powers[:, 1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", every(2, TABLE))
def test_paths_do_not_depend_on_units(name: str) -> None:
    row = TABLE[name]
    units = [(c, s) for c, s in UNITS if (row.objective or c == 0) and (row.parameters or s == 0)]
    usual, *others = paths(row.build(), [(0, 0), *units])
    assert jnp.max(jnp.abs(usual[-1] - usual[0])) > 0.01
    for unit, other in zip(units, others, strict=True):
        assert jnp.allclose(other, usual, rtol=1e-12, atol=1e-12), unit
