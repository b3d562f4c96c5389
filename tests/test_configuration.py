"""A compiled program is used again only where a fresh process would compute the same."""

import functools
import gc
import math
import os
import random
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradxform as gx
from gradxform import programs
from gradxform.configuration import configuration_key
from tests.readers import READERS, Holder

pytestmark = pytest.mark.usefixtures("few_objects")
LONG = bool(os.environ.get("GRADXFORM_LONG"))
PAIRS = int(os.environ.get("GRADXFORM_PAIRS", "25"))  # 500 for a long look
STEPS = 3


def square(target: Any, x: jax.Array) -> jax.Array:
    return (x - target) ** 2


def tenth(scale: Any, count: jax.Array) -> Any:
    return 0.1 * scale


def by_hand(target: float, scale: float) -> float:
    """Gradient descent on ``square`` without JAX."""
    x = 0.0
    for _ in range(STEPS):
        x -= 0.1 * scale * 2 * (x - target)
    return x


def solve(fn: Any, tx: Any, **options: Any) -> float:
    solution = gx.minimize(fn, 0.0, tx, max_steps=STEPS, tol=1e-9, **options)
    return float(solution.params)


def test_any_pair_in_any_order_gives_what_a_fresh_process_gives() -> None:
    draw = random.Random(3)
    names = list(READERS)

    def pair(i: int) -> Any:
        fn, change = READERS[names[i % len(names)]].build(square)
        rate, change_rate = READERS[names[draw.randrange(len(names))]].build(tenth)
        # a method built anew for every solve, from the same schedule
        return [fn, change, lambda: gx.sgd(rate), change_rate, 1.0, 1.0]

    def check(pair: Any) -> None:
        fn, _, build, _, target, scale = pair
        assert solve(fn, build()) == pytest.approx(by_hand(target, scale), rel=1e-5)

    pairs = [pair(i) for i in range(PAIRS)]
    for one in pairs:
        check(one)
    draw.shuffle(pairs)
    for one in pairs:
        changed = draw.randrange(2)  # the objective's value or the method's
        one[4 + changed] = draw.choice([0.5, 2.0])
        one[1 + 2 * changed](one[4 + changed])
    for one in draw.sample(pairs, len(pairs)):
        check(one)


@pytest.mark.parametrize("name", READERS)
def test_what_a_function_reads_is_in_its_key(name: str) -> None:
    build, recognised = READERS[name]
    fn, change = build(square)
    keys = []
    for value in (1.0, 2.0, 0.5, 2.0):
        change(value)
        assert fn(0.0) == value**2
        keys.append(configuration_key(fn))
        assert configuration_key(fn) == keys[-1]
    if not recognised:
        assert keys == [None] * 4
        return
    assert None not in keys
    assert len(set(keys[:3])) == 3
    if name not in ("jax_array", "redefined_helper", "replaced_method", "order_of_a_dictionary"):
        assert keys[3] == keys[1]


ALIKE = {
    "1": 1,
    "True": True,
    "1.0": 1.0,
    "complex": 1 + 0j,
    "text": "1",
    "bytes": b"1",
    "float32": np.float32(1),
    "float64": np.float64(1),
    "numpy": np.asarray(1.0),
    "numpy float32": np.asarray(1.0, np.float32),
    "numpy vector": np.ones(1),
    "jax": jnp.asarray(1.0, jnp.float32),
    "jax bfloat16": jnp.asarray(1.0, jnp.bfloat16),
    "jax weak": jax.jit(lambda: 1.0)(),
    "list": [1],
    "tuple": (1,),
    "set": {1},
    "key": {1: 1},
    "range": range(1),
    "slice": slice(1),
    "none": None,
    "dots": ...,
    "class": float,
    "dtype": np.dtype("float32"),
    "function": math.sqrt,
    "other function": math.exp,
    "namespace": types.SimpleNamespace(a=1),
    "partial": functools.partial(square, 1),
    "partial of another type": jax.tree_util.Partial(square, 1),
    "another number": functools.partial(square, 1.0),
    "random key": jax.random.key(0),
    "context": jax.default_matmul_precision,
}


def test_values_that_compare_equal_are_told_apart() -> None:
    def reads(value: Any) -> Any:
        return lambda: value

    keys = {name: configuration_key(reads(value)) for name, value in ALIKE.items()}
    assert None not in keys.values()
    assert len(set(keys.values())) == len(ALIKE)
    zero, minus = (configuration_key(reads(value)) for value in (0.0, -0.0))
    assert zero != minus
    nan = [configuration_key(reads(float("nan"))) for _ in range(2)]
    assert nan[0] == nan[1]
    assert configuration_key([1, [2]]) != configuration_key([[1], 2])


SECRET = "__globals__"


@pytest.mark.parametrize(
    "fn",
    [
        lambda: np.random.normal(),  # noqa: NPY002
        lambda: np.random.default_rng(),
        functools.partial(lambda generator: generator.normal(), np.random.default_rng(0)),
        lambda: random.random(),
        lambda: random.gauss(0, 1),
        lambda: __import__("time").time(),
        lambda: open("value.txt").read(),  # noqa: SIM115
        lambda: np.load("value.npy"),
        lambda: jnp.load("value.npy"),
        lambda: np.loadtxt("value.txt"),
        lambda: np.fromfile("value.bin"),
        lambda: Path("value.txt").read_text(),
        lambda: eval("SECRET"),
        lambda: solve.__globals__["SECRET"],
        lambda: getattr(solve, "__globals__")["SECRET"],  # noqa: B009
        functools.partial(next, iter([1.0, 2.0])),
        functools.partial(lambda lock: lock, threading.local()),
        functools.partial(lambda m: m[0], memoryview(b"1")),
    ],
)
def test_what_may_change_unseen_has_no_key(fn: Any) -> None:
    assert configuration_key(fn) is None


def traces_of(fn: Any) -> tuple[Any, list[None]]:
    traces: list[None] = []

    def traced(x: jax.Array) -> jax.Array:
        traces.append(None)
        return fn(x)

    return traced, traces


def test_a_log_and_a_counter_are_not_inputs() -> None:
    fn, traces = traces_of(functools.partial(square, 1.0))
    solve(fn, gx.sgd(0.1))
    traces.clear()
    solve(fn, gx.sgd(0.1))
    assert not traces

    class Counted:
        calls = 0

        def __call__(self, x: jax.Array) -> jax.Array:
            self.calls += 1
            return square(1.0, x)

    counted = Counted()
    for _ in range(3):
        solve(counted, gx.sgd(0.1))
    assert counted.calls == 1


def test_a_value_changed_while_the_program_runs_is_seen() -> None:
    """A callback runs after the trace, so what it changes was not part of the program."""
    settings = Holder()

    def fn(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: setattr(settings, "value", 2.0))
        return square(settings.value, x)

    assert solve(fn, gx.sgd(0.1)) == pytest.approx(by_hand(1.0, 1.0))
    jax.effects_barrier()
    assert solve(fn, gx.sgd(0.1)) == pytest.approx(by_hand(2.0, 1.0))


def test_a_value_changed_while_progress_is_reported_is_seen() -> None:
    settings = Holder()
    fn = lambda x: square(settings.value, x)
    watched = lambda progress: (
        gx.minimize(
            fn, 0.0, gx.sgd(0.1), max_steps=2 * STEPS, progress=progress, progress_every=STEPS
        ).loop.params
    )
    whole = float(watched(lambda solution: None))
    settings.value = 2.0
    watched(lambda solution: setattr(settings, "value", 1.0))
    assert float(watched(lambda solution: None)) == pytest.approx(whole)
    settings.value = 2.0
    assert float(watched(lambda solution: None)) == pytest.approx(2 * whole)


def test_another_shape_is_traced_from_the_method_handed_over() -> None:
    """A program found again must not read the method that it was first compiled from."""
    first, second = Holder(), Holder()

    def descend(settings: Holder, start: Any) -> Any:
        tx = gx.sgd(lambda count: 0.1 * settings.value)
        return gx.minimize(total, start, tx, max_steps=1).params

    def total(x: Any) -> jax.Array:
        return jnp.sum((x - 1.0) ** 2)

    np.testing.assert_allclose(descend(first, jnp.zeros(1)), 0.2, rtol=1e-6)
    first.value = 3.0
    np.testing.assert_allclose(descend(second, jnp.zeros(2)), 0.2, rtol=1e-6)


def test_objective_and_method_may_share_what_they_read() -> None:
    settings = Holder()
    fn = lambda x: square(settings.value, x)
    build = lambda: gx.sgd(lambda count: 0.1 * settings.value)
    for value in (1.0, 0.5, 1.0, 2.0):
        settings.value = value
        assert solve(fn, build()) == pytest.approx(by_hand(value, value), rel=1e-5)


def test_minimize_within_an_objective() -> None:
    def inner(target: Any) -> Any:
        return gx.minimize(lambda y: square(target, y), 0.0, gx.sgd(0.5)).params

    outer = lambda x: square(jax.lax.stop_gradient(inner(2.0 + 0 * x)), x)
    for _ in range(2):
        assert gx.minimize(outer, 0.0, gx.sgd(0.5)).params == pytest.approx(2.0)


class Slotted:
    """It cannot be referenced weakly."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sum((x - jnp.sum(self.value)) ** 2)


class Model:
    def __init__(self, value: Any) -> None:
        self.value = value

    def loss(self, x: jax.Array) -> jax.Array:
        return jnp.sum((x - jnp.sum(self.value)) ** 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda data: lambda x: jnp.sum((x - jnp.sum(data)) ** 2),
        lambda data: functools.partial(lambda data, x: jnp.sum((x - jnp.sum(data)) ** 2), data),
        lambda data: Model(data).loss,
        Slotted,
        lambda data: gx.compose(lambda y: jnp.sum(y**2), lambda x: x - jnp.sum(data)),
        lambda data: lambda x: jnp.sum((x - jnp.sum(data)) ** 2) + 0 * id(x),
        lambda data: lambda x: jax.lax.cond(x > 0, lambda: (x - data[0]) ** 2, lambda: x**2 + x),
    ],
    ids=["closure", "partial", "bound method", "slots", "composed", "not recognised", "branches"],
)
@pytest.mark.parametrize("method", [gx.sgd, gx.newton] if LONG else [gx.sgd])
def test_objective_and_data_are_freed_together(build: Any, method: Callable[..., Any]) -> None:
    gc.collect()
    kept = len(programs._kept)

    def once() -> weakref.ref[Any]:
        data = jnp.full(1000, 0.001)
        solution = gx.minimize(build(data), 0.0, method(0.1), max_steps=STEPS)
        jax.block_until_ready(solution)
        return weakref.ref(data)

    reference = once()
    gc.collect()
    assert reference() is None
    assert len(programs._kept) <= kept


def test_method_and_its_schedule_are_freed() -> None:
    def objective(x: jax.Array) -> jax.Array:
        return square(1.0, x)

    def once() -> weakref.ref[Any]:
        table = jnp.full(1000, 0.1)
        solve(objective, gx.sgd(lambda count: table[count]))
        return weakref.ref(table)

    first = once()
    for _ in range(programs.MOST_PROGRAMS):
        programs._keep(objective, object(), len)  # others crowd it out
    gc.collect()
    assert first() is None
    assert len(programs._kept) == programs.MOST_PROGRAMS


def test_a_key_keeps_no_class_and_no_function_alive() -> None:
    def once() -> list[weakref.ref[Any]]:
        class Own:
            __slots__ = ("__weakref__", "value")

        class Kin(Holder):
            def __call__(self, x: Any) -> Any:
                return x

        own, kin, fn = Own(), Kin(), lambda: (own.value, kin)
        own.value = jnp.ones(1000)
        assert configuration_key(fn, kin, np.ones(1000)) is not None
        return [weakref.ref(x) for x in (Own, Kin, own, kin, fn, own.value)]

    references = once()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_no_tracer_is_kept() -> None:
    with jax.check_tracer_leaks():
        solve_to = lambda c: gx.minimize(lambda x: (x - c) ** 2, 0.0, gx.sgd(0.1)).params
        found = jax.vmap(solve_to)(jnp.arange(3.0))
        swept = jax.vmap(lambda r: gx.minimize(partial_bowl, 0.0, gx.sgd(r)).params)(
            jnp.asarray([0.1, 0.2])
        )
        again = gx.minimize(partial_bowl, 0.0, gx.sgd(0.1)).params
    np.testing.assert_allclose(found, jnp.arange(3.0), atol=1e-5)
    np.testing.assert_allclose([*swept, again], 1.0, atol=1e-5)


partial_bowl = functools.partial(square, 1.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: gx.sgd(0.05),
        lambda: gx.inject_hyperparams(gx.adam)(0.1),
        lambda: optax.inject_hyperparams(optax.adam)(0.1),
        lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
        lambda: gx.partition({"a": gx.sgd(0.1), "b": optax.set_to_zero()}, {"x": "a", "y": "b"}),
        lambda: gx.newton_cg(preconditioner=gx.hutchinson_diagonal(2)),
        lambda: optax.lbfgs(),
        lambda: gx.hessian_free(),
        lambda: None,
    ],
)
def test_methods_built_alike_have_one_key(build: Any) -> None:
    first, second = configuration_key(build()), configuration_key(build())
    assert first is not None
    assert first == second
