"""The table of methods. A method that has a row here is tested by the whole contract suite."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import gradxform as gx
from tests.thinning import LONG


class Method(NamedTuple):
    """One row: how to build the method and what to vary."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    numbers: dict[str, tuple[float, float]]  # every numeric hyperparameter: its value, another one
    options: Mapping[str, Any] = MappingProxyType({})  # the others
    needs: tuple[str, ...] = ()  # extra arguments of update
    dense: bool = False  # keeps a matrix over all parameters

    def build(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.arguments, **changes})

    @property
    def arguments(self) -> dict[str, Any]:
        return {**{name: first for name, (first, _) in self.numbers.items()}, **self.options}

    @property
    def has_rate(self) -> bool:
        return "learning_rate" in self.numbers


def average(learning_rate: float, decay: float, start: float) -> optax.GradientTransformation:
    return gx.polyak_average(gx.nesterov(learning_rate), decay=decay, start=start)


def hessian_free(
    progress: float,
    maxiter: float,
    warm_start: float,
    seed: float,
    iterates: int,
    damping: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Of any function: the default curvature is of composed ones."""
    return gx.hessian_free(
        curvature=gx.hessian(),
        damping=damping,
        progress=progress,
        maxiter=maxiter,
        warm_start=warm_start,
        seed=seed,
        iterates=iterates,
    )


def levenberg_marquardt(
    decrease: float,
    noise: float,
    columns: int,
    max_size: int,
    initial_radius: float | None = None,
    max_radius: float | None = None,
    bounds: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Of any function: the default curvature is of residuals."""
    return gx.levenberg_marquardt(
        curvature=gx.hessian(),
        initial_radius=initial_radius,
        max_radius=max_radius,
        decrease=decrease,
        noise=noise,
        columns=columns,
        max_size=max_size,
        bounds=bounds,
    )


def of_any_function(
    build: Callable[..., optax.GradientTransformationExtraArgs], **numbers: Any
) -> optax.GradientTransformationExtraArgs:
    """Of any function: the Kronecker methods take composed ones, so the model is the identity."""
    tx = build(**numbers)

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if callable(extra_args.get("value_fn")):
            extra_args["value_fn"] = gx.compose(extra_args["value_fn"], lambda params: params)
        return tx.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, cast(Any, update))


def kronecker(
    damping: float,
    min_damping: float,
    factor_every: float,
    inverse_every: float,
    adapt_every: float,
    decay: float,
    seed: float,
    max_dim: int,
    lanczos: int,
) -> optax.GradientTransformationExtraArgs:
    return of_any_function(gx.kronecker, **locals())


def scale_by_kronecker(
    learning_rate: float,
    damping: float,
    factor_every: float,
    inverse_every: float,
    decay: float,
    seed: float,
    max_dim: int,
    lanczos: int,
) -> optax.GradientTransformationExtraArgs:
    numbers = {name: x for name, x in locals().items() if name != "learning_rate"}
    return optax.chain(of_any_function(gx.scale_by_kronecker, **numbers), gx.sgd(learning_rate))


RATE = {"learning_rate": (0.05, 0.02)}
MOMENTUM = {"momentum": (0.9, 0.5)}
RMSPROP = {**RATE, "decay": (0.9, 0.8), "eps": (1e-6, 1e-2)}
SECTION = {"tol": (1e-6, 0.5), "max_newton_steps": (20, 1), "seed": (0, 3)}
SEARCH = {
    "decrease": (0.1, 0.3),
    "curvature": (0.9, 0.35),
    "noise": (1e-6, 1e-2),
    "max_trials": (30, 1),
}
TRUST = {"initial_radius": (1.0, 0.2), "decrease": (1e-4, 0.2), "noise": (1e-6, 1e-2)}

METHODS = {
    "sgd": Method(gx.sgd, RATE),
    "momentum": Method(gx.momentum, {**RATE, **MOMENTUM}),
    "nesterov": Method(gx.nesterov, {**RATE, **MOMENTUM}),
    "delta_bar_delta": Method(
        gx.delta_bar_delta,
        {**RATE, "kappa": (0.01, 0.02), "phi": (0.1, 0.5), "theta": (0.7, 0.3)},
    ),
    "rprop": Method(
        gx.rprop,
        {
            **RATE,
            "eta_minus": (0.5, 0.8),
            "eta_plus": (1.2, 1.5),
            "min_step_size": (1e-6, 0.2),
            "max_step_size": (50.0, 0.055),
        },
    ),
    "adagrad": Method(gx.adagrad, {**RATE, "eps": (1e-7, 1e-1)}),
    "rmsprop": Method(gx.rmsprop, RMSPROP),
    "rmsprop_momentum": Method(gx.rmsprop, {**RMSPROP, **MOMENTUM}),
    "rmsprop_nesterov": Method(gx.rmsprop, {**RMSPROP, **MOMENTUM}, {"nesterov": True}),
    "adadelta": Method(
        gx.adadelta, {"learning_rate": (1.0, 0.5), "rho": (0.95, 0.9), "eps": (1e-2, 1e-1)}
    ),
    "adam": Method(
        gx.adam,
        {**RATE, "b1": (0.9, 0.5), "b2": (0.999, 0.9), "eps": (1e-8, 0.1), "eps_root": (0.0, 0.1)},
    ),
    "coordinate_descent": Method(gx.coordinate_descent, SECTION, needs=("value_fn",)),
    "coordinate_descent_random": Method(
        gx.coordinate_descent, SECTION, {"order": "random"}, needs=("value_fn",)
    ),
    "coordinate_descent_greedy_leaf": Method(
        gx.coordinate_descent, SECTION, {"order": "greedy", "block": "leaf"}, needs=("value_fn",)
    ),
    "bfgs": Method(gx.bfgs, SEARCH, needs=("value",), dense=True),
    "lbfgs": Method(gx.lbfgs, SEARCH, {"memory_size": 2, "ravel": False}, needs=("value",)),
    "lbfgs_bounded": Method(
        gx.lbfgs,
        SEARCH,
        {"memory_size": 2, "ravel": False, "bounds": (-2.0, 3.0)},
        needs=("value",),
    ),
    "nonlinear_cg": Method(
        gx.nonlinear_cg,
        {**SEARCH, "curvature": (0.2, 0.4), "restart": (0.5, 0.2), "truncation": (0.4, 0.1)},
        {"beta": "hager_zhang", "ravel": False},
        needs=("value",),
    ),
    "newton": Method(
        gx.newton,
        {"learning_rate": (0.5, 0.2), "damping": (0.0, 2.0), "floor": (1e-4, 0.1)},
        {"columns": 4, "max_size": 100, "curvature": None},
        needs=("value_fn",),
        dense=True,
    ),
    "newton_cg": Method(
        gx.newton_cg,
        {
            "learning_rate": (0.5, 0.2),
            "damping": (0.0, 2.0),
            "tol": (0.3, 1e-3),
            "maxiter": (20, 1),
            "warm_start": (0.0, 0.5),
            "bound": (10.0, 1.0),
        },
        {"curvature": None, "forcing": "fixed", "preconditioner": None},
        needs=("value_fn",),
    ),
    "trust_region": Method(
        gx.trust_region,
        {**TRUST, "max_radius": (5.0, 0.3), "tol": (0.5, 0.1)},
        {"columns": 4, "max_size": 100, "curvature": None},
        needs=("value", "value_fn"),
        dense=True,
    ),
    "trust_region_steihaug": Method(
        gx.trust_region,
        {**TRUST, "tol": (0.1, 0.9), "maxiter": (20, 1)},
        {"solver": "steihaug", "columns": 4, "max_size": 1, "curvature": None},
        needs=("value", "value_fn"),
    ),
    "trust_region_bounded": Method(
        gx.trust_region,
        {**TRUST, "max_radius": (5.0, 0.3), "tol": (0.5, 0.1)},
        {"columns": 4, "max_size": 100, "curvature": None, "bounds": (-4.0, 4.0)},
        needs=("value", "value_fn"),
        dense=True,
    ),
    "trust_region_steihaug_bounded": Method(
        gx.trust_region,
        {**TRUST, "tol": (0.1, 0.9), "maxiter": (20, 1)},
        {"solver": "steihaug", "columns": 4, "max_size": 1, "bounds": (-4.0, 4.0)},
        needs=("value", "value_fn"),
    ),
    "levenberg_marquardt": Method(
        levenberg_marquardt,
        {"initial_radius": (1.0, 0.2), "max_radius": (5.0, 0.3), "decrease": (1e-4, 0.2)}
        | {"noise": (1e-6, 1e-2)},
        {"columns": 4, "max_size": 100},
        needs=("value", "value_fn"),
        dense=True,
    ),
    "levenberg_marquardt_bounded": Method(
        levenberg_marquardt,
        {"initial_radius": (1.0, 0.2), "max_radius": (5.0, 0.3), "decrease": (1e-4, 0.2)}
        | {"noise": (1e-6, 1e-2)},
        {"columns": 4, "max_size": 100, "bounds": (-4.0, 4.0)},
        needs=("value", "value_fn"),
        dense=True,
    ),
    "hessian_free": Method(
        hessian_free,
        {
            "damping": (1.0, 0.1),
            "progress": (5e-4, 1e-2),
            "maxiter": (5, 2),
            "warm_start": (0.95, 0.5),
            "seed": (0, 1),
        },
        {"iterates": 3},
        needs=("value", "value_fn"),
    ),
    "kronecker": Method(
        kronecker,
        {"damping": (0.1, 1.0), "min_damping": (1e-4, 0.5), "factor_every": (2, 3)}
        | {"inverse_every": (20, 3), "adapt_every": (5, 2), "decay": (0.98, 0.3), "seed": (0, 1)},
        {"max_dim": 4096, "lanczos": 3},
        needs=("value", "value_fn"),
        dense=True,
    ),
    "scale_by_kronecker": Method(
        scale_by_kronecker,
        {"learning_rate": (0.2, 0.1), "damping": (0.1, 1.0), "factor_every": (2, 3)}
        | {"inverse_every": (20, 3), "decay": (0.98, 0.3), "seed": (0, 1)},
        {"max_dim": 4096, "lanczos": 3},
        needs=("value", "value_fn"),
        dense=True,
    ),
    "polyak_average": Method(average, {**RATE, "decay": (0.9, 0.5), "start": (1, 0)}),
}


def one_of_each(turn: int = 0) -> list[str]:
    """A row of each factory, of several in turns: rows of one factory share most of their code.

    All rows in the long form.
    """
    if LONG:
        return list(METHODS)
    families: dict[Any, list[str]] = {}
    for name, method in METHODS.items():
        families.setdefault(method.factory, []).append(name)
    return [rows[turn % len(rows)] for rows in families.values()]


def nested_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Nested, with a scalar leaf, an empty subtree, a missing one and a leaf without entries."""
    return {
        "dense": {"kernel": jnp.asarray([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype)},
        "scale": jnp.asarray(1.5, dtype),
        "empty": {},
        "missing": None,
        "pair": (jnp.asarray([0.75, -0.5], dtype), jnp.zeros((0, 3), dtype)),
    }


def objective(params: Any) -> jax.Array:
    """A convex function that is not quadratic, with its minimum away from the axes."""
    leaves = [gx.tree.promote(x) for x in jax.tree.leaves(params)]
    return sum(
        jnp.sum((i + 1.0) * jnp.square(x - 0.3) + 0.05 * (x - 0.3) ** 4)
        for i, x in enumerate(leaves)
    ) + 0.1 * jnp.square(sum(jnp.sum(x) for x in leaves))


def step(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    value_fn: Callable[[Any], jax.Array] = objective,
) -> tuple[Any, Any]:
    """One turn of a stock training loop."""
    value, grads = jax.value_and_grad(value_fn)(params)
    updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
    return optax.apply_updates(params, updates), state


def run(
    tx: optax.GradientTransformation,
    params: Any,
    steps: int,
    value_fn: Callable[[Any], jax.Array] = objective,
) -> tuple[Any, Any]:
    """``steps`` turns in a scan; the last parameters and state."""

    def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        return step(tx, *carry, value_fn), None

    tx = optax.with_extra_args_support(tx)
    carry, _ = jax.lax.scan(body, (params, tx.init(params)), length=steps)
    return carry
