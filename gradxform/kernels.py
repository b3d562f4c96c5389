"""Fewer kernels: the time of a small problem depends on the number of kernels.

XLA makes a kernel for each reduction, and one for each number that several others depend on. The
functions of this module do not change results. They let XLA compute several numbers in one kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gradxform import tree
from gradxform.sharding import is_explicit

T = TypeVar("T")

# largest leaf for which two reductions are made as one, of both leaves stacked; with larger ones
# the copy would cost more than the second kernel
_SMALL = 4096


def unless_batched(
    packed: Callable[..., Sequence[jax.Array]],
    plain: Callable[..., Sequence[jax.Array]],
    *arrays: jax.Array,
    out_avals: Sequence[Any] | None = None,
) -> list[jax.Array]:
    """``packed(*arrays)`` in compiled programs, and ``plain(*arrays)`` under ``jax.vmap``.

    Both compute the same. In a batch the scalars are vectors already, and packing them costs more
    than it saves. ``plain`` is also used for derivatives and outside ``jax.jit``. Neither function
    may close over arrays. ``out_avals`` are the abstract values of the results, if they are known.
    """
    avals = jax.make_jaxpr(plain)(*arrays).out_avals if out_avals is None else out_avals
    return _unless_batched.bind(*arrays, packed=packed, plain=plain, avals=tuple(avals))


def in_one_kernel(values: T) -> T:
    """``values``, a pytree of scalars, computed by one kernel instead of one for each.

    The compiled program writes the floating-point numbers and flags to one vector and reads them
    from it.
    """
    leaves, structure = jax.tree.flatten(values)
    floating = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    if len(set(floating)) != 1:
        return values
    packed = [x.dtype in (floating[0], jnp.bool) for x in leaves]
    chosen = [x for x, is_in in zip(leaves, packed, strict=True) if is_in]
    bound = iter(unless_batched(_pack_and_unpack, lambda *scalars: scalars, *chosen))
    leaves = [next(bound) if is_in else x for x, is_in in zip(leaves, packed, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def vector(scalars: Sequence[jax.Array]) -> jax.Array:
    """A vector of ``scalars``, by a chain of selects.

    XLA computes the chain and the arithmetic before it in one kernel. A concatenation would not do:
    XLA splits it into one kernel for each scalar.
    """
    # XLA cannot tell that this is 0. With a constant, XLA would move the comparisons of ``place``
    # out of a loop, into one kernel for each.
    zero = ((scalars[0] < 0) & (scalars[0] > 0)).astype(jnp.int32)
    place = zero + jax.lax.iota(jnp.int32, len(scalars))
    chosen = jnp.zeros(len(scalars), scalars[0].dtype)
    for i, x in enumerate(scalars):
        chosen = jnp.where(place == i, x, chosen)
    return chosen


def vdots(*pairs: tuple[tree.PyTree, tree.PyTree]) -> list[jax.Array]:
    """:func:`gradxform.tree.vdot` of several pairs of trees of the same shapes, in one pass."""

    def separate(pairs: Sequence[tuple[tree.PyTree, tree.PyTree]]) -> list[jax.Array]:
        return [tree.vdot(a, b) for a, b in pairs]

    def stacked(pairs: Sequence[tuple[tree.PyTree, tree.PyTree]]) -> list[jax.Array]:
        products = [jax.tree.map(_product, a, b) for a, b in pairs]
        sums = [jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in _stacked(products)]
        total = sum(sums, start=jnp.zeros(len(pairs), jnp.result_type(float)))
        return [total[i] for i in range(len(pairs))]

    return _in_one_pass(stacked, separate, pairs)


def maxima(*trees: tree.PyTree) -> list[jax.Array]:
    """The largest entries of several trees of the same shapes, in one pass; 0 without entries.

    A NaN may be lost; see :func:`gradxform.tree.magnitudes`.
    """

    def separate(trees: Sequence[tree.PyTree]) -> list[jax.Array]:
        return [_maximum(x) for x in trees]

    def stacked(trees: Sequence[tree.PyTree]) -> list[jax.Array]:
        largest = [jnp.max(x, axis=tuple(range(1, x.ndim))) for x in _stacked(trees)]
        total = functools.reduce(jnp.maximum, largest)
        return [total[i] for i in range(len(trees))]

    return _in_one_pass(stacked, separate, trees)


def max_abs(*trees: tree.PyTree) -> list[jax.Array]:
    """:func:`gradxform.tree.max_abs` of several trees of the same shapes, in one pass."""
    return maxima(*(jax.tree.map(lambda y: tree.magnitudes(tree.promote(y)), x) for x in trees))


def quotients(*pairs: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """:func:`gradxform.tree.divide` of several pairs of scalars, in one division."""
    above, below = (vector(x) for x in zip(*pairs, strict=True))
    divided = tree.divide(above, below)
    return [divided[i] for i in range(len(pairs))]


def _maximum(values: tree.PyTree) -> jax.Array:
    entries = [jnp.max(tree.promote(x)) for x in jax.tree.leaves(values) if jnp.size(x)]
    return jnp.max(jnp.stack(entries)) if entries else jnp.zeros((), jnp.float32)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return tree.promote(x) * tree.promote(y)


def _in_one_pass(
    stacked: Callable[[Any], list[jax.Array]],
    separate: Callable[[Any], list[jax.Array]],
    trees: Any,
) -> list[jax.Array]:
    """``stacked(trees)`` if copying the trees is cheaper than another kernel, else ``separate``."""
    leaves, structure = jax.tree.flatten(trees)
    is_small = bool(leaves) and all(0 < jnp.size(x) <= _SMALL for x in leaves)
    if not is_small or any(is_explicit(x) for x in leaves):
        return separate(trees)

    def of_leaves(function: Callable[[Any], list[jax.Array]]) -> Callable[..., list[jax.Array]]:
        return lambda *leaves: function(jax.tree.unflatten(structure, leaves))

    return unless_batched(of_leaves(stacked), of_leaves(separate), *leaves)


def _stacked(trees: Sequence[tree.PyTree]) -> list[jax.Array]:
    """The leaves of the trees, stacked along a new first axis, in at least float32."""
    return [
        jnp.stack([tree.promote(x) for x in leaves])
        for leaves in zip(*map(jax.tree.leaves, trees), strict=True)
    ]


def _pack_and_unpack(*scalars: jax.Array) -> list[jax.Array]:
    dtype = next(x.dtype for x in scalars if x.dtype != jnp.bool)
    if len(scalars) == 1:
        return [_settled(scalars[0])]
    packed = _settled(vector([x.astype(dtype) for x in scalars]))
    return [packed[i].astype(x.dtype) for i, x in enumerate(scalars)]


def _settled(x: jax.Array) -> jax.Array:
    """``x`` divided by 1, in a way that XLA cannot simplify.

    XLA repeats cheap operations in every kernel that needs their result, but not divisions.
    """
    return x / jnp.where(x != x, 2, 1).astype(x.dtype)


def _batched(axis: Any, arrays: Sequence[Any], dims: Sequence[Any], **parameters: Any) -> Any:
    if all(dim is None for dim in dims):  # of a part of a program that does not see the batch
        results = _unless_batched.bind(*arrays, **parameters)
        return results, [None] * len(results)
    lanes = jax.vmap(
        parameters["plain"],
        in_axes=tuple(dims),
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    results = list(lanes(*arrays))
    return results, [0] * len(results)


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> Any:
    dense = tuple(ad.instantiate_zeros(x) for x in tangents)
    return jax.jvp(lambda *arrays: list(parameters["plain"](*arrays)), tuple(primals), dense)


_unless_batched = Primitive("unless_batched")
_unless_batched.multiple_results = True
_unless_batched.def_impl(lambda *arrays, plain, **_: list(plain(*arrays)))
_unless_batched.def_abstract_eval(lambda *_, avals, **others: list(avals))
mlir.register_lowering(
    _unless_batched,
    mlir.lower_fun(lambda *arrays, packed, **_: packed(*arrays), multiple_results=True),
)
ad.primitive_jvps[_unless_batched] = _differentiated
batching.fancy_primitive_batchers[_unless_batched] = _batched
