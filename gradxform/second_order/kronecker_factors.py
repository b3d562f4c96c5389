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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from gradxform import tree
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order import positive_definite
from gradxform.second_order import random_passes as passes
from gradxform.sharding import is_explicit, sharded_like, varying_like, whole

T = TypeVar("T")

_FIRST = 10  # updates that make new factors in each


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
        return Pair(*(jnp.zeros((*cut.stack, *side), dtype) for side in sides))

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


def first_estimate(options: Options, params: tree.PyTree) -> Estimate:
    """Factors and inverses before the first update."""
    factors = no_factors(params, options.max_dim)
    no_inverse = lambda _, x: jax.tree.map(jnp.zeros_like, x) if isinstance(x, Pair) else None
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
    key = jax.random.fold_in(jax.random.key(jnp.asarray(options.seed).astype(jnp.uint32)), count)
    new_factors = is_due(count, options.factor_every) | (count < _FIRST)
    mean = 1 - 1 / (1 + scalar(count) / scalar(options.factor_every))
    weight = 1 - jnp.minimum(mean, scalar(options.decay))

    nothing = estimate.factors, *varying_like((jnp.array(True), jnp.array(True)), params)

    def probed() -> tuple[Factors, jax.Array, jax.Array]:
        at, keys = linearised(), jax.random.split(key, options.samples)
        probe = functools.partial(passes.probe, at, params, lanczos=options.lanczos)
        if options.samples == 1:
            return _moved(estimate.factors, probe(keys[0]), weight)

        def more(mean: Any, key_and_weight: Any) -> tuple[Any, None]:
            key, weight = key_and_weight
            factors, convex, finite = _moved(mean[0], probe(key), weight)
            return (factors, mean[1] & convex, mean[2] & finite), None

        zeros = jax.tree.map(jnp.zeros_like, estimate.factors)
        parts = 1 / jnp.arange(1, options.samples + 1, dtype=weight.dtype)
        (fresh, *flags), _ = jax.lax.scan(more, (zeros, *nothing[1:]), (keys, parts))
        part = jnp.where(flags[1], weight, 0)
        mix = lambda old, new: (old + part * (new - old)).astype(old.dtype)
        return jax.tree.map(mix, estimate.factors, fresh), *flags

    factors, convex, finite = when(new_factors, probed, nothing)
    # at 0, 1, 2, 4, 8, … the factors are still new
    power_of_two = (count & (count - 1)) == 0
    early = power_of_two & (scalar(count) < scalar(options.inverse_every))
    new_inverses = is_due(count, options.inverse_every) | early
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
    finite = jnp.isfinite(tree.vdot(v, v))  # no entry of a factor is larger
    v = tree.select(finite, v, jax.tree.map(jnp.zeros_like, v))
    return averaged(factors, v, jnp.where(finite, weight, 0)), convex, finite


def averaged(factors: Factors, v: tree.PyTree, weight: jax.Array) -> Factors:
    """The factors moved by the part ``weight`` towards those of ``v``."""

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        return (old + weight * (new - old)).astype(old.dtype)

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
    """(L/τ + πγ I)⁻¹ and (R/τ + γ/π I)⁻¹ with τ = √tr L, γ = √λ and π = √(n/m)."""
    gamma = jnp.sqrt(damping)

    def of_leaf(x: jax.Array, pair: Any) -> Pair | None:
        cut = layout(jnp.shape(x))
        if cut is None:
            return None
        left = pair.left
        trace = jnp.trace(left, axis1=-2, axis2=-1) if is_full(left, cut) else jnp.sum(left, -1)
        tau, pi = tree.sqrt(trace), math.sqrt(cut.columns / cut.rows)
        shifts = pi * gamma, gamma / pi
        return Pair(
            *(_damped(x, tau, s, is_full(x, cut)) for x, s in zip(pair, shifts, strict=True))
        )

    damped, structure = jax.tree.flatten(jax.tree.map(of_leaf, params, factors))
    full = jax.tree.leaves(jax.tree.map(_fullness, params, factors))
    return jax.tree.unflatten(structure, _inverted(damped, full))


def _fullness(x: jax.Array, pair: Any) -> tuple[bool, ...] | None:
    """Whether each factor of a leaf is a matrix; None for a vector."""
    cut = layout(jnp.shape(x))
    return None if cut is None else tuple(is_full(factor, cut) for factor in pair)


def _damped(factor: jax.Array, tau: jax.Array, shift: jax.Array, full: bool) -> jax.Array:
    """factor/τ + shift I."""
    shift = shift.astype(factor.dtype)
    scaled = tree.divide(factor, tau[..., None, None] if full else tau[..., None])
    if not full:
        return scaled + shift
    size = factor.shape[-1]
    # rounding alone makes eigenvalues negative by as much; tau is the trace of the scaled factor
    shift = jnp.maximum(shift, size * jnp.finfo(factor.dtype).eps * tau)
    return scaled + shift[..., None, None] * jnp.eye(size, dtype=factor.dtype)


def _inverted(damped: Sequence[jax.Array], full: Sequence[bool]) -> list[jax.Array]:
    """The inverses of matrices and diagonals. Those of one size are made together."""
    inverses = [x if is_matrix else 1 / x for x, is_matrix in zip(damped, full, strict=True)]
    kinds = [(x.shape[-1], x.dtype) if m else None for x, m in zip(damped, full, strict=True)]
    for kind in dict.fromkeys(kinds):
        own = [i for i, of in enumerate(kinds) if of == kind and kind is not None]
        if own:
            stacks = [damped[i].reshape(-1, *damped[i].shape[-2:]) for i in own]
            together = positive_definite.inverse(jnp.concatenate(stacks))
            ends = list(itertools.accumulate(len(x) for x in stacks))
            for i, part in zip(own, jnp.split(together, ends[:-1]), strict=True):
                inverses[i] = part.reshape(damped[i].shape)
    return inverses


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
