"""BFGS: an estimate of the inverse Hessian, from the changes of the gradient along the path.

Nocedal & Wright, *Numerical Optimization* (2006), Algorithm 6.1::

    H ← I
    repeat
        d ← −H g
        θ ← θ + t d                     t by a line search
        s, y ← θ − θ_old, g − g_old
        ρ ← 1 / sᵀy
        H ← (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ        (6.17)

Before the first pair, H is scaled to (sᵀy / yᵀy) I (6.20).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import BelowHalf, Count, Fraction, checked
from gradxform.inverse import in_layout_of, inverse_product
from gradxform.line_search import Point, search
from gradxform.protocol import require_params, transformation
from gradxform.rows import identity_rows, outer, rows_dot
from gradxform.second_order.pairs import (
    QuasiNewtonInfo,
    counted,
    curvature_pair,
    flattened,
    no_pairs,
)
from gradxform.section import Rules
from gradxform.sharding import check_whole


class ScaleByBfgsState(NamedTuple):
    """State of :func:`scale_by_bfgs`; the arrays are in at least float32."""

    started: jax.Array  #: whether an update was made
    learnt: jax.Array  #: whether H was updated with a pair
    params: tree.PyTree  #: θ at the last update; () if the line search stores it
    grad: tree.PyTree  #: g at the last update; () if the line search stores it
    #: H, n × n; with ``ravel=False`` a tree of the matrix rows that belong to each leaf
    inverse_hessian: tree.PyTree
    info: QuasiNewtonInfo


@checked
def scale_by_bfgs(
    *, self_scaling: bool = True, ravel: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`bfgs`, without step or sign: H g.

    Args:
      self_scaling: see :func:`bfgs`.
      ravel: see :func:`bfgs`.

    Returns:
      The transformation. ``update`` needs ``params``. The state holds an n × n matrix.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx, x, g = gx.scale_by_bfgs(), jnp.asarray([1.0, 1.0]), jnp.asarray([1.0, 4.0])
    >>> _, state = tx.update(g, tx.init(x), x)
    >>> tx.update(jnp.asarray([1.0, 0.0]), state, jnp.asarray([1.0, 0.0]))[1].inverse_hessian[1, 1]
    Array(0.25, dtype=float32)
    """
    return _bfgs_direction("scale_by_bfgs", self_scaling, ravel, search_keeps_last=False)


def _bfgs_direction(
    method: str, self_scaling: bool, ravel: bool, *, search_keeps_last: bool
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_bfgs`, with errors that name ``method``.

    With ``search_keeps_last`` a line search passes the last accepted point to ``update``, and the
    state does not store it.
    """

    def flatten(values: tree.PyTree) -> tree.PyTree:
        return flattened(values, ravel)

    def init(params: tree.PyTree) -> ScaleByBfgsState:
        size = tree.count(params)
        if size != tree.count_int32(params):
            raise ValueError(
                f"{method}: there are {size} parameters, and a matrix of {size} × {size} entries "
                f"takes {4 * size**2 / 2**30:.3g} GiB in float32: use gx.lbfgs"
            )
        if ravel:
            check_whole(method, params)
        return ScaleByBfgsState(
            started=jnp.array(False),
            learnt=jnp.array(False),
            params=() if search_keeps_last else flatten(tree.zeros_like(params)),
            grad=() if search_keeps_last else flatten(tree.zeros_like(params)),
            inverse_hessian=identity_rows(flatten(params)),
            info=no_pairs(),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByBfgsState,
        params: tree.PyTree = None,
        *,
        last: Point | None = None,
        restart: bool | jax.Array = False,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByBfgsState]:
        del extra_args
        if not search_keeps_last:  # a loop may pass something else by these names
            last, restart = None, False
        restart = jnp.asarray(restart)
        params = require_params(method, params, grads)
        theta, g = flatten(params), flatten(grads)
        old = state if last is None else last
        s = tree.map(jnp.subtract, theta, flatten(old.params))
        y = tree.map(jnp.subtract, g, flatten(old.grad))
        pair = curvature_pair(s, y, state.started & ~restart)

        # the first pair gives the scale of the initial H (N&W eq. 6.20)
        learnt = state.learnt & ~restart
        h = state.inverse_hessian
        hy = tree.select(learnt, rows_dot(h, pair.y), pair.y)
        yhy = tree.vdot(pair.y, hy)
        ratio = tree.divide(pair.sy, yhy)
        scale = jnp.where(~learnt, ratio, jnp.maximum(ratio, 1) if self_scaling else 1)
        scale = jnp.where(pair.is_useful, scale, 1)
        # N&W eq. 6.17, (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ, multiplied out: H − s pᵀ − p sᵀ
        middle = 0.5 * (1 + pair.rho * scale * yhy)
        p = tree.map(lambda hy, s: pair.rho * (scale * hy - middle * s), hy, pair.s)
        (row_s, _), (row_p, _) = tree.ravel(pair.s), tree.ravel(p)
        h = tree.map(
            lambda h, s, p: scale * h - outer(s, row_p) - outer(p, row_s),
            tree.select(learnt, h, identity_rows(g)),
            pair.s,
            p,
        )
        new_state = ScaleByBfgsState(
            started=jnp.ones_like(state.started),
            learnt=learnt | pair.is_useful,
            params=theta if last is None else (),
            grad=g if last is None else (),
            inverse_hessian=h,
            info=counted(state.info, pair),
        )
        direction = tree.unflatten(rows_dot(h, g), grads)
        return tree.cast_like(direction, grads), new_state

    return transformation(init, update)


@inverse_product.register
def _(state: ScaleByBfgsState, vector: tree.PyTree) -> tree.PyTree:
    rows = state.inverse_hessian
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[:-1], x.dtype), rows)
    part, back = in_layout_of("scale_by_bfgs", like, vector)
    return back(rows_dot(rows, part))


@checked
def bfgs(
    *,
    self_scaling: bool = True,
    ravel: bool = True,
    decrease: BelowHalf = 0.1,
    curvature: Fraction = 0.9,
    noise: Fraction = 1e-6,
    max_trials: Count = 30,
) -> optax.GradientTransformationExtraArgs:
    """BFGS with a line search.

    With the changes s = θ − θ_old and y = g − g_old, and with ρ = 1 / sᵀy::

        H ← (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ
        θ ← θ − t H g

    H is an estimate of the inverse Hessian. It starts as the identity, and is set to
    (sᵀy / yᵀy) I just before its first update. If the curvature has fallen since, H is first
    enlarged by the factor max(1, sᵀy / yᵀHy). A pair (s, y) is skipped unless sᵀy is positive
    beyond rounding.

    The step t comes from :func:`gradxform.with_line_search`. The loop holds the trial point;
    :func:`gradxform.eval_params` gives the accepted θ.

    Args:
      self_scaling: whether to enlarge H as above. False is the plain formula, which needs more
        steps if the curvature at the start is much larger than at the minimum.
      ravel: True flattens all parameters into one vector, which compiles and runs faster with many
        leaves. False keeps the leaves apart; then H and all vectors are sharded like the
        parameters.
      decrease: δ of the line search, see :func:`gradxform.with_line_search`.
      curvature: σ of the line search.
      noise: relative error of the objective.
      max_trials: number of trial points after which a line search has failed.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``. The objective must be the same
      in every update: the full batch, not minibatches. The state holds an n × n matrix and 3
      vectors.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, or the parameters are sharded and ``ravel`` is True.

    References:
      Lecture 7, "BFGS". Nocedal & Wright, *Numerical Optimization* (2006), Algorithm 6.1. Al-Baali,
      "Numerical experience with a class of self-scaling quasi-Newton algorithms", J. Optim. Theory
      Appl. 96:533 (1998), for scaling in one direction only.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> solution = gx.minimize(rosenbrock, jnp.asarray([-1.2, 1.0]), gx.bfgs(), tol=1e-3)
    >>> solution.params.round(3)
    Array([1., 1.], dtype=float32)
    """
    return search(
        "bfgs",
        _bfgs_direction("bfgs", self_scaling, ravel, search_keeps_last=True),
        Rules(decrease, curvature, noise, max_trials),
        unit_step=True,
        ravel=ravel,
        asked="always",
        passed=("last", "restart"),
    )
