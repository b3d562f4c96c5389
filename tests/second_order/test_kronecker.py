"""Kronecker-factored steps: what does not change them, conditionals, faults and errors."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradxform as gx
from gradxform import kronecker, scale_by_kronecker
from gradxform.info import total
from gradxform.objective import Composed
from gradxform.second_order.kronecker_batch import batch_at

X = np.random.default_rng(5).normal(size=(24, 4))
LABELS = np.random.default_rng(6).integers(0, 3, size=24)
TARGETS = np.sin(X[:, :3]) * X[:, 1:]


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape) / 2


def squares(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(outputs)[jnp.arange(len(y)), y])


def net(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def weights(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    params = {"a": array(4, 6), "b": array(6), "c": array(6, 3)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def fit(model: Callable[..., Any] = net, loss: Any = squares, **options: Any) -> Composed:
    y = {"y": jnp.asarray(TARGETS) if loss is squares else jnp.asarray(LABELS)}
    if not jax.config.read("jax_enable_x64"):
        y = jax.tree.map(lambda y: y.astype(jnp.float32) if y.ndim == 2 else y, y)
    return gx.compose(loss, model, x=jnp.asarray(X), **y, **options)


def follow(tx: Any, value_fn: Composed, params: Any, steps: int) -> tuple[Any, Any, jax.Array]:
    """Last parameters and state, and the value before each update."""

    @jax.jit
    def run(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), value

        (last, state), values = jax.lax.scan(body, (params, tx.init(params)), length=steps)
        return last, state, values

    return run(params)


# -- equal steps of equal problems


def convolved(p: Any, x: jax.Array, kernel: str, data: str) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=(data, kernel, data)
    )
    return jnp.tanh(y).sum((1, 2) if data == "NHWC" else (2, 3))


def attention(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.stack([x, jnp.roll(x, 1, axis=1)], axis=1)
    q, k, v = (jnp.einsum("ntd,dhk->nthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k))
    return jnp.einsum("nhts,nshk,hke->ne", weights, v, p["out"])[:, :3]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    return jax.lax.scan(layer, x, p["layers"])[0][:, :3]


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for w in p:
        x = jnp.tanh(x @ w)
    return x[:, :3]


KERNEL = array(3, 3, 2, 3)
IMAGES = np.random.default_rng(1).normal(size=(24, 4, 4, 2))
ATTENTION = {"q": array(4, 2, 2), "k": array(4, 2, 2) / 2, "v": array(4, 2, 2) + 0.1}
ATTENTION["out"] = array(2, 2, 4)
STACK = array(3, 4, 4)


def turned(p: Any) -> Any:
    return {**p, "a": p["a"].T, "c": p["c"].T}


def flat(p: Any) -> Any:
    return {name: x.reshape(4, 4) for name, x in p.items()}


def deep(p: Any) -> Any:
    return {name: x.reshape(ATTENTION[name].shape) for name, x in p.items()}


def pairs() -> dict[str, Any]:
    """Two models with other storage, the parameters of the first, and those of the second."""
    images = {"x": jnp.asarray(IMAGES)}
    nhwc = lambda p, x: convolved(p, x, "HWIO", "NHWC")
    nchw = lambda p, x: convolved(p, x.transpose(0, 3, 1, 2), "OIHW", "NCHW")
    return {
        "in, out and out, in": (net, lambda p, x: net(turned(p), x), weights(float), turned, {}),
        "a scanned stack": (
            scanned,
            unrolled,
            {"layers": jnp.asarray(STACK)},
            lambda p: list(p["layers"]),
            {},
        ),
        "convolutions": (
            nhwc,
            nchw,
            {"kernel": jnp.asarray(KERNEL)},
            lambda p: {"kernel": p["kernel"].transpose(3, 2, 0, 1)},
            images,
        ),
        "attention": (attention, lambda p, x: attention(deep(p), x), ATTENTION, flat, {}),
    }


@pytest.mark.parametrize(
    ("name", "loss"), list(zip(pairs(), [squares, cross_entropy] * 2, strict=True))
)
@pytest.mark.usefixtures("x64")
def test_the_storage_does_not_matter(name: str, loss: Any) -> None:
    one, other, params, change, data = pairs()[name]
    params = jax.tree.map(jnp.asarray, params)
    ends = []
    for model, start in ((one, params), (other, change(params))):
        value_fn = fit(model, loss)
        value_fn = gx.compose(loss, model, **{**value_fn.data, **data})
        ends.append(follow(kronecker(), value_fn, start, 8))
    (last, _, values), (other_last, _, other_values) = ends
    np.testing.assert_allclose(other_values, values, rtol=1e-5)
    chex.assert_trees_all_close(
        jax.tree.leaves(change(last)), jax.tree.leaves(other_last), rtol=1e-5, atol=1e-7
    )
    assert values[-1] < 0.97 * values[0]


def test_units_of_the_objective_do_not_matter() -> None:
    def values(unit: jax.Array) -> jax.Array:
        scaled = gx.compose(lambda z, y: unit * squares(z, y), net, **fit().data)
        return follow(kronecker(), scaled, weights(), 12)[2] / unit

    first, *others = jax.vmap(values)(jnp.asarray([1, 1e-16, 1e-3, 1e12]))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=2e-3)


def test_a_sum_over_the_examples_takes_the_steps_of_the_mean() -> None:
    """Also where the curvature is that of a part of them."""
    data: Any = {name: jnp.repeat(x[:6], 4, axis=0) for name, x in fit().data.items()}
    tx = kronecker(factor_batch_size=6, model_batch_size=6)
    losses = squares, lambda z, y: jnp.sum((z - y) ** 2)
    mean, total = (follow(tx, gx.compose(f, net, **data), weights(), 8)[2] for f in losses)
    np.testing.assert_allclose(total / 24, mean, rtol=1e-3)


def test_chunks_and_data_by_keyword() -> None:
    """The random signs have the shape of the outputs, so chunks get others."""
    params, whole = weights(), fit()
    bare, tx = gx.compose(squares, net), kronecker()
    value, grads = jax.value_and_grad(whole)(params)

    @jax.jit
    def first(data: Any) -> Any:
        bound = tx.update(grads, tx.init(params), params, value=value, value_fn=whole)[0]
        passed = tx.update(grads, tx.init(params), params, value=value, value_fn=bare, **data)[0]
        return bound, passed

    chex.assert_trees_all_close(*first(dict(whole.data)), atol=1e-6)
    _, state, values = follow(kronecker(factor_batch_size=8), fit(chunks=4), params, 20)
    assert values[-1] < 0.6 * value
    probes = 10 + 5
    work = probes / 3 + 20 + 4 / 3  # in gradients
    np.testing.assert_allclose(state.info.gradient_equivalents, work, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_a_least_squares_problem_of_one_layer_is_solved_fast() -> None:
    """Its curvature is a Kronecker product."""
    x = X * np.logspace(0, -2, 4)
    value_fn = gx.compose(squares, lambda w, x: x @ w, x=x, y=jnp.asarray(TARGETS))
    tx = kronecker(min_damping=1e-9)
    _, _, values = follow(tx, value_fn, jnp.zeros((4, 3)), 80)
    best = value_fn(jnp.linalg.lstsq(x, jnp.asarray(TARGETS))[0])
    assert values[-1] - best < 1e-4 * (values[0] - best)


def test_a_net_is_fitted_in_float32_and_bfloat16() -> None:
    ends = [follow(kronecker(), fit(), weights(dtype), 60) for dtype in ("float32", "bfloat16")]
    for _, state, values in ends:
        assert values[-1] < 0.1 * values[0]
        assert int(state.info.fallbacks) == int(state.info.indefinite) == 0
    params, state, _ = ends[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype(name) for name in ("float32", "int32", "bool")}


@pytest.mark.parametrize(
    ("examples", "outputs", "factors", "model"),
    [
        (64, 900, 8, 8),
        (100, 1, 100, 100),
        (256, 10, 64, 128),
        (512, 10, 64, 256),
        (1000, 10, 100, 500),
        (1000, 784, 100, 100),
        (8192, 784, 512, 512),
    ],
)
def test_sub_batches_have_enough_outputs(
    examples: int, outputs: int, factors: int, model: int
) -> None:
    w, x, y = jnp.ones((1, outputs)), jnp.ones((examples, 1)), jnp.ones((examples, outputs))
    value_fn = gx.compose(squares, lambda w, x: x @ w, x=x, y=y)
    batch = batch_at("kronecker", w, w, value_fn)
    times = batch.for_factors(None).times, batch.for_model(None).times
    assert times == (examples / factors, examples / model)


def test_the_info_counts_the_work() -> None:
    tx = kronecker(factor_batch_size=6, model_batch_size=12, inverse_every=6, adapt_every=3)
    _, state, _ = follow(tx, fit(), weights(), 14)
    info = state.info
    probes = 10 + 2  # in the first ten updates, and then in each second
    assert int(info.curvature_products) == 2 * 14 + 1 * probes
    assert int(info.evaluations) == 4
    assert int(info.inversions) == 8  # at 0, 1, 2, 3, 4, 6, 8, 12
    np.testing.assert_allclose(info.gradient_equivalents, probes / 4 + 14 / 2 + 4 / 3, rtol=1e-5)
    assert (int(info.fallbacks), int(info.non_finite), int(info.indefinite)) == (0, 0, 0)
    assert float(info.damping) > 0
    assert float(info.ratio) > 0.25
    assert float(info.expected) > 0


# -- compiled


def conditionals(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        # a choice by platform is made when the program is lowered
        by_platform = equation.params.get("branches_platforms")
        if equation.primitive.name == "cond" and by_platform is None:
            yield equation
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from conditionals(inner)


def one_update(value_fn: Composed, **numbers: Any) -> Callable[[Any, Any], Any]:
    def update(params: Any, state: Any) -> Any:
        tx = kronecker(**numbers)
        value, grads = jax.value_and_grad(value_fn)(params)
        return tx.update(grads, state, params, value=value, value_fn=value_fn)

    return update


NUMBERS = {
    "damping": (0.02, 0.3),
    "min_damping": (2e-5, 0.1),
    "learning_rate": (0.05, 0.1),
    "momentum": (0.1, 0.3),
    "factor_every": (2, 3),
    "inverse_every": (20, 3),
    "adapt_every": (5, 2),
    "decay": (0.98, 0.3),
    "seed": (0, 7),
}


def test_conditionals_survive_vmap() -> None:
    """Also of each number, and of a batch of batches."""
    params, value_fn = weights(), fit()
    state = kronecker().init(params)
    alone = list(conditionals(jax.make_jaxpr(one_update(value_fn))(params, state).jaxpr))
    assert len(alone) == 4
    lanes = lambda x: jnp.stack([x, x])
    several = jax.tree.map(lanes, (params, state))

    def swept(numbers: Any, params: Any, state: Any) -> Any:
        return one_update(value_fn, **numbers)(params, state)

    nested = jax.vmap(jax.vmap(one_update(value_fn)))
    numbers = {name: jnp.asarray(values, jnp.float32) for name, values in NUMBERS.items()}
    programs = [
        jax.make_jaxpr(jax.vmap(one_update(value_fn)))(*several),
        jax.make_jaxpr(nested)(*jax.tree.map(lanes, several)),
        jax.make_jaxpr(jax.vmap(swept))(numbers, *several),
    ]
    for program in programs:
        found = list(conditionals(program.jaxpr))
        assert len(found) == len(alone)
        assert all(equation.invars[0].aval.shape == () for equation in found)


@pytest.mark.usefixtures("x64")
def test_lanes_are_loops_whatever_is_swept() -> None:
    names, usual = list(NUMBERS), [first for first, _ in NUMBERS.values()]
    rows = [usual]
    for i, (_, other) in enumerate(NUMBERS.values()):
        rows.append([*usual[:i], other, *usual[i + 1 :]])

    def end(row: jax.Array, factor: jax.Array) -> Any:
        params = jax.tree.map(lambda x: factor * x, weights(float))
        tx = kronecker(**dict(zip(names, row, strict=True)))
        return follow(tx, fit(), params, 8)

    table, factors = jnp.asarray(rows), jnp.linspace(0.5, 2, len(rows))
    together, alone = jax.jit(jax.vmap(end))(table, factors), jax.jit(end)
    for i in range(len(rows)):
        lane = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(lane, alone(table[i], factors[i]), rtol=1e-6, atol=1e-9)
    ends = {float(x) for x in together[2][:, -1]}
    assert len(ends) == len(rows)


def test_resumes_bit_for_bit() -> None:
    value_fn, start = fit(), weights()
    update = jax.jit(one_update(value_fn))

    def advance(params: Any, state: Any, steps: int) -> Any:
        for _ in range(steps):
            updates, state = update(params, state)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = advance(start, kronecker().init(start), 13)
    half = advance(start, kronecker().init(start), 7)
    params, state = jax.tree.map(lambda x: jnp.asarray(np.array(x)), half)
    chex.assert_trees_all_equal(advance(params, state, 6), whole)


# -- faults


@functools.cache
def faulty_run() -> Callable[..., Any]:
    """Twenty-five updates, one of which gets what is not finite."""

    def run(at: jax.Array, where: jax.Array, bad: jax.Array) -> Any:
        data, tx = fit().data, cast(Any, kronecker(inverse_every=4))

        def body(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            bad_now = lambda i: jnp.where((t == at) & (where == i), bad, 0)
            x = data["x"].at[3, 1].add(bad_now(0))
            value_fn = gx.compose(squares, net, x=x, y=data["y"])
            value, grads = jax.value_and_grad(value_fn)(params)
            value = value + bad_now(1)
            grads = {**grads, "c": grads["c"].at[1, 1].add(bad_now(2))}
            updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), value

        params = weights()
        carry, values = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(25))
        return *carry, values

    return jax.jit(jax.vmap(run))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_any_of_the_first_updates_is_survived(bad: float) -> None:
    """In the data, the value or a gradient."""
    at, where = (np.ravel(x) for x in np.meshgrid(np.arange(20), np.arange(3)))
    params, state, values = faulty_run()(at, where, np.full(60, bad, np.float32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    _, _, unharmed = follow(kronecker(inverse_every=4), fit(), weights(), 25)
    np.testing.assert_array_equal(state.info.non_finite, 1)
    np.testing.assert_array_equal(state.info.indefinite, 0)
    assert np.all(values[:, -1] < 2 * unharmed[-1] + 0.05 * unharmed[0])


def test_after_a_first_update_that_is_not_finite_the_unit_is_found() -> None:
    unit = 1e6
    value_fn = gx.compose(lambda z, y: unit * squares(z, y), net, **fit().data)
    params, tx = weights(), kronecker()
    value, grads = jax.value_and_grad(value_fn)(params)
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    _, state = update(grads, tx.init(params), params, value=jnp.asarray(jnp.nan))
    updates, state = update(grads, state, params, value=value)
    _, fresh = update(grads, tx.init(params), params, value=value)
    np.testing.assert_allclose(state.info.damping, fresh.info.damping, rtol=1e-6)
    assert jnp.any(updates["a"] != 0)


def test_the_step_that_led_to_what_is_not_finite_is_taken_back() -> None:
    params, value_fn, tx = weights(), fit(), kronecker()
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    value, grads = jax.value_and_grad(value_fn)(params)
    first, state = update(grads, tx.init(params), params, value=value)
    moved = optax.apply_updates(params, first)
    back, state = update(grads, state, moved, value=jnp.asarray(jnp.inf))
    chex.assert_trees_all_close(optax.apply_updates(moved, back), params, atol=1e-6)
    none, _ = update(grads, state, params, value=jnp.asarray(jnp.nan))
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves(none))


def test_where_the_curvature_overflows_nothing_moves_and_it_is_counted() -> None:
    value_fn = gx.compose(lambda y: jnp.sum(1e30 * y**2), lambda w, x: w * x, x=jnp.full(4, 1e10))
    w, tx = jnp.full(4, 1e-30), cast(Any, kronecker())
    updates, state = tx.update(
        jnp.full(4, 1e30), tx.init(w), w, value=jnp.asarray(1.0), value_fn=value_fn
    )
    assert np.isfinite(updates).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert int(state.info.fallbacks) == 1


def test_a_loss_that_is_not_convex_is_counted() -> None:
    """The solution tells it in one line, and the value falls all the same."""
    wells = lambda z, y: jnp.mean(jnp.sum((z**2 - y**2) ** 2, axis=-1))
    value_fn = gx.compose(wells, net, **fit().data)
    solution = gx.minimize(value_fn, weights(), kronecker(), max_steps=20)
    seen = int(total(solution.loop.state, "indefinite"))
    assert 0 < seen <= 20
    assert f"not convex in the outputs of the model, as seen in {seen} updates" in str(solution)
    assert float(solution.value) < float(value_fn(weights()))
    _, state, _ = follow(kronecker(), fit(loss=cross_entropy), weights(), 20)
    assert int(state.info.indefinite) == 0


# -- errors


def test_what_it_cannot_use_is_refused_in_one_line() -> None:
    params, plain = weights(), lambda p: squares(net(p, jnp.asarray(X)), jnp.asarray(TARGETS))
    grads = jax.grad(plain)(params)

    def update(tx: Any, value_fn: Any) -> None:
        tx.update(grads, tx.init(params), params, value=1.0, value_fn=value_fn)

    def refused(error: type[Exception], match: str, f: Callable[[], Any]) -> None:
        with pytest.raises(error, match=match) as caught:
            f()
        assert "\n" not in str(caught.value)

    closed = gx.compose(
        lambda z: squares(z, jnp.asarray(TARGETS)), lambda p: net(p, jnp.asarray(X))
    )
    for method in (kronecker, scale_by_kronecker):
        name, one = method.__name__, functools.partial
        tx = method()
        refused(ValueError, rf"^{name} needs to know.*gx\.compose\(loss", one(update, tx, plain))
        refused(ValueError, rf"^{name} needs value_fn=", one(update, tx, None))
        without_value = one(tx.update, grads, tx.init(params), params, value_fn=fit())
        refused(ValueError, rf"^{name} needs value=", without_value)
        for size in ("factor_batch_size", "model_batch_size")[: 1 + (method is kronecker)]:
            of_size = lambda n, method=method, size=size: method(**{size: n})
            few = rf"^{name}\({size}=30\).*24 examples"
            refused(ValueError, few, one(update, of_size(30), fit()))
            refused(ValueError, "multiple of 4", one(update, of_size(6), fit(chunks=4)))
            refused(TypeError, rf"{name}\({size}=0\.25\)", one(of_size, 0.25))
            refused(ValueError, "common leading axis", one(update, of_size(4), closed))
        refused(TypeError, "int32", one(tx.init, {"n": jnp.arange(3)}))
    state = kronecker().init(params)
    refused(
        ValueError,
        "state does not belong",
        lambda: kronecker().update(
            {"a": grads["a"]}, state, {"a": params["a"]}, value=1.0, value_fn=fit()
        ),
    )


def test_an_empty_leaf_and_no_parameters_at_all() -> None:
    value_fn = gx.compose(squares, lambda p, x: net(p["net"], x), **fit().data)
    params = {"net": weights(), "empty": jnp.zeros((0, 3)), "none": None, "n": jnp.zeros((2, 0))}
    with_empty = follow(kronecker(), value_fn, params, 4)
    without = follow(kronecker(), fit(), weights(), 4)
    np.testing.assert_allclose(with_empty[2], without[2], rtol=1e-5)
    nothing = gx.compose(lambda y: jnp.sum(y), lambda p: jnp.ones(3))
    tx = kronecker()
    updates, _ = tx.update({}, tx.init({}), {}, value=jnp.asarray(3.0), value_fn=nothing)
    assert updates == {}


# -- with other transformations


def test_the_direction_alone_in_a_chain() -> None:
    schedule = optax.linear_schedule(0.5, 0.1, 30)
    tx = optax.chain(
        scale_by_kronecker(1e-2),
        optax.clip_by_global_norm(1.0),
        optax.trace(0.5),
        optax.scale_by_learning_rate(schedule),
    )
    _, state, values = follow(tx, fit(), weights(), 60)
    assert values[-1] < 0.3 * values[0]
    assert int(state[0].info.inversions) > 3
    clipped = optax.chain(kronecker(), optax.clip_by_global_norm(1e-3))
    moved, _, _ = follow(clipped, fit(), weights(), 1)
    start = ravel_pytree(weights())[0]
    np.testing.assert_allclose(jnp.linalg.norm(ravel_pytree(moved)[0] - start), 1e-3, rtol=1e-2)


def test_with_a_given_rate_and_momentum() -> None:
    tx = kronecker(learning_rate=optax.constant_schedule(0.1), momentum=0.0)
    _, state, values = follow(tx, fit(), weights(), 40)
    assert (float(state.info.rate), float(state.info.momentum)) == (np.float32(0.1), 0.0)
    assert values[-1] < 0.5 * values[0]


def test_masked_and_partition() -> None:
    """The rest of the parameters is constant, or goes to another method."""
    params = weights()
    only = gx.masked(kronecker(), {"a": True, "b": False, "c": True})
    # what is not selected passes as it is: the gradient
    tx = optax.chain(only, optax.masked(optax.set_to_zero(), {"a": False, "b": True, "c": False}))
    moved, _, values = follow(tx, fit(), params, 20)
    np.testing.assert_array_equal(moved["b"], params["b"])
    frozen = lambda p, x: net({**p, "b": params["b"]}, x)
    rest = {"a": params["a"], "c": params["c"]}
    alone = follow(kronecker(), fit(frozen), rest, 20)
    np.testing.assert_allclose(values, alone[2], rtol=1e-3)
    parts = gx.partition({"k": kronecker(), "sgd": gx.sgd(0.05)}, {"a": "k", "b": "sgd", "c": "k"})
    _, _, values = follow(parts, fit(), params, 20)
    assert values[-1] < 0.6 * values[0]


@pytest.mark.usefixtures("x64")
def test_complex_parameters_are_pairs_of_real_ones() -> None:
    x = jnp.asarray(X[:, :2] + 1j * X[:, 2:])
    y = jnp.asarray(x @ (array(2, 3) + 1j * array(2, 3)))
    misfit = lambda z, y: jnp.mean(jnp.sum(jnp.real(z - y) ** 2 + jnp.imag(z - y) ** 2, axis=-1))
    whole = gx.compose(misfit, lambda w, x: x @ w, x=x, y=y)
    split = gx.compose(misfit, lambda w, x: x @ jax.lax.complex(*w), x=x, y=y)
    start = jnp.asarray(array(2, 3) + 0j)
    ends = []
    for value_fn, w in ((whole, start), (split, (jnp.real(start), jnp.imag(start)))):
        params = w

        @jax.jit
        def step(params: Any, state: Any, value_fn: Any = value_fn) -> Any:
            value, grads = jax.value_and_grad(value_fn)(params)
            grads = jax.tree.map(jnp.conj, grads)
            updates, state = kronecker().update(
                grads, state, params, value=value, value_fn=value_fn
            )
            return optax.apply_updates(params, updates), state

        state = kronecker().init(params)
        for _ in range(5):
            params, state = step(params, state)
        ends.append(params)
        assert value_fn(params) < 0.1 * value_fn(w)
    np.testing.assert_allclose(ends[0], jax.lax.complex(*ends[1]), rtol=1e-9)
