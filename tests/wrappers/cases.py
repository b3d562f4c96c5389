"""What the tests of the wrappers share: two coupled parts of parameters, and a data set."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from tests.methods import nested_params, objective

close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-7)


def coupled(params: Any) -> jax.Array:
    """Two parts that depend on each other: the minimum over "on" is not at a minimum of "off"."""
    both = jnp.sum(params["on"]["kernel"]) - 2 * jnp.sum(params["off"])
    return objective(params) + 0.5 * jnp.square(both)


START = {"on": nested_params()["dense"] | {"bias": jnp.ones(2)}, "off": jnp.asarray([1.0, 2.0])}
MASK = {"on": True, "off": False}
LABELS = {"on": "train", "off": "freeze"}
FREEZE = optax.set_to_zero()


def described(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


X = jax.random.normal(jax.random.key(1), (12, 3))
Y = jnp.sin(X.sum(axis=1))
