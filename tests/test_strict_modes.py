"""Every method under JAX's strict modes; ``GRADXFORM_LONG=1`` looks for leaks in every way.

``GRADXFORM_STRICT=rank_promotion`` (or ``dtype_promotion``, ``leaks``, ``nans``; see conftest.py)
runs any other test file in one of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import gradxform as gx
from tests.methods import METHODS, Method, nested_params, objective, one_of_each, run, step
from tests.thinning import LONG, every

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
# one row of each factory, or all
TRACED, MAPPED, LOOKED_AT = ([METHODS[name] for name in one_of_each(i)] for i in range(3))


LEAKS = tuple(METHODS) if LONG else ("adam", "lbfgs", "newton_cg", "trust_region_steihaug")


@contextlib.contextmanager
def strict(leaks: bool = LONG) -> Iterator[None]:
    """No ranks or dtypes are promoted unsaid; with ``leaks`` no tracer outlives its trace."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks() if leaks else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def finite() -> Iterator[None]:
    """Nothing computed is NaN or infinite, not even where it is masked."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def stacked(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)


# -- by tracing alone


@pytest.mark.parametrize("method", TRACED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"] if LONG else ["bfloat16"])
def test_traces_without_promotion(method: Method, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        tx, params = method.build(), nested_params(jnp.dtype(dtype))

        def all_ways(params: Any) -> Any:
            lanes = jax.vmap(lambda p: run(tx, p, 2))(stacked(params))
            return lanes, gx.minimize(objective, params, tx)

        with strict():
            jax.eval_shape(all_ways, params)


@pytest.mark.parametrize("name", LEAKS)
def test_an_update_leaks_no_tracer(name: str) -> None:
    tx, params = METHODS[name].build(), nested_params()
    with strict(leaks=True):
        jax.eval_shape(lambda p: step(tx, p, tx.init(p)), params)


def test_minimize_leaks_no_tracer() -> None:
    with strict(leaks=True):
        jax.eval_shape(lambda p: gx.minimize(objective, p, gx.sgd(0.1)), nested_params())


X, Y = jnp.ones((8, 3)), jnp.ones((8, 2))


def net(params: Any, x: jax.Array) -> jax.Array:
    bias = jnp.broadcast_to(params["bias"], (len(x), 2))
    return jnp.tanh(x @ params["kernel"] + bias)


def loss(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(outputs - y))


def net_params() -> Any:
    return {"kernel": jnp.full((3, 2), 0.1), "bias": jnp.full(2, 0.2)}


def split(label: str) -> Any:
    return {"kernel": label, "bias": "rest"}


#: What is not in the table of methods; each is run on a small net.
OTHERS: dict[str, Callable[[], Any]] = {
    "gauss_newton": lambda: gx.newton(damping=0.1, curvature=gx.gauss_newton()),
    "newton_cg_diagonal": lambda: gx.newton_cg(preconditioner=gx.hutchinson_diagonal()),
    "hessian_free_nystrom": lambda: gx.hessian_free(preconditioner=gx.nystrom(3)),
    "hessian_free_sub_batch": lambda: gx.hessian_free(curvature_batch_size=4),
    "trust_region_ball": lambda: gx.trust_region(scaling="none", curvature=gx.gauss_newton()),
    "bfgs_by_leaf": lambda: gx.bfgs(ravel=False),
    "newton_search": lambda: gx.with_line_search(gx.scale_by_newton()),
    "dai_yuan": lambda: gx.nonlinear_cg("dai_yuan"),
    "masked": lambda: gx.masked(gx.newton_cg(), split("on") | {"kernel": True, "bias": False}),
    "partition": lambda: gx.partition({"on": gx.adam(0.1), "rest": gx.sgd(0.1)}, split("on")),
    "accumulate": lambda: gx.accumulate(gx.nesterov(0.1), 2),
    "inject_hyperparams": lambda: gx.inject_hyperparams(gx.rmsprop)(learning_rate=0.1),
    "schedule": lambda: gx.momentum(gx.linear_decay(0.1, 0.01, 10)),
    "time_decay": lambda: gx.polyak_average(gx.sgd(gx.inverse_time_decay(0.1, 0.5))),
}


@pytest.mark.parametrize(
    ("name", "chunks"), [(n, c) for i, n in enumerate(OTHERS) for c in every(2, [1, 4], i % 2)]
)
def test_others_trace_without_promotion(name: str, chunks: int) -> None:
    value_fn = gx.compose(loss, net, chunks=chunks, x=X, y=Y)

    def two_steps(params: Any) -> Any:
        tx = optax.with_extra_args_support(OTHERS[name]())
        state = tx.init(params)
        for _ in range(2):
            params, state = step(tx, params, state, value_fn)
        return params

    with strict():
        jax.eval_shape(two_steps, net_params())


# -- inside shard_map, with its checks of what varies over the devices


def on_each_device(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))

    def own(params: Any) -> Any:
        result = f(jax.tree.map(lambda x: x[0], params))
        return jax.tree.map(lambda x: x[None], result)

    rows = PartitionSpec("device")
    return jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows)


@pytest.mark.parametrize("method", every(2, MAPPED))
def test_traces_inside_shard_map(method: Method) -> None:
    tx, params = method.build(), nested_params()
    ways: list[Callable[[Any], Any]] = [
        lambda p: run(tx, p, 2),
        lambda p: gx.minimize(objective, p, tx).params,
    ]
    for way in ways:
        jax.eval_shape(on_each_device(way), stacked(params))
    # a leaf without entries is left out: inside vmap, JAX refuses to mark the constant it becomes
    full = {**params, "pair": params["pair"][0]}
    lanes = lambda p: jax.vmap(lambda p: run(tx, p, 2)[0])(stacked(p))
    jax.eval_shape(on_each_device(lanes), stacked(full))


def test_shard_map_solves_each_device_its_own_problem() -> None:
    def solve(target: jax.Array) -> jax.Array:
        bowl = lambda x: jnp.sum(jnp.square(x - target))
        return gx.minimize(bowl, jnp.zeros_like(target), tol=1e-4).params

    targets = jnp.asarray([[1.0, 2.0], [-3.0, 4.0]])
    assert jnp.allclose(jax.jit(on_each_device(solve))(targets), targets, atol=1e-3)


# -- with the debuggers of NaN and infinity


def bent(x: jax.Array) -> jax.Array:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4 + 0.1 * x[0] * x[1]


def steep(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cosh(x)) + jnp.sum(x**4)


def flat(x: jax.Array) -> jax.Array:
    return jnp.sum(0 * x)


@pytest.mark.parametrize("method", every(2, LOOKED_AT, 1))
def test_computes_no_nan_or_infinity(method: Method) -> None:
    """Not jitted, where every single result is looked at: a saddle, a minimum, no slope at all."""
    usual = {"learning_rate": 1e-3} if method.has_rate else {}
    tx = method.build(**usual)
    places = ((bent, [1.0, 0.2]), (steep, [2.0, -1.0]), (steep, [0.0, 0.0]), (flat, [1.0, 0.0]))
    with finite():
        for value_fn, start in places:
            params = jnp.asarray(start)
            state = tx.init(params)
            for _ in range(3 if LONG else 2):
                params, state = step(tx, params, state, value_fn)


@pytest.mark.skipif(not LONG, reason="its updates are looked at one by one above")
@every_method
def test_minimizes_without_nan_or_infinity(method: Method) -> None:
    with finite():
        usual = {"learning_rate": 1e-3} if method.has_rate else {}
        solution = gx.minimize(steep, jnp.asarray([2.0, -1.0]), method.build(**usual), max_steps=8)
    assert solution.value < steep(jnp.asarray([2.0, -1.0]))
