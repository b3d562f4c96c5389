"""Arithmetic on parameter pytrees, shared by every method.

Optimiser state is kept, and every update computed, in at least float32: moments of bfloat16 or
float16 gradients lose their small terms, and ``b2 = 0.999`` is 1 in bfloat16. float64 stays
float64. An update is handed back in the dtype of the gradient it came from.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from gradxform.hyperparameters import shown

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 where it is narrower or no floating-point type.

    >>> wide(jnp.bfloat16)
    dtype('float32')
    """
    # jnp.promote_types refuses two dtypes under jax_numpy_dtype_promotion="strict"
    is_wide = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 4
    return jnp.dtype(dtype if is_wide else jnp.float32)


def promote(x: Array) -> Array:
    """``x`` in at least float32."""
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))


def map(f: Callable[..., Array], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` computed in at least float32 and returned in the dtypes of ``tree``.

    >>> g = jnp.asarray([0.1], jnp.bfloat16)
    >>> map(lambda v, g: 0.9 * v - g, jnp.zeros(1, jnp.float32), g).dtype
    dtype('float32')
    """
    return jax.tree.map(
        lambda x, *xs: f(promote(x), *(promote(y) for y in xs)).astype(jnp.asarray(x).dtype),
        tree,
        *rest,
    )


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(jnp.asarray(y).dtype), tree, like)


def map_unmasked(f: Callable[..., Array], params: PyTree, tree: PyTree) -> PyTree:
    """``map(f, params, tree)``, leaving alone what a mask took out of ``tree``."""

    def is_masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        return jax.tree.map(
            lambda x, p: p if is_masked(x) else map(f, p, x), tree, params, is_leaf=is_masked
        )
    except ValueError as error:
        raise ValueError(
            "the parameters and the optimiser state have different structures; give the parameters "
            "that init was given (of Flax NNX, nnx.as_pure of both; under optax.flatten, ravelled)"
        ) from error


def has_holes(params: PyTree) -> bool:
    """Whether a mask took leaves out of ``params``."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def unflatten(vector: PyTree, like: PyTree) -> PyTree:
    """The tree that ``vector`` was ravelled from; any other tree as it is."""
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(like))
    is_vector = getattr(vector, "shape", None) == (size,)
    if not is_vector or jnp.shape(vector) == getattr(like, "shape", None):
        return vector
    return ravel(jax.tree.map(promote, like))[1](vector)


def check_floating(params: PyTree, place: str = "params") -> None:
    """Raises a TypeError that names the first leaf which is not a real floating-point array."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        try:
            dtype = jnp.result_type(p)
        except Exception:  # JAX has an error of its own for every kind of object
            raise TypeError(
                f"{place}{jax.tree_util.keystr(path)} is {shown(p)}, which is no array: give the "
                "arrays alone, for instance eqx.filter(model, eqx.is_inexact_array)"
            ) from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{place}{jax.tree_util.keystr(path)} has dtype {dtype}; gradxform optimises real "
                "floating-point parameters: convert the leaf, or leave it out with gx.masked"
            )
        if jnp.finfo(dtype).bits < 16:
            raise TypeError(
                f"{place}{jax.tree_util.keystr(path)} has dtype {dtype}, which JAX does no "
                "arithmetic in: keep the parameters in float32 or bfloat16, and convert them to "
                f"{dtype} in the model"
            )


def difference(one: PyTree, other: PyTree, *, dtypes: bool = True) -> str | None:
    """How two trees differ in the paths, shapes and dtypes of their leaves; None if they do not.

    Leaves are compared, not nodes: a node of a class without ``==`` does not equal its own copy.
    """
    (paths, leaves), (other_paths, other_leaves) = (_with_paths(tree) for tree in (one, other))
    if paths != other_paths:
        apart = set(paths) ^ set(other_paths)
        first = next(path for path in (*paths, *other_paths) if path in (apart or paths))
        return f"the leaf {first or 'itself'} is only in one of them"
    for path, x, y in zip(paths, leaves, other_leaves, strict=True):
        where = f" at {path}" if path else ""
        if jnp.shape(x) != jnp.shape(y):
            return f"shape {jnp.shape(x)} against {jnp.shape(y)}{where}"
        if dtypes and jnp.result_type(x) != jnp.result_type(y):
            return f"dtype {jnp.result_type(x)} against {jnp.result_type(y)}{where}"
    return None


def _with_paths(tree: PyTree) -> tuple[list[str], list[Any]]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in pairs], [leaf for _, leaf in pairs]


def count(params: PyTree) -> int:
    """How many entries there are in all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


def count_int32(params: PyTree) -> int:
    """:func:`count`, at most the largest number that int32 holds, to be compared with counters."""
    return min(count(params), 2**31 - 1)


def zeros_like(params: PyTree) -> PyTree:
    """Zeros of the shape and sharding of ``params``, in at least float32: a fresh accumulator.

    Raises:
      TypeError: a leaf is not a real floating-point array.
    """
    check_floating(params)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide(jnp.result_type(p))), params)
    return sharded_like(zeros, params)


def copy(params: PyTree) -> PyTree:
    """A copy of ``params`` in at least float32, in buffers of its own: both can be donated."""
    return jax.tree.map(lambda zero, p: zero + promote(p), zeros_like(params), params)


def max_abs(tree: PyTree) -> Array:
    """The largest absolute entry, ``‖tree‖_∞``; 0 for a tree without entries, NaN if one is NaN."""
    entries = [jnp.max(jnp.abs(promote(x))) for x in jax.tree.leaves(tree) if jnp.size(x)]
    return jnp.max(jnp.stack(entries)) if entries else jnp.zeros((), jnp.float32)


def sqrt(x: Array) -> Array:
    """``√x`` with derivative 0 at ``x = 0``.

    The square root's own derivative there is infinite, and infinity times the zero derivative of
    ``g²`` makes a gradient taken *through* an update NaN wherever the inner gradient is zero.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), x)


def divide(x: Array, y: Array) -> Array:
    """``x / y``, and 0 where ``y = 0``: a coordinate that never had a gradient does not move."""
    zero = y == 0
    # the division comes last: XLA repeats cheaper operations in every kernel that needs the result
    return jnp.where(zero, 0, x) / jnp.where(zero, 1, y)


def square_bounded(grads: PyTree) -> PyTree:
    """``grads`` with finite entries bounded so that sums of a million of their squares are finite.

    A mean square that has once overflowed stops its parameter for ever.

    >>> bool(jnp.isfinite(1e6 * square_bounded(jnp.float32(-1e30)) ** 2))
    True
    """

    def bounded(g: Array) -> Array:
        bound = 2.0 ** (jnp.finfo(g.dtype).maxexp // 2 - 11)
        return jnp.where(jnp.isfinite(g), jnp.clip(g, -bound, bound), g)

    return map(bounded, grads)


def add_count(count: Array, more: Array | int) -> Array:
    """``count + more``, staying at the largest integer instead of overflowing."""
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count > largest - more, largest, count + more)


def norm(x: Array) -> Array:
    """``‖x‖`` of an array, with derivative 0 at 0 as :func:`sqrt`."""
    return sqrt(jnp.sum(jnp.square(x)))


def largest(dtype: jax.typing.DTypeLike = float) -> float:
    """The largest finite number: above every value, as infinity, but no alarm of a debugger."""
    return float(jnp.finfo(jnp.result_type(dtype)).max)


def vdot(a: PyTree, b: PyTree) -> Array:
    """The inner product Σ aᵢ bᵢ, accumulated in at least float32."""
    terms = jax.tree.map(lambda x, y: jnp.sum(promote(x) * promote(y)), a, b)
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), jnp.result_type(float)))


def scale(factor: Array, tree: PyTree) -> PyTree:
    """``factor`` times ``tree``, in the dtypes of ``tree``."""
    return map(lambda x: factor * x, tree)


def select(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where ``condition`` holds, else ``old``, in the dtypes of ``old``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y).astype(y.dtype), new, old)


def next_square(r: PyTree, step: Array, change: PyTree, new: PyTree) -> Array:
    """‖new‖² of ``new = r + step change``, to all digits but one or two.

    Of inner products that do not wait for ``step``, unless their terms cancel or there is but one
    device: where the parameters are sharded, one round of communication serves them and those that
    ``step`` comes from. As Chen & Carson, "Predict-and-recompute conjugate gradient variants", SIAM
    J. Sci. Comput. 42:A3084 (2020).
    """
    if jax.device_count() == 1:  # nothing to wait for
        return vdot(new, new)
    rr, changed = vdot(r, r), step**2 * vdot(change, change)
    predicted = rr + 2 * step * vdot(r, change) + changed
    resolved = predicted > 0.1 * (rr + changed)
    return jax.lax.cond(resolved, lambda: predicted, lambda: vdot(new, new))


def reciprocal(x: Array) -> Array:
    """``1 / x`` for a size ``x``, and 1 where that is not finite: for 0 and NaN."""
    usable = x > 2.0 ** -jnp.finfo(x.dtype).maxexp  # else 1 / x overflows
    return 1 / jnp.where(usable, x, 1)


# -- what is sharded over devices


def is_explicit(x: Any) -> bool:
    """Whether ``x`` is divided along explicit mesh axes, which JAX shows in its type."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is seen to be divided among devices; tracers show explicit mesh axes alone."""
    is_array = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    sharding = x.sharding if is_array else jax.typeof(x).sharding
    return not sharding.is_fully_replicated


def check_whole(method: str, params: PyTree) -> None:
    """Raises a ValueError that names the first leaf which is seen to be sharded."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if is_sharded(p):
            raise ValueError(
                f"{method}(ravel=True): params{jax.tree_util.keystr(path)} is sharded, and one "
                "vector of all would be whole on every device; give ravel=False"
            )


def whole(x: Array) -> NamedSharding | None:
    """The sharding that a sum over all of ``x`` is to be given, where JAX does not choose it."""
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()) if is_explicit(x) else None


def ravel(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """``ravel_pytree`` of leaves that may be sharded: the vector is whole on every device."""

    def gather(x: Array) -> Array:
        return jax.sharding.reshard(x, whole(x)) if is_explicit(x) else x

    vector, unravel = ravel_pytree(jax.tree.map(gather, tree))
    return vector, lambda v: sharded_like(unravel(v), tree)


def sharded_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` on the devices where ``like``, of the same shapes, is."""
    return jax.tree.map(_sharded_like, tree, like)


def _sharded_like(x: Array, like: Any) -> Array:
    if is_explicit(like):
        return jax.sharding.reshard(x, jax.typeof(like).sharding)
    if isinstance(like, Tracer):
        if jax.device_count() == 1:
            return x
        # the compiler finds the sharding, and an operation on the entries of both gives them one
        return jnp.where(like > jnp.inf, jnp.zeros((), x.dtype), x)
    return jax.device_put(x, like.sharding) if is_sharded(like) and not isinstance(x, Tracer) else x


def varying_like(values: PyTree, like: PyTree) -> PyTree:
    """``values``, marked as different on every device that has its own ``like``.

    Inside ``jax.shard_map`` the type of an array says over which mesh axes it may differ, and a
    loop must begin with the types that it ends with: the constants that it begins with are marked
    here. Everywhere else this does nothing.
    """
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(like)]
    axes = frozenset[Any]().union(*(t.varying for t in types))
    if not axes:
        return values

    def mark(x: Any) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying")

    return jax.tree.map(mark, values)


def rows_like(matrix: Array, like: PyTree) -> PyTree:
    """A matrix with its rows where the entries of ``like`` are: leaves (*shape, columns)."""
    _, unravel = ravel(like)
    return _rows_sharded_like(jax.vmap(unravel, in_axes=-1, out_axes=-1)(matrix), like)


def identity_rows(like: PyTree) -> PyTree:
    """The rows of the identity, in at least float32; no device makes more than its own."""
    leaves, structure = jax.tree.flatten(jax.tree.map(promote, like))
    *starts, size = itertools.accumulate((x.size for x in leaves), initial=0)

    def ones(start: int, x: Array) -> Array:
        row = jnp.arange(start, start + x.size).reshape(*x.shape, 1)
        column = jnp.arange(size).reshape(*[1] * x.ndim, size)
        return (row == column).astype(x.dtype)

    rows = [ones(i, x) for i, x in zip(starts, leaves, strict=True)]
    return _rows_sharded_like(jax.tree.unflatten(structure, rows), like)


def _rows_sharded_like(rows: PyTree, like: PyTree) -> PyTree:
    if not any(isinstance(x, Tracer) or is_sharded(x) for x in jax.tree.leaves(like)):
        return rows
    places = jax.tree.map(lambda x, rows: jnp.broadcast_to(x[..., None], rows.shape), like, rows)
    return sharded_like(rows, places)


def outer(x: Array, row: Array) -> Array:
    """``x[..., i] row[j]``: entries of a vector like ``x`` times a ravelled one."""
    return x[..., None] * jnp.expand_dims(row, range(x.ndim))


def rows_dot(rows: PyTree, vector: PyTree) -> PyTree:
    """The matrix times a vector, both like the parameters."""
    whole_vector, _ = ravel(vector)
    return jax.tree.map(lambda x: jnp.tensordot(x, whole_vector, 1), rows)
