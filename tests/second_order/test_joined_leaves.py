"""Trees with their small leaves joined, as on one device; the tests have eight."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradxform as gx
from gradxform import tree
from gradxform.second_order.joined_leaves import joined


@pytest.fixture
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def some_tree() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "empty": (0, 2), "large": (200, 200), "number": ()}
    leaves = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    return {**leaves, "half": jnp.ones(4, jnp.bfloat16), "none": None}


@pytest.mark.usefixtures("_one_device")
def test_joining_loses_nothing() -> None:
    whole = some_tree()
    parts = joined(whole)
    assert sorted(x.shape for x in parts) == [(4,), (18,), (200, 200)]
    np.testing.assert_allclose(tree.vdot(parts, parts), tree.vdot(whole, whole), rtol=1e-6)
    assert float(tree.max_abs(parts)) == float(tree.max_abs(whole))
    assert joined({}) == []


def test_with_several_devices_the_leaves_stay() -> None:
    whole = some_tree()
    assert len(joined(whole)) == len(jax.tree.leaves(whole))


def test_a_step_on_one_device_is_that_of_leaf_by_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=(32, n)), jnp.float32) for n in (4, 3))
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.zeros(3)}
    traced = []

    def run() -> gx.Solution:
        def model(p: Any, x: jax.Array) -> jax.Array:  # its own, so that it is compiled again
            traced.append(jax.device_count())
            return jnp.tanh(x @ p["w"] + p["b"])

        objective = gx.compose(lambda z, y: jnp.mean((z - y) ** 2), model, x=x, y=y)
        return gx.minimize(objective, params, gx.kronecker(), max_steps=6)

    leaf_by_leaf = run()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    together = run()
    assert {1, 8} == set(traced)
    chex.assert_trees_all_close(together.params, leaf_by_leaf.params, rtol=1e-3, atol=1e-5)
    first = jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)
    assert float(together.value) < 0.7 * float(first)
