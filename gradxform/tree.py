"""Arithmetic on parameter pytrees, shared by every method.

Optimiser states and updates are computed in at least float32. Moments of bfloat16 or float16
gradients would lose their small terms, and ``b2 = 0.999`` is 1 in bfloat16. float64 stays float64.
An update is returned in the dtype of its gradient. complex64 and complex128 stay as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradxform.sharding import is_explicit, sharded_like, whole

PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """``dtype``, or float32 if it is narrower, or neither floating-point nor complex.

    >>> wide(jnp.bfloat16)
    dtype('float32')
    """
    # jnp.promote_types refuses two dtypes under jax_numpy_dtype_promotion="strict"
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return jnp.dtype(dtype if is_wide else jnp.float32)


def is_complex(x: Any) -> bool:
    """Whether ``x``, a leaf of any kind, is a complex number or array."""
    return isinstance(x, complex) or getattr(getattr(x, "dtype", None), "kind", None) == "c"


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
        lambda x, *xs: _cast(f(promote(x), *(promote(y) for y in xs)), jnp.asarray(x).dtype),
        tree,
        *rest,
    )


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: _cast(x, jnp.asarray(y).dtype), tree, like)


def _cast(x: Array, dtype: jnp.dtype) -> Array:
    """``x`` in ``dtype``, unless that would drop imaginary parts."""
    if is_complex(x) and dtype.kind != "c":
        raise TypeError(
            "update: some gradients are complex where init got real parameters, or real where it "
            "got complex ones: pass gradients of the same dtypes as the parameters"
        )
    return x.astype(dtype)


def cast_floating_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` with the floating-point dtypes of ``like``; other leaves stay as they are.

    A float32 hyperparameter times a bfloat16 moment is float32, but a scan needs bfloat16 again.
    """

    def cast(old: jax.typing.ArrayLike, new: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        dtype = jnp.result_type(old)
        is_kept = not jnp.issubdtype(dtype, jnp.inexact) or (is_complex(new) and dtype.kind != "c")
        return new if is_kept else jnp.asarray(new, dtype=dtype)

    return jax.tree.map(cast, like, tree)


def ravel(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """``ravel_pytree`` for leaves that may be sharded; every device gets the full vector."""

    def gather(x: Array) -> Array:
        return jax.sharding.reshard(x, whole(x)) if is_explicit(x) else x

    vector, unravel = ravel_pytree(jax.tree.map(gather, tree))
    return vector, lambda v: sharded_like(unravel(v), tree)


def unflatten(vector: PyTree, like: PyTree) -> PyTree:
    """The tree that ``vector`` was ravelled from. Any other tree is returned as it is."""
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(like))
    is_vector = getattr(vector, "shape", None) == (size,)
    if not is_vector or jnp.shape(vector) == getattr(like, "shape", None):
        return vector
    return ravel(jax.tree.map(promote, like))[1](vector)


def count(params: PyTree) -> int:
    """The number of entries in all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


def count_int32(params: PyTree) -> int:
    """:func:`count`, limited to the largest int32, for comparisons with counters."""
    return min(count(params), 2**31 - 1)


def zeros_like(params: PyTree) -> PyTree:
    """Zeros with the shapes and sharding of ``params``, in at least float32."""
    return _zeros(wide, params)


def squares_like(params: PyTree) -> PyTree:
    """Zeros like ``params`` for their squares ``|p|²``, which are real for complex ``p`` too."""
    return _zeros(lambda dtype: jnp.finfo(wide(dtype)).dtype, params)


def _zeros(dtype_of: Callable[[jnp.dtype], jnp.dtype], params: PyTree) -> PyTree:
    def of_leaf(p: jax.typing.ArrayLike) -> Array:
        dtype = dtype_of(jnp.result_type(p))
        one_device = jax.device_count() == 1
        return zeros(jnp.shape(p), dtype) if one_device else jnp.zeros_like(p, dtype=dtype)

    return sharded_like(jax.tree.map(of_leaf, params), params)


def zeros(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> Array:
    """Zeros for which nothing is compiled: ``jnp.zeros`` compiles a program for each shape."""
    return jnp.asarray(np.broadcast_to(np.zeros((), dtype), shape))


def copy(params: PyTree) -> PyTree:
    """A copy of ``params`` in at least float32, in new buffers, so that both can be donated."""
    return jax.tree.map(lambda zero, p: zero + promote(p), zeros_like(params), params)


def magnitudes(x: Array) -> Array:
    """Absolute values, with infinity for NaN; of a complex number, that of its larger part.

    On a CPU, XLA may lose a NaN (but not an infinity) in the maxima of a batch of vectors; seen up
    to jax 0.12.

    >>> magnitudes(jnp.asarray([-2.0, jnp.nan]))
    Array([ 2., inf], dtype=float32)
    """
    if is_complex(x):
        return jnp.maximum(magnitudes(jnp.real(x)), magnitudes(jnp.imag(x)))
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def max_abs(tree: PyTree) -> Array:
    """The largest absolute entry, ``‖tree‖_∞``; 0 for a tree without entries.

    It is infinite if an entry is NaN.
    """
    entries = [jnp.max(magnitudes(promote(x))) for x in jax.tree.leaves(tree) if jnp.size(x)]
    return jnp.max(jnp.stack(entries)) if entries else jnp.zeros((), jnp.float32)


def sqrt(x: Array) -> Array:
    """``√x`` with derivative 0 at ``x = 0``.

    The true derivative at 0 is infinite. Times the zero derivative of ``g²`` it would be NaN, in
    gradients taken *through* an update whose own gradient is zero.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), x)


def divide(x: Array, y: Array) -> Array:
    """``x / y`` for a real y, and 0 if ``y = 0``: a parameter without a gradient does not move."""
    if is_complex(x):  # real divisions are faster and more accurate than a complex one
        return jax.lax.complex(divide(jnp.real(x), y), divide(jnp.imag(x), y))
    zero = y == 0
    # the division comes last, because XLA repeats cheaper operations in every kernel that uses them
    return jnp.where(zero, 0, x) / jnp.where(zero, 1, y)


def square_bounded(grads: PyTree) -> PyTree:
    """``grads`` with large entries clipped so that a sum of a million squares stays finite.

    A mean square that overflows once would stop its parameter for ever.

    >>> bool(jnp.isfinite(1e6 * square_bounded(jnp.float32(-1e30)) ** 2))
    True
    """

    def bounded(g: Array) -> Array:
        if is_complex(g):
            return jax.lax.complex(bounded(jnp.real(g)), bounded(jnp.imag(g)))
        bound = 2.0 ** (jnp.finfo(g.dtype).maxexp // 2 - 11)
        return jnp.where(jnp.isfinite(g), jnp.clip(g, -bound, bound), g)

    return map(bounded, grads)


def add_count(count: Array, more: Array | int) -> Array:
    """``count + more``, or the largest integer instead of an overflow."""
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count > largest - more, largest, count + more)


def norm(x: Array) -> Array:
    """``‖x‖`` of an array, with derivative 0 at 0 like :func:`sqrt`."""
    return sqrt(jnp.sum(jnp.square(x)))


def spacings(tree: PyTree) -> list[float]:
    """The relative spacing of floating-point numbers in the dtype of each leaf."""
    return [float(jnp.finfo(jnp.asarray(x).dtype).eps) for x in jax.tree.leaves(tree)]


def largest(dtype: jax.typing.DTypeLike = float) -> float:
    """The largest finite number. Unlike infinity it does not alarm JAX's debugging modes."""
    return float(jnp.finfo(jnp.result_type(dtype)).max)


def product(x: Array, y: Array) -> Array:
    """``x y``, entry by entry; for complex arrays Re(x ȳ), the product of two vectors (Re, Im).

    >>> float(product(jnp.asarray(3 + 4j), jnp.asarray(3 + 4j)))
    25.0
    """
    return jnp.real(x * jnp.conj(y)) if is_complex(x) else x * y


def vdot(a: PyTree, b: PyTree) -> Array:
    """The inner product Σ aᵢ bᵢ, accumulated in at least float32."""
    terms = jax.tree.map(lambda x, y: jnp.sum(product(promote(x), promote(y))), a, b)
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), jnp.result_type(float)))


def scale(factor: Array, tree: PyTree) -> PyTree:
    """``factor`` times ``tree``, in the dtypes of ``tree``."""
    return map(lambda x: factor * x, tree)


def select(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``condition`` holds, otherwise ``old``, in the dtypes of ``old``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y).astype(y.dtype), new, old)


def next_square(r: PyTree, step: Array, change: PyTree, new: PyTree) -> Array:
    """‖new‖² for ``new = r + step change``, accurate to all but one or two digits.

    With several devices it is predicted from inner products that do not depend on ``step``. So one
    round of communication serves both these and the inner products that ``step`` comes from. If
    the terms cancel, it is computed from ``new``. See Chen & Carson, "Predict-and-recompute
    conjugate gradient variants", SIAM J. Sci. Comput. 42:A3084 (2020).
    """
    if jax.device_count() == 1:  # no communication
        return vdot(new, new)
    rr, changed = vdot(r, r), step**2 * vdot(change, change)
    predicted = rr + 2 * step * vdot(r, change) + changed
    resolved = predicted > 0.1 * (rr + changed)
    return jax.lax.cond(resolved, lambda: predicted, lambda: vdot(new, new))


def reciprocal(x: Array) -> Array:
    """``1 / x`` for a size ``x``, and 1 if ``x`` is 0, NaN or infinite."""
    usable = (x > 2.0 ** -jnp.finfo(x.dtype).maxexp) & (x < jnp.inf)  # else 1 / x overflows
    return 1 / jnp.where(usable, x, 1)
