"""L-BFGS: BFGS with the last m pairs, without the matrix.

Byrd, Nocedal & Schnabel (1994), eq. 3.1: with the pairs s, y as columns of S and Y, D the diagonal
and R the upper triangle of SᵀY, and H₀ = γ I::

    γ ← sᵀy / yᵀy of the newest pair
    u ← R⁻¹ Sᵀ g
    q ← g − Y u
    w ← R⁻ᵀ (D u − γ Yᵀ q)
    d ← −(γ q + S w)
    θ ← θ + t d                         t by a line search
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.bounds import Bounds, Box, check_bounds
from gradxform.hyperparameters import BelowHalf, Count, Fraction, Size, checked
from gradxform.inverse import in_layout_of, inverse_product
from gradxform.line_search import Point, search
from gradxform.protocol import require_params, transformation
from gradxform.second_order.bounded_lbfgs import Model, bounded_step, gram_after
from gradxform.second_order.pairs import (
    Pair,
    QuasiNewtonInfo,
    counted,
    curvature_pair,
    flattened,
    no_pairs,
)
from gradxform.section import Rules
from gradxform.sharding import check_whole, whole


class ScaleByLbfgsState(NamedTuple):
    """State of :func:`scale_by_lbfgs`; the arrays are in at least float32.

    There are m slots for pairs; a new pair replaces the oldest. The rows and columns of the
    matrices are in the order of the slots, not of time.
    """

    started: jax.Array  #: whether an update was made
    params: tree.PyTree  #: θ at the last update; () if the line search stores it
    grad: tree.PyTree  #: g at the last update; () if the line search stores it
    oldest: jax.Array  #: the slot of the oldest pair, where the next pair goes
    s: tree.PyTree  #: changes of θ, with a leading axis of m slots
    y: tree.PyTree  #: changes of g, with a leading axis of m slots
    sy: jax.Array  #: sᵀy of each pair, the diagonal of D
    r_inverse: jax.Array  #: R⁻¹, m × m; R holds sᵢᵀyⱼ where pair i is not newer than pair j
    gamma: jax.Array  #: γ, the scale of the initial inverse Hessian H₀ = γ I
    gram: jax.Array | tuple[()]  #: with bounds: the inner products of all s and y, 2m × 2m
    info: QuasiNewtonInfo


@checked
def scale_by_lbfgs(
    memory_size: Size = 10, *, ravel: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`lbfgs`, without step or sign: H g.

    Args:
      memory_size: m ≥ 1, the number of pairs stored.
      ravel: see :func:`lbfgs`.

    Returns:
      The transformation. ``update`` needs ``params``. The state holds 2m + 2 vectors.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx, x = gx.scale_by_lbfgs(), jnp.asarray([1.0, 1.0])
    >>> _, state = tx.update(jnp.asarray([1.0, 4.0]), tx.init(x), x)
    >>> tx.update(jnp.asarray([1.0, 4.0]) / 2, state, x / 2)[0].round(4)  # the pair explains it
    Array([0.5, 0.5], dtype=float32)
    """
    return _lbfgs_direction("scale_by_lbfgs", memory_size, ravel, search_keeps_last=False)


def _lbfgs_direction(
    method: str, m: int, ravel: bool, *, search_keeps_last: bool, bounded: bool = False
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_lbfgs`, with errors that name ``method``.

    With ``search_keeps_last`` a line search passes the last accepted point to ``update``, and the
    state does not store it. If ``bounded``, it passes the bounds too, and the direction ends within
    them.
    """

    def flatten(values: tree.PyTree) -> tree.PyTree:
        return flattened(values, ravel)

    def init(params: tree.PyTree) -> ScaleByLbfgsState:
        if ravel:
            check_whole(method, params)

        def zeros() -> tree.PyTree:
            return flatten(tree.zeros_like(params))

        def slots() -> tree.PyTree:
            copies = jax.tree.map(lambda x: jnp.stack([x] * m), flatten(params))
            return tree.zeros_like(copies)

        dtype = jnp.result_type(float, *jax.tree.leaves(zeros()))
        return ScaleByLbfgsState(
            started=jnp.array(False),
            params=() if search_keeps_last else zeros(),
            grad=() if search_keeps_last else zeros(),
            oldest=jnp.array(0, jnp.int32),
            s=slots(),
            y=slots(),
            sy=jnp.zeros(m, dtype),
            r_inverse=jnp.zeros((m, m), dtype),
            gamma=jnp.ones((), dtype),
            gram=jnp.zeros((2 * m, 2 * m), dtype) if bounded else (),
            info=no_pairs(),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByLbfgsState,
        params: tree.PyTree = None,
        *,
        last: Point | None = None,
        box: Box | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByLbfgsState]:
        del extra_args
        last = last if search_keeps_last else None  # a loop may pass something else
        params = require_params(method, params, grads)
        if tree.count(grads) == 0:
            return grads, state
        theta, g = flatten(params), flatten(grads)
        old = state if last is None else last
        s = tree.map(jnp.subtract, theta, flatten(old.params))
        y = tree.map(jnp.subtract, g, flatten(old.grad))
        pair = curvature_pair(s, y, state.started)
        # the slot for the new pair, if the pair is used
        slot = (jnp.arange(m, dtype=jnp.int32) == state.oldest) & pair.is_useful

        def put(slots: tree.PyTree, new: tree.PyTree) -> tree.PyTree:
            return jax.tree.map(
                lambda old, x: jnp.where(slot.reshape(-1, *[1] * x.ndim), x, old), slots, new
            )

        s, y = put(state.s, pair.s), put(state.y, pair.y)
        s_y = _products(s, pair.y)
        d = jnp.where(slot, pair.sy, state.sy)
        # Without its oldest row and column, R⁻¹ is the inverse of R without them. The new last
        # column (r, sᵀy) of R adds the column (−ρ R⁻¹ r, ρ) to the inverse.
        r = jnp.where(slot, 0, s_y)
        column = pair.rho * jnp.where(slot, 1, -(state.r_inverse @ r))
        rest = jnp.where(slot[:, None], 0, state.r_inverse)
        r_inverse = jnp.where(slot, column[:, None], rest)
        gamma = jnp.where(pair.is_useful, tree.divide(pair.sy, pair.yy), state.gamma)

        gram = state.gram
        if box is not None and not isinstance(gram, tuple):
            gram = gram_after(gram, s, y, pair, slot).astype(gram.dtype)
            age = (jnp.arange(m, dtype=jnp.int32) - _oldest_after(state, pair, m)) % m
            model = Model(s, y, gram, gamma, age)
            step = bounded_step(model, Box(*map(flatten, box)), theta, g)
            direction = jax.tree.map(jnp.negative, step)
        else:
            direction = _inverse_times(s, y, d, r_inverse, gamma, g)
        direction = tree.unflatten(direction, grads)
        new_state = ScaleByLbfgsState(
            started=jnp.ones_like(state.started),
            params=theta if last is None else (),
            grad=g if last is None else (),
            oldest=_oldest_after(state, pair, m),
            s=s,
            y=y,
            sy=d.astype(state.sy.dtype),
            r_inverse=r_inverse.astype(state.r_inverse.dtype),
            gamma=gamma.astype(state.gamma.dtype),
            gram=gram,
            info=counted(state.info, pair),
        )
        return tree.cast_like(direction, grads), new_state

    return transformation(init, update)


@inverse_product.register
def _(state: ScaleByLbfgsState, vector: tree.PyTree) -> tree.PyTree:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.s)
    part, back = in_layout_of("scale_by_lbfgs", like, vector)
    matrices = state.s, state.y, state.sy, state.r_inverse, state.gamma
    return back(_inverse_times(*matrices, part))


def _inverse_times(
    s: tree.PyTree,
    y: tree.PyTree,
    sy: jax.Array,
    r_inverse: jax.Array,
    gamma: jax.Array,
    vector: tree.PyTree,
) -> tree.PyTree:
    """Byrd, Nocedal & Schnabel, eq. 3.1, multiplied by ``vector``; empty slots are 0."""
    u = r_inverse @ _products(s, vector)
    q = tree.map(lambda v, y: v - jnp.tensordot(u, y, 1), vector, y)
    w = r_inverse.T @ (sy * u - gamma * _products(y, q))
    return tree.map(lambda q, s: gamma * q + jnp.tensordot(w, s, 1), q, s)


def _products(slots: tree.PyTree, vector: tree.PyTree) -> jax.Array:
    """The inner products of ``vector`` with every slot."""
    leaves = jax.tree.map(
        lambda a, x: jnp.tensordot(a, x, x.ndim, out_sharding=whole(x)), slots, vector
    )
    return jnp.asarray(sum(jax.tree.leaves(leaves), start=0.0))


def _oldest_after(state: ScaleByLbfgsState, pair: Pair, m: int) -> jax.Array:
    following = jnp.where(state.oldest == m - 1, 0, state.oldest + 1)
    return jnp.where(pair.is_useful, following, state.oldest)


@checked
def lbfgs(
    memory_size: Size = 10,
    *,
    ravel: bool = True,
    decrease: BelowHalf = 0.1,
    curvature: Fraction = 0.9,
    noise: Fraction = 1e-6,
    max_trials: Count = 30,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with a line search: :func:`bfgs` with a memory of the last m pairs.

    The update is θ ← θ − t H g. H is the BFGS estimate of the inverse Hessian from the last m pairs
    s = θ − θ_old and y = g − g_old, starting from (sᵀy / yᵀy) I with the newest pair. The matrix H
    is never formed: H g takes about 4 m n operations for n parameters.

    The step t comes from :func:`gradxform.with_line_search`. The loop holds the trial point;
    :func:`gradxform.eval_params` gives the accepted θ.

    With ``bounds`` this is L-BFGS-B. The direction leads to the minimum of the quasi-Newton model
    within the bounds, and the search ends at the first bound. No trial point is outside. If θ is
    outside, as at the start, the next update moves it to the closest point inside.

    Args:
      memory_size: m ≥ 1, the number of pairs stored.
      ravel: True flattens all parameters into one vector, which compiles and runs many times faster
        with many leaves. False keeps the leaves apart, sharded like the parameters.
      decrease: δ of the line search, see :func:`gradxform.with_line_search`.
      curvature: σ of the line search.
      noise: relative error of the objective.
      max_trials: number of trial points after which a line search has failed.
      bounds: a pair ``(low, high)``, each a pytree like the parameters or a prefix of it; ``None``
        or ±inf in place of a number means no bound. Arrays may be traced.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``. The objective must be the same
      in every update: the full batch, not minibatches. The state holds 2m + 3 vectors, and the
      bounds.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, the parameters are sharded and ``ravel`` is True, or the bounds do not fit the
        parameters.

    References:
      Lecture 7, "Limited Memory BFGS". Byrd, Nocedal & Schnabel, "Representations of quasi-Newton
      matrices and their use in limited memory methods", Math. Program. 63:129 (1994), eq. 3.1.
      Byrd, Lu, Nocedal & Zhu, "A limited memory algorithm for bound constrained optimization", SIAM
      J. Sci. Comput. 16:1190 (1995). Morales & Nocedal, "Remark on Algorithm 778", ACM Trans. Math.
      Softw. 38:7 (2011). Differs: Newton's method in a bracket finds the Cauchy point. So if the
      model has several minima along the path, it need not be the first.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> valley = lambda x: jnp.sum(jnp.arange(1.0, 101.0) * (x - 1) ** 2)
    >>> gx.Status(int(gx.minimize(valley, jnp.zeros(100), gx.lbfgs(), tol=1e-3).status)).name
    'converged'
    """
    bounded = bounds is not None
    if bounded:
        check_bounds("lbfgs", bounds)
    return search(
        "lbfgs",
        _lbfgs_direction("lbfgs", memory_size, ravel, search_keeps_last=True, bounded=bounded),
        Rules(decrease, curvature, noise, max_trials),
        unit_step=True,
        ravel=ravel,
        asked="always",
        passed=("last", "box") if bounded else ("last",),
        bounds=bounds,
    )
