"""The quick test whether what a program reads is the same: never yes where something changed."""

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform.configuration import configuration_key
from gradxform.glance import glance

FACTOR = 2.0
CONFIG = {"scale": [1.0, 2.0]}


def looked_at(*values: Any) -> Callable[[Any], bool] | None:
    assert configuration_key(*values) is not None
    return glance(values)


def reader() -> tuple[Callable[[Any], Any], Callable[[float], None]]:
    shift, array = 1.0, jnp.arange(3.0)

    def change(value: float) -> None:
        nonlocal shift
        shift = value

    def inner(x: Any, power: float = 2.0) -> Any:
        return CONFIG["scale"][0] * FACTOR * jnp.sum((x - shift - array) ** power)

    return lambda x: inner(x), change


def test_says_yes_to_the_same_values() -> None:
    fn, _ = reader()
    tx = gx.bfgs()
    unchanged = looked_at(fn, tx, "best", None, True)
    assert unchanged is not None
    assert unchanged((fn, tx, "best", None, True))
    assert unchanged((fn, type(tx)(*tx), "best", None, True))
    assert not unchanged((fn, gx.bfgs(), "best", None, True))
    assert not unchanged((fn, tx, "last", None, True))
    assert not unchanged((reader()[0], tx, "best", None, True))


def inner_of(fn: Any) -> Any:
    return fn.__closure__[0].cell_contents


CHANGES: dict[str, Callable[[Any, Any, pytest.MonkeyPatch], Any]] = {
    "global": lambda fn, change, patch: patch.setitem(globals(), "FACTOR", 3.0),
    "closure": lambda fn, change, patch: change(3.0),
    "list": lambda fn, change, patch: CONFIG["scale"].insert(0, 3.0),
    "longer_list": lambda fn, change, patch: patch.setitem(CONFIG, "scale", [1.0, 2.0, 3.0]),
    "dictionary": lambda fn, change, patch: patch.setitem(CONFIG, "more", 3.0),
    "default": lambda fn, change, patch: patch.setattr(inner_of(fn), "__defaults__", (3.0,)),
    "code": lambda fn, change, patch: patch.setattr(fn, "__code__", other_code(fn)),
    "attribute": lambda fn, change, patch: patch.setattr(fn, "mark", 1, raising=False),
}


def other_code(fn: Any) -> types.CodeType:
    return fn.__code__.replace(co_consts=(*fn.__code__.co_consts, 1))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("jitted", [False, True])
def test_says_no_after_a_change(change: str, jitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG, "scale", [1.0, 2.0])
    fn, rebind = reader()
    given = jax.jit(fn) if jitted else fn
    unchanged = looked_at(given)
    assert unchanged is not None
    assert unchanged((given,))
    CHANGES[change](fn, rebind, monkeypatch)
    assert not unchanged((given,))


class Holder:
    scale = 1.0


HELD = np.ones(2)
HOLDER = Holder()


@pytest.mark.parametrize(
    "value", [HELD, HOLDER, {1.0}, bytearray(b"a"), lambda x: HELD * x, lambda x: HOLDER.scale * x]
)
def test_does_not_know_what_may_change_inside(value: Any) -> None:
    assert glance((value,)) is None


def test_keeps_nothing_alive() -> None:
    fn, _ = reader()
    held = weakref.ref(fn), weakref.ref(inner_of(fn))
    unchanged = looked_at(fn)
    assert unchanged is not None
    del fn
    gc.collect()
    assert all(reference() is None for reference in held)


def test_a_function_that_reads_itself() -> None:
    def again(x: Any) -> Any:
        return again(x - 1) if x > 0 else x

    unchanged = looked_at(again)
    assert unchanged is not None
    assert unchanged((again,))


def test_minimize_sees_a_change_after_many_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []

    def bowl(x: jax.Array) -> jax.Array:
        traces.append(None)
        return (x - FACTOR) ** 2

    tx = gx.sgd(0.5)
    for _ in range(4):
        assert gx.minimize(bowl, jnp.asarray(0.0), tx).params == 2.0
    made = len(traces)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert gx.minimize(bowl, jnp.asarray(0.0), tx).params == 3.0
    assert len(traces) == 2 * made
