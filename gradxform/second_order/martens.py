"""The inner loops of Hessian-free optimisation: conjugate gradients, then the choice of a step.

For the model q(p) = gᵀp + ½ pᵀBp with B = G + λI and a preconditioner M, from a start p, with
r = Bp + g and d = −Mr::

    for i = 1, 2, …:
        t = rᵀMr / dᵀBd
        p ← p + t d,    r' = r + t Bd,    d ← (r'ᵀMr' / rᵀMr) d − Mr'
        store p if i = ⌈1.3^j⌉
        k = max(10, i / 10)
        stop if i > k, q(p) < 0 and q(p) − q(p before k iterations) > k ε q(p)

The method goes back from the last stored iterate as long as the objective falls, and takes the
best. Then it shortens the step until Armijo's rule holds.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradxform import tree
from gradxform.curvature import Product
from gradxform.derivatives import forward_only
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order import conjugate_gradients as cg
from gradxform.sharding import varying_like

_SPACING = 1.3  # iterates ⌈1.3^j⌉ are stored
_MOST_ITERATIONS = 1000
_ARMIJO, _SHRINK, _TRIALS = 1e-2, 0.8, 60  # for the line search along the step


class Path(NamedTuple):
    """The path of conjugate gradients."""

    at: cg.Iterate  #: the last iterate: p, the approximate solution of Bp = −g, and the residual
    q: jax.Array  #: the model q(p) at the last iterate
    history: jax.Array  #: q after every iteration
    kept: tree.PyTree  #: the newest of the iterates ⌈1.3^j⌉, in a ring buffer
    kept_q: jax.Array  #: q at the iterates in the ring buffer
    newest: jax.Array  #: number of iterates written to the ring buffer so far
    iterations: jax.Array  #: iterations made
    products: jax.Array  #: products with B
    done: jax.Array  #: whether the loop has ended


class Candidate(NamedTuple):
    """A step p at which the objective was evaluated."""

    p: tree.PyTree  #: the step
    q: jax.Array  #: the model q(p)
    f: jax.Array  #: the objective f(θ + p); the largest number if that is not finite


def minimise_model(
    product: Product,
    inverse: Product | None,
    g: tree.PyTree,
    start: tree.PyTree,
    progress: Scalar,
    maxiter: Scalar,
    iterates: int,
) -> Path:
    """Preconditioned CG from ``start``. The model q falls in every iteration."""
    limit = min(2 * tree.count(g), _MOST_ITERATIONS)
    most = jnp.minimum(scalar(maxiter), limit)
    keep = jnp.asarray(_kept_iterations(limit))
    begin, rounding = _begin(product, inverse, g, start, limit, iterates)

    def body(path: Path) -> Path:
        bd = product(path.at.d)
        (curvature,), rz = cg.products_at(path.at, [(path.at.d, bd)], inverse)
        broken = ~(curvature > 0)  # true for NaN too
        usable = jnp.isfinite(curvature) & (curvature != 0)
        t = jnp.where(usable, rz / jnp.where(usable, jnp.abs(curvature), 1), 0)
        at = cg.step(path.at, bd, t, rz, inverse)
        q = path.q - 0.5 * t * rz

        i = path.iterations + 1
        k = jnp.maximum(10, i // 10)
        gained = q - path.history[jnp.maximum(i - k, 0)]
        slow = (i > k) & (q < 0) & (gained > scalar(k) * scalar(progress) * q)
        slot = path.newest % iterates
        return Path(
            at=at,
            q=q,
            history=path.history.at[i].set(q),
            kept=jax.tree.map(lambda ring, x: _put(ring, slot, x, keep[i] > 0), path.kept, at.x),
            kept_q=path.kept_q.at[slot].set(jnp.where(keep[i] > 0, q, path.kept_q[slot])),
            newest=path.newest + keep[i],
            iterations=i,
            products=path.products + 1,
            done=broken | slow,
        )

    def unfinished(path: Path) -> jax.Array:
        return ~path.done & (scalar(path.iterations) < most) & (path.at.rz > rounding)

    found = jax.lax.while_loop(unfinished, body, varying_like(begin, g))
    return forward_only("hessian_free", found)


def _begin(
    product: Product,
    inverse: Product | None,
    g: tree.PyTree,
    start: tree.PyTree,
    limit: int,
    iterates: int,
) -> tuple[Path, jax.Array]:
    """The path before the first iteration, and the rᵀMr at which only rounding is left."""
    zeros = jax.tree.map(jnp.zeros_like, g)
    started = tree.max_abs(start) > 0
    curved = jax.lax.cond(started, lambda: product(start), lambda: zeros)
    q = tree.vdot(start, g) + 0.5 * tree.vdot(start, curved)
    warm = q < 0  # start at 0 if ``start`` does not lower the model
    start, curved = (tree.select(warm, x, zeros) for x in (start, curved))
    q = jnp.where(warm, q, 0)
    none = jnp.array(0, jnp.int32)
    path = Path(
        at=cg.first_iterate(start, tree.map(jnp.add, curved, g), inverse),
        q=q,
        history=jnp.zeros(limit + 1, q.dtype).at[0].set(q),
        kept=jax.tree.map(lambda x: jnp.stack([x] * iterates), start),
        kept_q=jnp.zeros(iterates, q.dtype),
        newest=none,
        iterations=none,
        products=started.astype(jnp.int32),
        done=jnp.array(False),
    )
    return path, jnp.finfo(q.dtype).eps ** 2 * tree.vdot(g, inverse(g) if inverse else g)


def _kept_iterations(limit: int) -> np.ndarray:
    """1 at every iteration ⌈1.3^j⌉ up to ``limit``, 0 at the others."""
    steps = range(math.ceil(math.log(limit + 1, _SPACING)))
    numbers = [math.ceil(_SPACING**j) for j in steps]
    return np.isin(np.arange(limit + 1), numbers).astype(np.int32)


# Slices instead of indexing: jnp would convert the index to a dtype that can count every entry.


def _put(ring: jax.Array, slot: jax.Array, x: jax.Array, keep: jax.Array) -> jax.Array:
    x = jnp.where(keep, x, _at(ring, slot))
    return jax.lax.dynamic_update_index_in_dim(ring, x, slot, 0)


def _at(ring: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ring, slot, keepdims=False)


_Choice: TypeAlias = tuple[Candidate, jax.Array, jax.Array]  # best, how far back, whether f fell


def choose_iterate(
    value_at: Callable[[tree.PyTree], jax.Array], path: Path
) -> tuple[Candidate, jax.Array]:
    """The best iterate, searched backwards from the last one as long as the value falls.

    Also returns the number of evaluations.
    """
    iterates = len(path.kept_q)

    def body(carry: _Choice) -> _Choice:
        best, back, _ = carry
        slot = (path.newest - back) % iterates
        p = jax.tree.map(lambda ring: _at(ring, slot), path.kept)
        f = value_at(p)
        better = (f < best.f) | (best.f == tree.largest())
        earlier = Candidate(p, path.kept_q[slot], f)
        return tree.select(better, earlier, best), back + 1, better

    def unfinished(carry: _Choice) -> jax.Array:
        _, back, better = carry
        return better & (back <= jnp.minimum(path.newest, iterates))

    # the newest stored iterate may be the last iterate itself
    newest = path.kept_q[(path.newest - 1) % iterates]
    first = jnp.where((path.newest > 0) & (newest == path.q), 2, 1)
    last = Candidate(path.at.x, path.q, value_at(path.at.x))
    begin = varying_like((last, first, jnp.array(True)), path.at.x)
    best, back, _ = jax.lax.while_loop(unfinished, body, begin)
    return forward_only("hessian_free", best), 1 + back - first


_Trial: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # α, value, number of evaluations


def shorten(
    value_at: Callable[[tree.PyTree], jax.Array],
    chosen: Candidate,
    bound: jax.Array,
    slope: jax.Array,
) -> _Trial:
    """α by Armijo's rule, whether the value there is low enough, and the number of evaluations."""
    trials = jnp.array(0, jnp.int32)

    def too_high(alpha: jax.Array, f: jax.Array) -> jax.Array:
        return ~(f <= bound + _ARMIJO * alpha * slope)

    def body(carry: _Trial) -> _Trial:
        alpha, _, trials = carry
        alpha = _SHRINK * alpha
        return alpha, value_at(tree.scale(alpha, chosen.p)), trials + 1

    def unfinished(carry: _Trial) -> jax.Array:
        alpha, f, trials = carry
        return too_high(alpha, f) & (trials < _TRIALS) & (slope < 0)

    one = jnp.ones_like(chosen.f)
    start = varying_like((one, chosen.f, trials), chosen.p)
    alpha, f, trials = jax.lax.while_loop(unfinished, body, start)
    # α is a power of a constant, so it has no derivative
    return jax.lax.stop_gradient(alpha), ~too_high(alpha, f) & (slope < 0), trials
