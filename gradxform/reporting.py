"""Calls of the user's ``progress`` from inside a compiled run, for single runs and for batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

from gradxform import tree


class Reporter(NamedTuple):
    """Whom to call, and how often."""

    progress: Callable[[Any], Any]
    every: int  #: steps between calls


def says_stop(reporter: Reporter, shown: tree.PyTree) -> bool:
    """Calls ``progress`` with ``shown``; whether it returned True."""
    answer = reporter.progress(shown)
    return isinstance(answer, bool | np.bool_ | jax.Array) and bool(answer)


def ask(reporter: Reporter, due: jax.Array, shown: tree.PyTree) -> jax.Array:
    """Calls ``progress`` with ``shown`` if ``due``, and returns whether it said True.

    Under ``jax.vmap`` there is one call with all lanes, if it is due for one of them.
    """
    leaves, structure = jax.tree.flatten(shown)

    def call(*values: Any) -> np.ndarray:
        return np.asarray(says_stop(reporter, jax.tree.unflatten(structure, values)))

    def called(due: jax.Array, *leaves: jax.Array) -> jax.Array:
        # JAX allows no callback with a declared effect in a loop of lanes; this one cannot get
        # lost, because its result decides how the loop goes on
        answer = jax.ShapeDtypeStruct((), jnp.bool)
        return jax.lax.cond(
            jnp.any(due),
            lambda: jax.pure_callback(call, answer, *leaves),
            lambda: jnp.array(False),
        )

    return _once_for_all_lanes(called)(due, *leaves)


def tell(reporter: Reporter, shown: tree.PyTree) -> None:
    """Calls ``progress`` with ``shown``, once for all lanes."""
    leaves, structure = jax.tree.flatten(shown)

    def call(*values: Any) -> None:
        reporter.progress(jax.tree.unflatten(structure, values))

    def called(*leaves: jax.Array) -> jax.Array:
        io_callback(call, None, *leaves)
        return jnp.array(False)

    _once_for_all_lanes(called)(*leaves)


def _once_for_all_lanes(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``function``, which under ``jax.vmap`` gets all lanes at once and has one result for all."""
    called = custom_vmap(function)

    @called.def_vmap
    def _(size: int, is_batched: Any, *arrays: jax.Array) -> tuple[jax.Array, bool]:
        lanes = [
            x if batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))
            for x, batched in zip(arrays, is_batched, strict=True)
        ]
        return _once_for_all_lanes(function)(*lanes), False

    return called
