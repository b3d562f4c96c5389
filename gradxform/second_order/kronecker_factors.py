"""Kronecker factors of the Gauss–Newton matrix, estimated from random backward passes.

J is the Jacobian of the model and H the Hessian of the loss in the outputs. For random signs ε ::

    V = Jᵀ H^½ ε,    E[vec V (vec V)ᵀ] = JᵀHJ, the Gauss–Newton matrix

For a parameter of m × n entries, with V as a matrix of that shape::

    L = E[V Vᵀ],    R = E[Vᵀ V],    its block of JᵀHJ ≈ L ⊗ R / tr L

It needs no knowledge of the layers: the shapes of the parameters say everything. Shared weights,
embeddings, convolutions and attention are treated alike, in each order of their axes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from gradxform import tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order import positive_definite
from gradxform.second_order import random_passes as passes
from gradxform.second_order.joined_leaves import joined
from gradxform.second_order.kronecker_rows import by_rows, gathered
from gradxform.sharding import is_explicit, sharded_like, varying_like, whole

T = TypeVar("T")

_FIRST = 10  # updates that make new factors in each
_EARLY = 4  # as many times ``inverse_every`` is the end of the early updates
_LITTLE = 0.25  # of the work of the larger inverses


class Pair(NamedTuple):
    """The two factors of one parameter, or what they are inverted to.

    A factor is a matrix, or its diagonal if the side is too long, with a leading axis for a stack.
    """

    left: jax.Array  #: of the rows
    right: jax.Array  #: of the columns


# trees like the parameters, with a pair for each leaf, or the mean V² and None for a vector
Factors: TypeAlias = tree.PyTree
Inverses: TypeAlias = tree.PyTree


class Options(NamedTuple):
    """How the factors are estimated and inverted; see :func:`gradxform.kronecker`."""

    factor_every: Scalar
    inverse_every: Scalar
    decay: Scalar
    max_dim: int
    lanczos: int
    seed: Scalar
    samples: int = 1  # random passes at a time


class Estimate(NamedTuple):
    """The Kronecker factors and their inverses."""

    factors: Factors  #: running means of V Vᵀ and Vᵀ V
    inverses: Inverses  #: inverses of the damped factors, with the damping at that time


class Layout(NamedTuple):
    """How one leaf is seen as matrices."""

    stack: tuple[int, ...]  #: (k,) for a stack of k matrices, () for one
    rows: int
    columns: int


def layout(shape: Sequence[int], stacked: bool | None = None) -> Layout | None:
    """The matrices that a leaf of this shape is cut into; None for a vector.

    The axes are cut into two groups such that the matrix has the least sum of sides. A leaf with
    three axes is a stack of matrices if their factors take less memory than those of any cut.

    >>> layout((3, 3, 16, 32)), layout((12, 64, 64)), layout((64, 4, 16)), layout((10, 1))
    (Layout(stack=(), rows=144, columns=32), Layout(stack=(12,), rows=64, columns=64), \
Layout(stack=(), rows=64, columns=64), None)
    """
    if stacked and shape:
        inner = layout(shape[1:], stacked=False)
        return inner and inner._replace(stack=(shape[0],))
    sides = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    cuts = [Layout((), *cut) for cut in sides if min(cut) > 1]
    if not cuts:
        return None
    best = min(cuts, key=lambda cut: cut.rows + cut.columns)
    if stacked is None and len(shape) == 3 and min(shape) > 1:
        batched = Layout((shape[0],), shape[1], shape[2])
        return min(best, batched, key=_entries)
    return best


def _entries(cut: Layout) -> int:
    """The number of entries in both factors."""
    return math.prod(cut.stack) * (cut.rows**2 + cut.columns**2)


def no_factors(params: tree.PyTree, max_dim: int) -> Factors:
    """Factors of zeros."""

    def of_leaf(x: jax.Array) -> Pair | jax.Array:
        cut, dtype = layout(jnp.shape(x)), tree.wide(jnp.asarray(x).dtype)
        if cut is None:
            return tree.zeros_like(x)
        sides = [(n, n) if n <= max_dim else (n,) for n in (cut.rows, cut.columns)]
        return Pair(*(by_rows(tree.zeros((*cut.stack, *side), dtype)) for side in sides))

    return jax.tree.map(of_leaf, params)


# -- the running means and their inverses


def when(due: jax.Array, make: Callable[[], T], old: T) -> T:
    """``make()`` if it is ``due``, else ``old``; made only if it is due for a lane of ``jax.vmap``.

    With a condition that differs from lane to lane JAX would compute both in each update.
    """
    made = lambda: tree.select(_own(due), make(), old)
    return jax.lax.cond(_any_lane(due), made, lambda: old)


@custom_vmap
def _own(condition: jax.Array) -> jax.Array:
    return jnp.full_like(condition, True)  # without lanes the branch itself is the condition


@_own.def_vmap
def _(axis_size: int, in_batched: list[bool], condition: jax.Array) -> tuple[jax.Array, bool]:
    return condition, in_batched[0]


@custom_vmap
def _any_lane(condition: jax.Array) -> jax.Array:
    return condition


@_any_lane.def_vmap
def _(axis_size: int, in_batched: list[bool], condition: jax.Array) -> tuple[jax.Array, bool]:
    return _any_lane(jnp.any(condition)), False  # which may have lanes of an outer ``jax.vmap``


def is_due(count: jax.Array, every: Scalar) -> jax.Array:
    """Whether an update with this count is one of each ``every``."""
    return count % jnp.round(scalar(every)).astype(count.dtype) == 0


def is_early(count: jax.Array, every: Scalar) -> jax.Array:
    """Whether an early update inverts out of turn: factors and damping still change fast.

    1, 2, 3, 4, 6, 8, 12, 16, …: two in each doubling of the count.
    """
    lowest_bit = count & -count
    return (4 * lowest_bit > count) & (scalar(count) < _EARLY * scalar(every))


def first_estimate(options: Options, params: tree.PyTree) -> Estimate:
    """Factors and inverses before the first update."""
    factors = no_factors(params, options.max_dim)
    zeros = lambda x: tree.zeros(x.shape, x.dtype)
    no_inverse = lambda _, x: jax.tree.map(zeros, x) if isinstance(x, Pair) else None
    return Estimate(factors, jax.tree.map(no_inverse, params, factors))


class Refreshed(NamedTuple):
    """An estimate after one more update."""

    estimate: Estimate
    probes: jax.Array  #: probes made
    inversions: jax.Array  #: inverses made: 0 or 1
    convex: jax.Array  #: whether the loss showed no negative curvature
    finite: jax.Array  #: whether the probe was finite, if there was one


def refreshed(
    options: Options,
    estimate: Estimate,
    params: tree.PyTree,
    linearised: Callable[[], passes.Linear],
    count: jax.Array,
    damping: jax.Array,
) -> Refreshed:
    """New factors and new inverses in the updates in which they are due."""
    words = (jnp.asarray(x).astype(jnp.uint32) for x in (options.seed, count))
    key = jax.random.wrap_key_data(jnp.stack(list(words)), impl="threefry2x32")
    new_factors = is_due(count, options.factor_every) | (count < _FIRST)
    mean = 1 - 1 / (1 + scalar(count) / scalar(options.factor_every))
    weight = 1 - jnp.minimum(mean, scalar(options.decay))

    nothing = estimate.factors, *varying_like((jnp.array(True), jnp.array(True)), params)

    def probed() -> tuple[Factors, jax.Array, jax.Array]:
        probe = functools.partial(passes.probe, linearised(), params, lanczos=options.lanczos)
        if options.samples == 1:
            return _moved(estimate.factors, probe(key), weight)

        def more(mean: Any, key_and_weight: Any) -> tuple[Any, None]:
            key, weight = key_and_weight
            factors, convex, finite = _moved(mean[0], probe(key), weight)
            return (factors, mean[1] & convex, mean[2] & finite), None

        zeros = jax.tree.map(jnp.zeros_like, estimate.factors)
        parts = 1 / jnp.arange(1, options.samples + 1, dtype=weight.dtype)
        keys = jax.random.split(key, options.samples)
        (fresh, *flags), _ = jax.lax.scan(more, (zeros, *nothing[1:]), (keys, parts))
        part = jnp.where(flags[1], weight, 0)
        mix = lambda old, new: (old + part * (new - old)).astype(old.dtype)
        return jax.tree.map(mix, estimate.factors, fresh), *flags

    factors, convex, finite = when(new_factors, probed, nothing)
    new_inverses = is_due(count, options.inverse_every) | is_early(count, options.inverse_every)
    inverses = when(
        new_inverses,
        lambda: inverses_of(factors, params, damping),
        estimate.inverses,
    )
    return Refreshed(
        Estimate(factors, inverses),
        options.samples * new_factors.astype(jnp.int32),
        new_inverses.astype(jnp.int32),
        convex,
        finite,
    )


def _moved(
    factors: Factors, probe: passes.Probe, weight: jax.Array
) -> tuple[Factors, jax.Array, jax.Array]:
    """The factors after a probe, whether it saw a convex loss, and whether it was finite."""
    v, convex = probe
    parts = joined(v)
    finite = jnp.isfinite(tree.vdot(parts, parts))  # no entry of a factor is larger
    return averaged(factors, v, jnp.where(finite, weight, 0)), convex, finite


def averaged(factors: Factors, v: tree.PyTree, weight: jax.Array) -> Factors:
    """The factors moved by the part ``weight`` towards those of ``v``; as they are if it is 0."""

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        mixed = jnp.where(weight > 0, old + weight * (new - old), old).astype(old.dtype)
        return by_rows(mixed)

    def of_leaf(v: jax.Array, old: Any) -> Pair | jax.Array:
        cut = layout(v.shape)
        if cut is None:
            return mix(old, jnp.square(v))
        v = as_matrix(v, cut)
        left, right = _gram(v, is_full(old.left, cut)), _gram(_turned(v), is_full(old.right, cut))
        return Pair(mix(old.left, left), mix(old.right, right))

    return jax.tree.map(of_leaf, v, factors)


def _gram(v: jax.Array, full: bool) -> jax.Array:
    """V Vᵀ, or its diagonal."""
    return v @ _turned(v) if full else jnp.sum(jnp.square(v), axis=-1)


def _turned(v: jax.Array) -> jax.Array:
    return jnp.swapaxes(v, -1, -2)


def is_full(factor: jax.Array, cut: Layout) -> bool:
    """Whether a factor is a matrix, not a diagonal."""
    return factor.ndim == len(cut.stack) + 2


def as_matrix(x: jax.Array, cut: Layout) -> jax.Array:
    """A leaf as a matrix, or as a stack of them; not sharded along explicit mesh axes."""
    x = jax.sharding.reshard(x, whole(x)) if is_explicit(x) else x
    return x.reshape(*cut.stack, cut.rows, cut.columns)


def inverses_of(factors: Factors, params: tree.PyTree, damping: jax.Array) -> Inverses:
    """(L/τ + πγ I)⁻¹ and (R/τ + γ/π I)⁻¹ with τ = √tr L = √tr R, γ = √λ and π = √(n/m)."""
    matrices: list[_Matrices] = []

    def of_leaf(x: jax.Array, pair: Any) -> Pair | None:
        cut = layout(jnp.shape(x))
        if cut is None:
            return None
        pi = math.sqrt(cut.columns / cut.rows)
        for factor, ratio in zip(pair, (pi, 1 / pi), strict=True):
            matrices.append(_Matrices(factor, ratio, is_full(factor, cut)))
        return pair

    structure = jax.tree.structure(jax.tree.map(of_leaf, params, factors))
    return jax.tree.unflatten(structure, _inverted(matrices, jnp.sqrt(damping)))


class _Matrices(NamedTuple):
    """A factor to be inverted."""

    factor: jax.Array
    ratio: float  #: what is added to the diagonal, over γ
    full: bool  #: whether the factor is a matrix or a stack of them, not a diagonal


def _inverted(matrices: Sequence[_Matrices], gamma: jax.Array) -> list[jax.Array]:
    """The inverses of damped factors. Those of similar sides are made together."""
    inverses = {}
    for i, (diagonal, ratio, full) in enumerate(matrices):
        if not full:
            tau = tree.sqrt(jnp.sum(diagonal, axis=-1, keepdims=True))
            shift = (ratio * gamma).astype(diagonal.dtype)
            inverses[i] = 1 / (tree.divide(diagonal, tau) + shift)
    for dtype in dict.fromkeys(x.factor.dtype for x in matrices):
        own = {i: x for i, x in enumerate(matrices) if x.full and x.factor.dtype == dtype}
        sides = {i: (x.factor.shape[-1], math.prod(x.factor.shape[:-2])) for i, x in own.items()}
        for side, group in _groups(sides):
            pad = lambda x, side=side: jnp.pad(x, ((0, 0), *[(0, side - x.shape[-1])] * 2))
            stacks = [gathered(own[i].factor).reshape(-1, *own[i].factor.shape[-2:]) for i in group]
            shifts = np.concatenate([np.full(sides[i][1], own[i].ratio) for i in group])
            together = jnp.concatenate([pad(x) for x in stacks])
            together = _damped(together, jnp.asarray(shifts, dtype) * gamma.astype(dtype))
            start = 0
            for i, stack in zip(group, stacks, strict=True):
                k, n, _ = stack.shape
                inverses[i] = together[start : start + k, :n, :n].reshape(own[i].factor.shape)
                start += k
    return [inverses[i] for i in range(len(matrices))]


def _groups(sides: Mapping[int, tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Matrices by the side that they are padded to, the greatest first.

    Each of ``sides`` has a side and the number of such matrices. A program for each side takes long
    to compile. So small matrices join larger ones where this adds little work.

    >>> _groups({0: (784, 2), 1: (250, 4), 2: (100, 4)}), _groups({0: (128, 4), 1: (32, 20)})
    ([(784, [0]), (250, [1, 2])], [(128, [0]), (32, [1])])
    """
    groups: list[tuple[int, list[int]]] = []
    work = 0
    by_side = sorted(sides, key=lambda i: -sides[i][0])
    for side, same in itertools.groupby(by_side, key=lambda i: sides[i][0]):
        own = list(same)
        count = sum(sides[i][1] for i in own)
        joined = groups[-1][0] if groups else side
        if groups and count * joined**3 <= _LITTLE * work:
            groups[-1][1].extend(own)
            work += count * joined**3
        else:
            groups.append((side, own))
            work += count * side**3
    return groups


def _damped(factors: jax.Array, shifts: jax.Array) -> jax.Array:
    """The inverses of a stack of factor/τ + shift I."""
    size = factors.shape[-1]
    tau = tree.sqrt(jnp.trace(factors, axis1=-2, axis2=-1))
    # rounding alone makes eigenvalues negative by as much; tau is the trace of the scaled factor
    shifts = jnp.maximum(shifts, size * jnp.finfo(factors.dtype).eps * tau)
    scaled = tree.divide(factors, tau[:, None, None])
    identity = jnp.eye(size, dtype=factors.dtype)
    return positive_definite.inverse(scaled + shifts[:, None, None] * identity[None])


def divided(g: tree.PyTree, estimate: Estimate, damping: Scalar) -> tree.PyTree:
    """The gradient over the damped curvature: L⁻¹ G R⁻¹, and g/(s + λ) for a vector."""

    def of_leaf(g: jax.Array, factor: Any, inverse: Pair | None) -> jax.Array:
        cut = layout(g.shape)
        if cut is None or inverse is None:
            return tree.divide(g, (factor + scalar(damping)).astype(g.dtype))
        left, right = inverse
        x = as_matrix(g, cut)
        x = left @ x if is_full(left, cut) else left[..., :, None] * x
        x = x @ right if is_full(right, cut) else x * right[..., None, :]
        return sharded_like(x.reshape(g.shape), g)

    return jax.tree.map(of_leaf, g, *estimate)
