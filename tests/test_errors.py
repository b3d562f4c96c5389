"""Errors name the function that was called, the argument, its value and the mend, in one line."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import gradxform as gx
from gradxform.hyperparameters import shown
from tests.methods import METHODS

FUNCTIONS = {name: f for name in gx.__all__ if inspect.isfunction(f := getattr(gx, name))}
EVERY_METHOD = {name: method.build() for name, method in METHODS.items()}
WRAPPED = {
    "accumulate": gx.accumulate(gx.sgd(0.1), 2),
    "masked": gx.masked(gx.newton(), True),
    "partition": gx.partition({1: gx.lbfgs()}, 1),
    "inject_hyperparams": gx.inject_hyperparams(gx.adam)(0.1),
    "lbfgs ravelled": gx.lbfgs(),
}


class AcceptedError(Exception):
    """The checks let the arguments pass."""


def objective(params: Any) -> jax.Array:
    raise AcceptedError


REQUIRED = {
    **dict.fromkeys(("tx", "direction", "inner", "opt"), gx.sgd(0.1)),
    **dict.fromkeys(("learning_rate", "init_value", "end_value", "decay"), 0.1),
    **{"transition_steps": 3, "every_k_schedule": 2, "mask": True, "param_labels": "a"},
    **{"rtol": 0.1, "value": 1.0, "number": 5, "strength": 0.1},
    **{"projection": jnp.tanh, "prox": lambda params, step: params},
    **{"transforms": {"a": gx.sgd(0.1)}, "inner_factory": gx.sgd, "fn": objective},
    **{"residuals": objective, "residual": objective},
    **{"params": jnp.zeros(2), "loss": jnp.sum, "model": jnp.tanh, "state": optax.EmptyState()},
}
# what depends on the parameters is checked when these are known
UNCHECKED = {
    "mask",
    "param_labels",
    "state",
    "model",
    "data",
    "options",
    "file",
    "wrt",
    "params",
    "aux",
    "resume",
} | {"hyperparam_dtype"}
BAD = [
    *(None, "a", [1], {}, 1j, object(), objective, float("nan"), float("inf"), -1, 10**400, True),
    *(np.ones(2), np.int64(-1), np.float64("nan"), np.complex64(1), np.array("a"), np.array(-1.0)),
    *(jnp.ones(2), jnp.asarray(1j), jnp.asarray(True)),
]
ARGUMENTS = [
    (name, argument)
    for name, function in FUNCTIONS.items()
    for argument in inspect.signature(function).parameters
    if not (name == "eval_params" or argument in UNCHECKED)
]


def call(name: str, changes: dict[str, Any]) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    variadic = inspect.Parameter.VAR_KEYWORD
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not variadic]
    given = {**{key: REQUIRED[key] for key in needed}, **changes}
    positional = [given.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    FUNCTIONS[name](*positional, **given)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_bad_argument_is_refused_by_function_argument_and_value(name: str, argument: str) -> None:
    refused = []
    for bad in BAD:
        try:
            call(name, {argument: bad})
        except (TypeError, ValueError) as error:
            message = str(error)
            assert message.startswith(f"{name}({argument}="), message
            assert shown(bad) in message
            assert "\n" not in message
            refused.append(repr(bad))
        except AcceptedError:
            pass
    assert repr(jnp.ones(2)) in refused
    assert any(repr(x) in refused for x in (-1, "a"))


def test_a_number_may_be_of_any_kind_and_an_array_is_not_looked_into() -> None:
    for good in (1, 0.5, np.float32(0.5), np.int8(1), np.array(0.5), jnp.asarray(-1.0)):
        gx.sgd(good)
    jax.jit(lambda rate: gx.sgd(rate).init(0.0))(-1.0)
    gx.lbfgs(np.int64(3))
    with pytest.raises(TypeError, match=r"sgd\(\) got an unexpected keyword argument 'rate'"):
        gx.sgd(rate=0.1)  # pyright: ignore[reportCallIssue]


def test_hyperparameters_are_kept_in_a_floating_point_dtype() -> None:
    for bad in (int, "float33", 3, {}):
        with pytest.raises(TypeError, match=r"^inject_hyperparams\(hyperparam_dtype=.*dtype"):
            gx.inject_hyperparams(gx.sgd, hyperparam_dtype=bad)
    gx.inject_hyperparams(gx.sgd, hyperparam_dtype="float32")


@pytest.mark.parametrize("bad", [lambda k: "a", lambda k: jnp.ones(2), lambda k: None, gx.sgd])
def test_a_schedule_must_return_one_number(bad: Callable[..., Any]) -> None:
    tx, x = gx.adam(bad), jnp.ones(2)
    with pytest.raises(TypeError, match=r"learning_rate=.*"):
        tx.update(x, tx.init(x))


# -- what update needs, by the name of the function that made the method

WITH_PARAMS = {
    "scale_by_newton": gx.scale_by_newton(),
    "scale_by_newton_cg": gx.scale_by_newton_cg(),
    "scale_by_bfgs": gx.scale_by_bfgs(),
    "scale_by_lbfgs": gx.scale_by_lbfgs(),
    "with_line_search": gx.with_line_search(gx.scale_by_newton()),
    "polyak_average": gx.polyak_average(gx.sgd(0.1)),
    "rounded_stochastically": gx.rounded_stochastically(gx.sgd(0.1)),
    "projected": gx.projected(gx.sgd(0.1), jnp.tanh),
    "proximal": gx.proximal(gx.sgd(0.1), gx.soft_threshold(0.1)),
    **{
        name: getattr(gx, name)()
        for name in ("newton", "newton_cg", "hessian_free", "trust_region", "coordinate_descent")
    },
    **{name: getattr(gx, name)() for name in ("bfgs", "lbfgs", "nonlinear_cg")},
}


NEEDS_PARAMS_ALONE = (
    *("scale_by_bfgs", "scale_by_lbfgs", "polyak_average"),
    *("rounded_stochastically", "projected", "proximal"),
)


@pytest.mark.parametrize("name", WITH_PARAMS)
def test_update_names_the_function_that_made_the_method(name: str) -> None:
    tx, x = WITH_PARAMS[name], jnp.ones(2)
    state = tx.init(x)
    with pytest.raises(ValueError, match=rf"^{name} needs params=…"):
        tx.update(x, state)
    with pytest.raises(
        ValueError, match=rf"^{name}: update got params that differ .*\(3,\).*\(2,\)"
    ):
        tx.update(x, state, jnp.ones(3))
    if name not in NEEDS_PARAMS_ALONE:
        with pytest.raises(ValueError, match=rf"^{name} needs value(_fn)?=…"):
            tx.update(x, state, x)


def test_a_part_names_the_whole_that_was_called() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))
    for name in ("bfgs", "lbfgs", "nonlinear_cg", "scale_by_bfgs", "scale_by_lbfgs"):
        if name.startswith("scale_by"):
            with pytest.raises(ValueError, match=rf"^{name}\(ravel=True\)"):
                getattr(gx, name)().init(x)
        else:
            with pytest.raises(ValueError, match=rf"^{name}\(ravel=True\)"):
                getattr(gx, name)().init(x)
    for name in ("newton", "scale_by_newton"):
        with pytest.raises(ValueError, match=rf"^{name}\(max_size=1\)"):
            getattr(gx, name)(max_size=1).init(x)
    wrong = lambda product, g, count: (lambda r: r[:1], 0)
    f = lambda x: jnp.sum(x**2)
    for name in ("newton_cg", "scale_by_newton_cg"):
        tx = getattr(gx, name)(preconditioner=wrong)
        with pytest.raises(ValueError, match=rf"^{name}\(preconditioner=…\).*\(2,\).*\(1,\)"):
            jax.eval_shape(lambda x, tx=tx: tx.update(x, tx.init(x), x, value_fn=f), jnp.ones(2))
    with pytest.raises(ValueError, match=r"^hessian_free needs to know.*gx\.compose"):
        gx.minimize(f, jnp.ones(2), gx.hessian_free())
    with pytest.raises(ValueError, match=r"^partition\(param_labels=…\).*structure"):
        gx.partition({1: gx.sgd(0.1)}, {"a": 1}).init(jnp.ones(2))
    with pytest.raises(TypeError, match=r"^partition\(transforms\[1\]=3\): expected a method"):
        gx.partition({1: 3}, 1)  # pyright: ignore[reportArgumentType]


# -- what does not fit in init and update


@pytest.mark.parametrize("tx", [*EVERY_METHOD.values(), *WRAPPED.values()])
def test_a_leaf_that_is_no_real_array_is_refused_by_its_path(tx: Any) -> None:
    for bad in (jax.nn.relu, "a", object()):
        with pytest.raises(TypeError, match=r"params\['f'\] is .* no array: .*eqx\.filter"):
            tx.init({"w": jnp.ones(2), "f": bad})
    for dtype in (jnp.float8_e4m3fn, jnp.float4_e2m1fn):
        with pytest.raises(TypeError, match=rf"params\['w'\] has dtype {dtype.dtype}.*bfloat16"):
            tx.init({"w": jnp.zeros(2, dtype)})
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype int4"):
        tx.init({"w": jnp.zeros(2, jnp.int4)})
    tx.init({"w": 1.0, "b": np.ones(2, np.float32)})  # Python floats and NumPy arrays are right


@pytest.mark.parametrize("bad", [jax.nn.relu, "a", jnp.zeros(2, jnp.float8_e5m2), True, 3])
def test_minimize_refuses_such_a_leaf_too(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^minimize: params\['f'\] "):
        gx.minimize(objective, {"w": jnp.ones(2), "f": bad})


PARAMS = {"a": jnp.ones(2), "b": jnp.ones((2, 3))}
VALUE_FN = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)
STATEFUL = {k: tx for k, tx in EVERY_METHOD.items() if k not in ("sgd", "newton")}
STATEFUL = {k: tx for k, tx in STATEFUL.items() if not k.startswith("coordinate")}


def update(tx: Any, grads: Any, state: Any, params: Any, value_fn: Any = VALUE_FN) -> None:
    arguments = {"value": jnp.asarray(1.0), "value_fn": value_fn}
    tx = optax.with_extra_args_support(tx)
    jax.eval_shape(lambda: tx.update(grads, state, params, **arguments))


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_update_refuses_gradients_that_are_not_floating_point(name: str) -> None:
    tx = EVERY_METHOD[name]
    for bad in (jnp.ones(2, int), jnp.ones(2, bool), "x"):
        with pytest.raises(TypeError, match=r"^update: grads\['a'\] (is|has)"):
            update(tx, {**PARAMS, "a": bad}, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", STATEFUL)
def test_update_refuses_a_state_of_other_parameters_in_one_line(name: str) -> None:
    tx = STATEFUL[name]
    fewer, longer = {"a": PARAMS["a"]}, {**PARAMS, "a": jnp.ones(3)}
    value_fn = lambda p: jnp.sum(p["a"] ** 2)
    for other in (fewer, longer):
        with pytest.raises(ValueError, match=r"^(update: the state|The number of).*") as caught:
            update(tx, other, tx.init(PARAMS), other, value_fn)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="state"):
        update(tx, PARAMS, optax.EmptyState(), PARAMS)


def test_an_error_of_the_objective_passes_through_update() -> None:
    for tx in (gx.newton(), gx.masked(gx.newton_cg(), True), gx.accumulate(gx.newton(), 2)):
        with pytest.raises(AcceptedError):
            update(tx, PARAMS, tx.init(PARAMS), PARAMS, objective)
        with pytest.raises(TypeError, match=r"^value_fn=3: expected a function"):
            update(tx, PARAMS, tx.init(PARAMS), PARAMS, 3)


def test_eval_params_says_that_the_parameters_are_not_those_of_init() -> None:
    state = gx.nesterov(0.1).init({"w": jnp.ones(2), "f": None})
    with pytest.raises(ValueError, match="the parameters and the optimiser state have different"):
        gx.eval_params(state, {"w": jnp.ones(2), "f": jax.nn.relu})


# -- minimize and compose


def test_resume_says_what_differs() -> None:
    start = {"a": jnp.zeros(2)}
    f = lambda p: jnp.sum((p["a"] - 1) ** 2)
    tx = gx.momentum(0.1)
    first = gx.minimize(f, start, tx, max_steps=2)
    solve = lambda c: gx.minimize(lambda p: jnp.sum((p["a"] - c) ** 2), start, tx, max_steps=2)
    batch = jax.vmap(solve)(jnp.ones(4))
    half = {"a": jnp.zeros(2, jnp.bfloat16)}
    for params, method, resume, message in [
        (start, gx.sgd(0.1), first, r"from a call with other tx: the leaf \.velocity\['a'\]"),
        ({"a": jnp.zeros(3)}, tx, first, r"other params: shape \(2,\) against \(3,\) at \['a'\]"),
        (half, tx, first, r"other params: dtype float32 against bfloat16"),
        ({"b": jnp.zeros(2)}, tx, first, r"other params: the leaf \['a'\]"),
        (start, tx, batch, r"holds 4 runs of a jax\.vmap"),
        (start, tx, 3, r"expected a Solution"),
        (start, tx, first.params, r"expected a Solution"),
    ]:
        with pytest.raises((TypeError, ValueError), match=rf"^minimize\(resume=.*{message}"):
            gx.minimize(f, params, method, resume=resume)
    # of the new start its form alone is used
    again = gx.minimize(f, {"a": 9 + start["a"]}, tx, max_steps=4, resume=first)
    straight = gx.minimize(f, start, tx, max_steps=4)
    assert jnp.array_equal(again.params["a"], straight.params["a"])


def test_has_aux_needs_a_pair() -> None:
    for result in (jnp.asarray(1.0), (jnp.asarray(1.0),)):
        with pytest.raises(ValueError, match=r"^minimize\(has_aux=True\): fn must return a pair"):
            gx.minimize(lambda x, result=result: result, 0.0, gx.sgd(0.1), has_aux=True)


def test_data_by_position_alone_are_refused_where_they_are_bound() -> None:
    def model(params: Any, x: Any, /) -> Any:
        return params * x

    with pytest.raises(TypeError, match="model takes x only by position: remove the /"):
        gx.compose(jnp.sum, model, x=jnp.ones(2))
    tx = gx.newton_cg()
    with pytest.raises(TypeError, match="model takes x only by position"):
        tx.update(1.0, tx.init(1.0), 1.0, value_fn=model, x=2.0)


def test_shown_is_one_short_line() -> None:
    for value in (jnp.ones((50, 50)), "a\nb" * 99, object()):
        assert re.fullmatch(r"[^\n]{1,60}", shown(value))
