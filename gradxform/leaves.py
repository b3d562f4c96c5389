"""The leaves of pytrees: their dtypes, the differences of two trees, and masked leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import shown
from gradxform.tree import Array, PyTree

_USUAL = {jnp.dtype(name) for name in ("float32", "float64", "bfloat16", "float16")}


def is_usual(leaf: Any) -> bool:
    """Whether a leaf is a JAX array of one of the usual floating-point types."""
    return isinstance(leaf, jax.Array) and leaf.dtype in _USUAL


def check_floating(params: PyTree, place: str = "params") -> bool:
    """Whether a leaf is complex.

    Raises:
      TypeError: a leaf is not an array of floating-point or complex numbers; the error names it.
    """
    if all(map(is_usual, jax.tree.leaves(params))):
        return False
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        try:
            dtype = jnp.result_type(p)
        except Exception:  # JAX raises different errors for different objects
            raise TypeError(
                f"{place}{jax.tree_util.keystr(path)} is {shown(p)}, which is no array: pass only "
                "the arrays, for instance eqx.filter(model, eqx.is_inexact_array)"
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{place}{jax.tree_util.keystr(path)} has dtype {dtype}; gradxform optimises "
                "floating-point or complex parameters: convert the leaf, or exclude it with "
                "gx.masked"
            )
        if jnp.finfo(dtype).bits < 16:
            raise TypeError(
                f"{place}{jax.tree_util.keystr(path)} has dtype {dtype}, which JAX cannot compute "
                "with: keep the parameters in float32 or bfloat16, and convert them to "
                f"{dtype} in the model"
            )
    return any(map(tree.is_complex, jax.tree.leaves(params)))


def difference(one: PyTree, other: PyTree, *, dtypes: bool = True) -> str | None:
    """The first difference of two trees in the paths, shapes and dtypes of their leaves, or None.

    With ``dtypes=False`` only real and complex leaves differ in dtype.

    Leaves are compared instead of tree structures, because a node of a class without ``==`` does
    not equal its own copy.
    """
    (paths, leaves), (other_paths, other_leaves) = map(_with_paths, (one, other))
    if paths != other_paths:
        apart = set(paths) ^ set(other_paths)
        first = next(path for path in (*paths, *other_paths) if path in (apart or paths))
        return f"the leaf {first or 'itself'} is only in one of them"
    for path, x, y in zip(paths, leaves, other_leaves, strict=True):
        where = f" at {path}" if path else ""
        if jnp.shape(x) != jnp.shape(y):
            return f"shape {jnp.shape(x)} against {jnp.shape(y)}{where}"
        if tree.is_complex(x) != tree.is_complex(y):
            return f"dtype {jnp.result_type(x)} against {jnp.result_type(y)}{where}"
        if dtypes and jnp.result_type(x) != jnp.result_type(y):
            return f"dtype {jnp.result_type(x)} against {jnp.result_type(y)}{where}"
    return None


def _with_paths(values: PyTree) -> tuple[list[str], list[Any]]:
    pairs = jax.tree_util.tree_leaves_with_path(values)
    return [jax.tree_util.keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs]


def has_holes(params: PyTree) -> bool:
    """Whether a mask has removed leaves from ``params``."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def map_unmasked(f: Callable[..., Array], params: PyTree, values: PyTree) -> PyTree:
    """``tree.map(f, params, values)``; leaves that a mask removed from ``values`` stay."""

    def is_masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        return jax.tree.map(
            lambda x, p: p if is_masked(x) else tree.map(f, p, x), values, params, is_leaf=is_masked
        )
    except ValueError as error:
        raise ValueError(
            "the parameters and the optimiser state have different structures; pass the parameters "
            "that init got (with Equinox, eqx.filter(model, eqx.is_inexact_array); with Flax NNX, "
            "nnx.as_pure of both; under optax.flatten, ravelled ones)"
        ) from error
