"""What every method promises, over the one table of methods."""

import inspect
from pathlib import Path
from typing import Any

import chex
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradxform as gx
from gradxform.bounds import Box
from gradxform.second_order.subproblems.exact import EigenModel
from tests.methods import METHODS, Method, nested_params, objective, one_of_each, run, step
from tests.thinning import LONG, every

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


COMPUTED = [METHODS[name] for name in every(2, one_of_each(1))]


def every_second_method(turn: int) -> pytest.MarkDecorator:
    """For tests that look at wrappers around a method: half of the factories by default, in turns.

    An even and an odd turn together have every factory, and the turns every row.
    """
    names = every(2, one_of_each(turn // 2), turn % 2)
    return pytest.mark.parametrize("method", [METHODS[name] for name in names], ids=names)


def each_method_with(*turns: tuple[str, ...], always: tuple[str, ...]) -> pytest.MarkDecorator:
    """Each method with some dtypes always, and by default with those of one turn."""
    cases = [
        pytest.param(method, dtype, id=f"{name}-{dtype}")
        for i, (name, method) in enumerate(METHODS.items())
        for dtype in (*always, *(sum(turns, ()) if LONG else turns[i % len(turns)]))
    ]
    return pytest.mark.parametrize(("method", "dtype"), cases)


every_number = pytest.mark.parametrize(
    ("method", "number"),
    [
        pytest.param(method, number, id=f"{name}-{number}")
        for name, method in METHODS.items()
        for number in method.numbers
    ],
)
RATED = every(2, [name for name, method in METHODS.items() if method.has_rate])
with_rate = pytest.mark.parametrize("method", [METHODS[name] for name in RATED], ids=RATED)


def close(actual: Any, expected: Any) -> None:
    pair = determined(actual), determined(expected)
    chex.assert_trees_all_close(*pair, rtol=2e-5, atol=2e-6)


def determined(tree: Any) -> Any:
    """``tree`` with matrices for their eigenvectors, which rounding alone may rotate."""

    def is_model(node: Any) -> bool:
        return isinstance(node, EigenModel)

    def matrix(node: Any) -> Any:
        if not is_model(node):
            return node
        rows = [x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(node.axes)]
        q = jnp.concatenate(rows)
        return (
            (q * node.values[None, :]) @ q.T,
            q @ node.slopes,
            node.sizes,
        )

    return jax.tree.map(matrix, tree, is_leaf=is_model)


def described(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@each_method_with(("bfloat16",), ("float32",), ("float16",), always=("float64",))
def test_dtypes_and_structure_never_change(method: Method, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        params = nested_params(jnp.dtype(dtype))
        tx = method.build()
        state = jax.eval_shape(tx.init, params)

        def one_step(params: Any, state: Any) -> tuple[Any, ...]:
            value, grads = jax.value_and_grad(objective)(params)
            updates, state = tx.update(grads, state, params, value=value, value_fn=objective)
            moved = optax.apply_updates(params, updates)
            return grads, updates, state, moved, gx.eval_params(state, moved)

        # what a compiled program would return, without the time that compiling takes
        found = jax.eval_shape(one_step, params, state)
        grads, updates, new_state, moved, evaluated = map(described, found)
        assert new_state == described(state)
        assert updates == grads
        is_box = lambda node: isinstance(node, Box)  # bounds are parameters
        for leaf in jax.tree.leaves(state, is_leaf=is_box):
            if not is_box(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
                assert leaf.dtype == gx.tree.wide(jnp.dtype(dtype))
        # on the path θ itself keeps its dtype, too
        assert moved == evaluated == described(params)


@every_second_method(0)
def test_descends_and_half_precision_follows_float32(method: Method) -> None:
    tx = method.build()

    @jax.jit
    def last_value(params: Any) -> jax.Array:
        params, state = run(tx, params, 60)
        return objective(gx.eval_params(state, params))

    start = nested_params()
    full_value = last_value(start)
    assert full_value < 0.7 * objective(start)
    for dtype in (jnp.bfloat16, jnp.float16) if LONG else (jnp.bfloat16,):
        half = nested_params(dtype)
        assert last_value(half) < full_value + 0.05 * objective(half), dtype


@every_second_method(2)
def test_a_compiled_step(method: Method) -> None:
    """It is traced once, equals the eager one, takes donated arrays, lowers for every platform."""
    tx = method.build()
    params = nested_params()
    state, traces = tx.init(params), []

    @jax.jit
    def one_step(params: Any, state: Any) -> tuple[Any, Any]:
        traces.append(None)
        return step(tx, params, state)

    first = one_step(params, state)
    after = one_step(*first)
    assert len(traces) == 1
    eager = step(tx, params, state)
    close(first, eager)
    close(after, step(tx, *eager))
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(one_step, platforms=platforms)(params, state)
    assert exported.platforms == platforms
    close(jax.jit(exported.call, donate_argnums=(0, 1))(params, state), first)


@every_second_method(1)
@pytest.mark.usefixtures("x64")  # where rounding cannot lead the lanes apart
def test_vmap_equals_loop(method: Method) -> None:
    tx = method.build()
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), nested_params(jnp.float64))
    solve = jax.jit(lambda p: run(tx, p, 5))
    together = jax.device_get(jax.jit(jax.vmap(lambda p: run(tx, p, 5)))(batch))
    for i in range(3):
        lane = jax.tree.map(lambda x, i=i: x[i], batch)
        close(jax.tree.map(lambda x, i=i: x[i], together), solve(lane))


@every_method
@pytest.mark.usefixtures("x64")
def test_every_number_can_be_traced_and_vmapped(method: Method) -> None:
    """With the parameters, too: each lane has a start and numbers of its own.

    Half of the methods are only traced, unless it is the long form.
    """
    names = list(method.numbers)
    usual = [first for first, _ in method.numbers.values()]
    rows = [usual]  # and one row for each number, changed alone
    for i, (_, other) in enumerate(method.numbers.values()):
        rows.append([*usual[:i], other, *usual[i + 1 :]])

    def solve(row: jax.Array, factor: jax.Array) -> Any:
        params = jax.tree.map(lambda x: factor * x, nested_params(jnp.float64))
        return run(method.build(**dict(zip(names, row, strict=True))), params, 5)

    table = np.asarray(rows, np.float32)
    factors = np.asarray([(-1.0) ** i * (1 + i % 2) for i in range(len(rows))])
    if method not in COMPUTED:
        jax.eval_shape(jax.vmap(solve), table, factors)
        return
    swept = jax.device_get(jax.jit(jax.vmap(solve))(table, factors))
    traced = jax.jit(solve)
    for i, arguments in enumerate(zip(table, factors, strict=True)):
        close(jax.tree.map(lambda x, i=i: x[i], swept), traced(*arguments))
    params = nested_params(jnp.float64)
    close(traced(table[0], factors[0])[0], jax.jit(lambda p: run(method.build(), p, 5)[0])(params))


@with_rate
def test_learning_rate_may_be_a_schedule(method: Method) -> None:
    params = nested_params()
    rate, _ = method.numbers["learning_rate"]

    @jax.jit
    def with_decay(decay: float) -> Any:
        tx = method.build(learning_rate=gx.inverse_time_decay(rate, decay))
        return run(tx, params, 4)[0]

    constant, decayed = with_decay(0.0), with_decay(1.0)
    close(constant, run(method.build(), params, 4)[0])
    assert not np.allclose(decayed["dense"]["kernel"], constant["dense"]["kernel"], atol=1e-4)


@every_second_method(3)
def test_inject_hyperparams(method: Method) -> None:
    params = nested_params()
    tx = optax.inject_hyperparams(method.factory, tuple(method.options))(**method.arguments)
    injected, state = run(tx, params, 5)
    plain, plain_state = run(method.build(), params, 5)
    close(injected, plain)
    close(gx.eval_params(state, injected), gx.eval_params(plain_state, plain))


@every_second_method(4)
def test_inject_hyperparams_with_half_precision_parameters(method: Method) -> None:
    """Optax's own dtype for them is the parameters': b2 = 0.999 is then 1."""
    params = nested_params(jnp.bfloat16)
    for dtype in (jnp.float32, None) if LONG else (None,):
        inject = optax.inject_hyperparams(
            method.factory, tuple(method.options), hyperparam_dtype=dtype
        )
        injected, state = run(inject(**method.arguments), params, 5)
        assert objective(gx.eval_params(state, injected)) <= objective(params)  # and so not NaN
        if dtype is not None:
            plain, _ = run(method.build(), params, 5)
            chex.assert_trees_all_close(injected, plain, rtol=2e-2, atol=2e-2)


@every_method
def test_masked(method: Method) -> None:
    params = {"on": nested_params()["dense"], "off": jnp.asarray([1.0, 2.0])}
    tx = optax.masked(method.build(), {"on": True, "off": False})
    state = tx.init(params)
    if "value_fn" in method.needs:
        with pytest.raises(ValueError, match=r"optax\.masked.*hides"):
            step(tx, params, state)
        return
    value, grads = jax.value_and_grad(objective)(params)
    inner = method.build()
    inner_state = inner.init(params["on"])
    for _ in range(3):
        updates, state = tx.update(grads, state, params, value=value)
        alone, inner_state = inner.update(grads["on"], inner_state, params["on"], value=value)
        close(updates["on"], alone)
        close(updates["off"], grads["off"])
    evaluated = gx.eval_params(state, params)
    close(evaluated["on"], gx.eval_params(inner_state, params["on"]))
    close(evaluated["off"], params["off"])


@every_method
def test_our_own_wrappers_around_each_other(method: Method) -> None:
    """By tracing alone: what the wrappers compute is tested with a few methods."""
    params = {"on": nested_params(jnp.bfloat16)["dense"], "off": jnp.asarray([1.0, 2.0])}
    tx = gx.inject_hyperparams(method.factory)(**method.arguments)
    tx = gx.partition({"a": gx.accumulate(tx, 2), "b": gx.sgd(0.1)}, {"on": "a", "off": "b"})
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(lambda p, s: step(tx, p, s), params, state)
    dtypes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert dtypes(after) == dtypes(state)
    injected = state.inner_states["a"].inner_state.inner_opt_state.hyperparams
    assert set(injected) == {n for n, x in method.arguments.items() if isinstance(x, float)}


@every_method
def test_partition(method: Method) -> None:
    params = {"a": nested_params()["dense"], "b": jnp.asarray([1.0, 2.0])}
    tx = optax.partition({"ours": method.build(), "sgd": optax.sgd(0.1)}, {"a": "ours", "b": "sgd"})
    state = tx.init(params)
    if "value_fn" in method.needs:
        with pytest.raises(ValueError, match="hides"):
            step(tx, params, state)
        return
    value, grads = jax.value_and_grad(objective)(params)
    inner = method.build()
    updates, state = tx.update(grads, state, params, value=value)
    alone, inner_state = inner.update(grads["a"], inner.init(params["a"]), params["a"], value=value)
    close(updates, {"a": alone, "b": -0.1 * grads["b"]})
    close(gx.eval_params(state, params)["a"], gx.eval_params(inner_state, params["a"]))


@every_second_method(5)
@pytest.mark.skipif(
    jax.config.jax_numpy_dtype_promotion == "strict",  # pyright: ignore
    reason="optax.MultiSteps itself adds an int32 to a float32",
)
def test_multi_steps_averages_gradients(method: Method) -> None:
    params = nested_params()
    tx = optax.MultiSteps(method.build(), every_k_schedule=2).gradient_transformation()
    value, grads = jax.value_and_grad(objective)(params)
    arguments = {"value": value, "value_fn": objective}
    inner = method.build()
    update = jax.jit(lambda g, state: tx.update(g, state, params, **arguments))
    inner_update = jax.jit(lambda g, state: inner.update(g, state, params, **arguments))
    state = tx.init(params)
    for factor in (0.5, 1.5):
        scaled = jax.tree.map(lambda g, factor=factor: factor * g, grads)
        updates, state = update(scaled, state)
    expected, inner_state = inner_update(grads, inner.init(params))
    close(updates, expected)
    close(gx.eval_params(state, params), gx.eval_params(inner_state, params))


@every_second_method(6)
def test_apply_if_finite_skips_a_bad_gradient(method: Method) -> None:
    params = nested_params()
    tx = optax.apply_if_finite(method.build(), max_consecutive_errors=5)

    @jax.jit
    def one_step(params: Any, state: Any, factor: float) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(objective)(params)
        grads = jax.tree.map(lambda g: factor * g, grads)
        return tx.update(grads, state, params, value=value, value_fn=objective)

    updates, state = one_step(params, tx.init(params), 1.0)
    params = optax.apply_updates(params, updates)
    updates, after = one_step(params, state, jnp.nan)
    close(updates, jax.tree.map(jnp.zeros_like, params))
    close(after.inner_state, state.inner_state)
    resumed, _ = one_step(params, after, 1.0)
    unharmed, _ = one_step(params, state, 1.0)
    close(resumed, unharmed)


@every_second_method(7)
def test_chain_and_unknown_arguments(method: Method) -> None:
    params = nested_params()
    tx = optax.chain(optax.clip_by_global_norm(0.5), method.build())
    grads = jax.grad(objective)(params)
    arguments = {"value": objective(params), "value_fn": objective, "loss_scale": 3.0}
    updates, state = tx.update(grads, tx.init(params), params, **arguments)
    inner = method.build()
    clipped, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
    expected, inner_state = inner.update(clipped, inner.init(params), params, **arguments)
    close(updates, expected)
    close(gx.eval_params(state, params), gx.eval_params(inner_state, params))


@every_second_method(9)
def test_state_survives_flax_and_orbax(method: Method, tmp_path: Path) -> None:
    tx = method.build()
    start = {**nested_params(), "pair": jnp.asarray([0.75, -0.5])}  # orbax takes no empty arrays
    traces = []

    @jax.jit
    def one_step(params: Any, state: Any) -> tuple[Any, Any]:
        traces.append(None)
        return step(tx, params, state)

    params, state = one_step(*one_step(start, tx.init(start)))
    blank = tx.init(start)

    restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", blank)
    chex.assert_trees_all_equal(restored, state)
    assert described(restored) == described(state)
    close(one_step(params, restored), one_step(params, state))
    assert len(traces) == 1


@every_method
def test_abstract_init_and_map_params(method: Method) -> None:
    params = nested_params()
    tx = method.build()
    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: nested_params()))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


@every_second_method(11)
def test_state_is_sharded_like_the_parameters(method: Method) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = {"kernel": jnp.arange(32.0).reshape(16, 2) / 16, "bias": jnp.arange(8.0) / 8}
    sharded = jax.device_put(params, rows)
    tx = method.build()
    run_three = jax.jit(lambda p: run(tx, p, 3))
    result, state = run_three(sharded)
    # sums over eight devices round otherwise, and an extrapolating search multiplies that
    chex.assert_trees_all_close(
        *map(determined, ((result, state), run_three(params))), rtol=2e-4, atol=2e-5
    )
    if method.dense:
        return
    for states in (tx.init(sharded), state):
        trees = [x for x in jax.tree.leaves(states) if x.ndim and x.shape[0] >= 8]
        assert all(leaf.sharding.is_equivalent_to(rows, leaf.ndim) for leaf in trees)


@each_method_with(("float16",), ("bfloat16",), always=("float32",))
def test_zero_gradient_moves_nothing(method: Method, dtype: str) -> None:
    params = {"w": jnp.asarray([1.0, -2.0], dtype)}
    tx = method.build()
    zero = jax.tree.map(jnp.zeros_like, params)
    value_fn = lambda p: jnp.sum(p["w"].astype(jnp.float32) * 0)
    arguments = {"value": value_fn(params), "value_fn": value_fn}
    updates, state = tx.update(zero, tx.init(params), params, **arguments)
    close(updates, zero)
    assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(state))


@every_method
def test_gradient_through_updates_is_finite_at_a_zero_gradient(method: Method) -> None:
    if method.needs:
        pytest.skip("a search decides, by comparisons and loops: it has no useful derivative")
    tx = method.build()

    def after_two_steps(params: Any) -> jax.Array:
        value_fn = lambda p: jnp.sum(jnp.square(p))
        state = tx.init(params)
        for _ in range(2):
            params, state = step(tx, params, state, value_fn)
        return jnp.sum(gx.eval_params(state, params) * jnp.asarray([1.0, 2.0]))

    assert jnp.isfinite(jax.grad(after_two_steps)(jnp.asarray([0.0, 1.0]))).all()


@every_method
def test_integer_parameters_are_refused_by_name(method: Method) -> None:
    with pytest.raises(TypeError, match=r"params\['steps'\] has dtype int32.*convert"):
        method.build().init({"steps": jnp.asarray(3)})


@every_number
@pytest.mark.parametrize("bad", [float("nan"), -1.0, "0.1", None, True])
def test_bad_numbers_are_refused_by_name(method: Method, number: str, bad: Any) -> None:
    default = inspect.signature(method.factory).parameters[number].default
    if bad is None and (default is None or number in ("decay", "bound")):
        pytest.skip("None is a choice there")
    with pytest.raises((TypeError, ValueError), match=rf"\({number}="):
        method.build(**{number: bad})
