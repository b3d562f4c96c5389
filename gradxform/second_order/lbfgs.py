"""L-BFGS: what BFGS makes of the last m pairs, without the matrix.

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
from gradxform.hyperparameters import BelowHalf, Count, Fraction, Size, checked
from gradxform.line_search import Point, search
from gradxform.protocol import require_params, transformation
from gradxform.second_order.pairs import (
    QuasiNewtonInfo,
    counted,
    curvature_pair,
    flattened,
    no_pairs,
)
from gradxform.section import Rules
from gradxform.sharding import check_whole, whole


class ScaleByLbfgsState(NamedTuple):
    """State of :func:`scale_by_lbfgs`, all in at least float32.

    The pairs are kept in m slots, a new one in the place of the oldest. The rows and columns of
    the matrices are in the order of the slots, not of time.
    """

    started: jax.Array  #: whether there was an update yet
    params: tree.PyTree  #: θ of the last update; () where a search keeps it
    grad: tree.PyTree  #: g of the last update; () where a search keeps it
    oldest: jax.Array  #: the slot that the next pair goes to
    s: tree.PyTree  #: changes of θ, with a leading axis of m slots
    y: tree.PyTree  #: changes of g, with a leading axis of m slots
    sy: jax.Array  #: D, sᵀy of each pair
    r_inverse: jax.Array  #: R⁻¹, of the sᵢᵀyⱼ with pair i not newer than pair j, m × m
    gamma: jax.Array  #: γ, the scale of the inverse Hessian that the memory starts from
    info: QuasiNewtonInfo


@checked
def scale_by_lbfgs(
    memory_size: Size = 10, *, ravel: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of :func:`lbfgs`, without step or sign: :math:`H g`.

    Args:
      memory_size: m ≥ 1, the pairs that are remembered.
      ravel: keep the memory as one vector, which compiles and runs faster where there are many
        leaves; False keeps it leaf by leaf, sharded like the parameters.

    Returns:
      The transformation; ``update`` needs ``params``. It keeps 2m + 2 vectors.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx, x = gx.scale_by_lbfgs(), jnp.asarray([1.0, 1.0])
    >>> _, state = tx.update(jnp.asarray([1.0, 4.0]), tx.init(x), x)
    >>> tx.update(jnp.asarray([1.0, 4.0]) / 2, state, x / 2)[0].round(4)  # the pair explains it
    Array([0.5, 0.5], dtype=float32)
    """
    return _lbfgs_direction("scale_by_lbfgs", memory_size, ravel, told_last=False)


def _lbfgs_direction(
    method: str, m: int, ravel: bool, *, told_last: bool
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_lbfgs` as a part of ``method``, which its errors name.

    ``told_last`` says that ``update`` is given the last point instead of keeping it in the state.
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
            params=() if told_last else zeros(),
            grad=() if told_last else zeros(),
            oldest=jnp.array(0, jnp.int32),
            s=slots(),
            y=slots(),
            sy=jnp.zeros(m, dtype),
            r_inverse=jnp.zeros((m, m), dtype),
            gamma=jnp.ones((), dtype),
            info=no_pairs(),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByLbfgsState,
        params: tree.PyTree = None,
        *,
        last: Point | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByLbfgsState]:
        del extra_args
        last = last if told_last else None  # of a loop, it may be anything
        params = require_params(method, params, grads)
        if tree.count(grads) == 0:
            return grads, state
        theta, g = flatten(params), flatten(grads)
        old = state if last is None else last
        s = tree.map(jnp.subtract, theta, flatten(old.params))
        y = tree.map(jnp.subtract, g, flatten(old.grad))
        pair = curvature_pair(s, y, state.started)
        # where the pair goes, if it does
        slot = (jnp.arange(m, dtype=jnp.int32) == state.oldest) & pair.is_useful

        def put(slots: tree.PyTree, new: tree.PyTree) -> tree.PyTree:
            return jax.tree.map(
                lambda old, x: jnp.where(slot.reshape(-1, *[1] * x.ndim), x, old), slots, new
            )

        s, y = put(state.s, pair.s), put(state.y, pair.y)
        s_y, s_g = _products(s, pair.y), _products(s, g)
        d = jnp.where(slot, pair.sy, state.sy)
        # the inverse of a triangle without its oldest row and column is the triangle's inverse
        # without them; a new last column r, sᵀy of R gives it the column -ρ R⁻¹ r, ρ
        r = jnp.where(slot, 0, s_y)
        column = pair.rho * jnp.where(slot, 1, -(state.r_inverse @ r))
        rest = jnp.where(slot[:, None], 0, state.r_inverse)
        r_inverse = jnp.where(slot, column[:, None], rest)
        gamma = jnp.where(pair.is_useful, tree.divide(pair.sy, pair.yy), state.gamma)

        # Byrd, Nocedal & Schnabel, eq. 3.1, multiplied by g; an empty slot has zeros throughout
        u = r_inverse @ s_g
        q = tree.map(lambda g, y: g - jnp.tensordot(u, y, 1), g, y)
        w = r_inverse.T @ (d * u - gamma * _products(y, q))
        direction = tree.map(lambda q, s: gamma * q + jnp.tensordot(w, s, 1), q, s)
        direction = tree.unflatten(direction, grads)
        new_state = ScaleByLbfgsState(
            started=jnp.ones_like(state.started),
            params=theta if last is None else (),
            grad=g if last is None else (),
            oldest=jnp.where(pair.is_useful, _following(state.oldest, m), state.oldest),
            s=s,
            y=y,
            sy=d.astype(state.sy.dtype),
            r_inverse=r_inverse.astype(state.r_inverse.dtype),
            gamma=gamma.astype(state.gamma.dtype),
            info=counted(state.info, pair),
        )
        return tree.cast_like(direction, grads), new_state

    return transformation(init, update)


def _products(slots: tree.PyTree, vector: tree.PyTree) -> jax.Array:
    """The inner products of ``vector`` with every slot."""
    leaves = jax.tree.map(
        lambda a, x: jnp.tensordot(a, x, x.ndim, out_sharding=whole(x)), slots, vector
    )
    return jnp.asarray(sum(jax.tree.leaves(leaves), start=0.0))


def _following(slot: jax.Array, m: int) -> jax.Array:
    return jnp.where(slot == m - 1, 0, slot + 1)


@checked
def lbfgs(
    memory_size: Size = 10,
    *,
    ravel: bool = True,
    decrease: BelowHalf = 0.1,
    curvature: Fraction = 0.9,
    noise: Fraction = 1e-6,
    max_trials: Count = 30,
) -> optax.GradientTransformationExtraArgs:
    r"""L-BFGS with a line search: :func:`bfgs` that remembers the last pairs alone.

    H is what BFGS makes of the last m pairs from :math:`(s^T y / y^T y) I` of the newest; H g takes
    4 m n operations in the compact form, and H itself is never made.

    Args:
      memory_size: m ≥ 1, the pairs that are remembered.
      ravel: work on one vector, which compiles and runs many times faster where there are many
        leaves; False works leaf by leaf, sharded like the parameters.
      decrease: δ of the search, see :func:`gradxform.with_line_search`.
      curvature: σ of the search.
      noise: relative error of the objective.
      max_trials: trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``, of one fixed objective: the
      full batch, not minibatches. It keeps 2m + 3 vectors.

    References:
      Lecture 7, "Limited Memory BFGS". Byrd, Nocedal & Schnabel, "Representations of quasi-Newton
      matrices and their use in limited memory methods", Math. Program. 63:129 (1994), eq. 3.1.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> valley = lambda x: jnp.sum(jnp.arange(1.0, 101.0) * (x - 1) ** 2)
    >>> gx.Status(int(gx.minimize(valley, jnp.zeros(100), gx.lbfgs(), tol=1e-3).status)).name
    'converged'
    """
    return search(
        "lbfgs",
        _lbfgs_direction("lbfgs", memory_size, ravel, told_last=True),
        Rules(decrease, curvature, noise, max_trials),
        unit_step=True,
        ravel=ravel,
        asked="always",
        told=("last",),
    )
