import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradxform as gx
from tests.wrappers.cases import X, Y, close


class Net(nnx.Module):
    """With everything that is not a parameter: batch statistics and random counters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.LoRA(4, 2, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def net_loss(model: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x)[:, 0] - y) ** 2)


def test_nnx_value_fn_is_the_loss_that_the_gradient_was_taken_of() -> None:
    model = Net(nnx.Rngs(0))

    @nnx.jit
    def both(model: Net, x: jax.Array, y: jax.Array) -> Any:
        value_fn = gx.nnx_value_fn(model, net_loss)
        value, grads = nnx.value_and_grad(net_loss)(model, x, y)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        again, by_value_fn = jax.value_and_grad(value_fn)(params, x, y=y)
        return value, again, nnx.as_pure(grads), by_value_fn

    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    value, again, grads, by_value_fn = both(model, X, Y)
    close(again, value)
    close(jax.tree.leaves(by_value_fn), jax.tree.leaves(grads), rtol=1e-5, atol=1e-6)
    after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    assert not np.allclose(jax.tree.leaves(before)[0], jax.tree.leaves(after)[0])  # by the model

    value_fn = gx.nnx_value_fn(model, net_loss)
    unchanged = nnx.as_pure(nnx.state(model))
    value_fn(nnx.state(model, nnx.Param), X, Y)  # and not by value_fn
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), unchanged)


def test_nnx_value_fn_with_other_parameters_and_data_by_keyword() -> None:
    model = Net(nnx.Rngs(0))
    model.eval()
    optimizer = nnx.Optimizer(model, gx.coordinate_descent("greedy"), wrt=nnx.LoRAParam)

    @nnx.jit
    def train_step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        value_fn = gx.nnx_value_fn(model, net_loss, wrt=nnx.LoRAParam)
        grad = nnx.value_and_grad(net_loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
        value, grads = grad(model, x, y)
        optimizer.update(model, grads, value=value, value_fn=value_fn, x=x, y=y)
        return value

    kernel = np.asarray(model.hidden.kernel[...])
    values = [float(train_step(model, optimizer, X, Y)) for _ in range(4)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    np.testing.assert_array_equal(model.hidden.kernel[...], kernel)


def test_nnx_value_fn_says_that_it_needs_flax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match="pip install flax"):
        gx.nnx_value_fn(None, lambda model: 0.0)
