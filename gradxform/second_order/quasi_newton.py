"""BFGS and L-BFGS: the inverse Hessian learnt from how the gradient changes along the path."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.derivatives import constant_size
from gradxform.hyperparameters import BelowHalf, Count, Fraction, Size, checked, scalar
from gradxform.info import diagnostics
from gradxform.line_search import search
from gradxform.protocol import require_params, transformation


@diagnostics
class QuasiNewtonInfo(NamedTuple):
    """What became of the curvature pairs."""

    pairs: jax.Array  #: pairs taken into the memory
    skipped: jax.Array  #: pairs left out: not positive enough, or not finite


class _Pair(NamedTuple):
    """s = θ − θ_old and y = g − g_old, over a common factor that brings sᵀy near 1.

    The factor leaves the BFGS update as it is, and keeps products of small gradients from
    underflowing. Where the pair is of no use, s, y and their products are 0.
    """

    s: tree.PyTree
    y: tree.PyTree
    sy: jax.Array
    yy: jax.Array
    useful: jax.Array
    skipped: jax.Array


def _pair(s: tree.PyTree, y: tree.PyTree, started: jax.Array) -> _Pair:
    longest = constant_size(s), constant_size(y)
    factor = tree.reciprocal(jnp.sqrt(longest[0]) * jnp.sqrt(longest[1]))
    s, y = tree.scale(factor, s), tree.scale(factor, y)
    sy, ss, yy = tree.vdot(s, y), tree.vdot(s, s), tree.vdot(y, y)
    # relative to ‖s‖‖y‖: an objective in other units has the same pairs
    useful = started & (sy > jnp.finfo(sy.dtype).eps * jnp.sqrt(ss) * jnp.sqrt(yy))
    same_point = (longest[0] == 0) & (longest[1] == 0)
    zeros = jax.tree.map(jnp.zeros_like, s)
    return _Pair(
        tree.select(useful, s, zeros),
        tree.select(useful, y, zeros),
        jnp.where(useful, sy, 0),
        jnp.where(useful, yy, 0),
        useful,
        started & ~same_point & ~useful,
    )


def _counted(info: QuasiNewtonInfo, pair: _Pair) -> QuasiNewtonInfo:
    return QuasiNewtonInfo(
        tree.add_count(info.pairs, pair.useful.astype(jnp.int32)),
        tree.add_count(info.skipped, pair.skipped.astype(jnp.int32)),
    )


def _no_pairs() -> QuasiNewtonInfo:
    return QuasiNewtonInfo(jnp.array(0, jnp.int32), jnp.array(0, jnp.int32))


class ScaleByBfgsState(NamedTuple):
    """State of :func:`scale_by_bfgs`, all in at least float32."""

    started: jax.Array  #: whether there was an update yet
    learnt: jax.Array  #: whether H has learnt from a pair yet
    params: tree.PyTree  #: θ of the last update
    grad: tree.PyTree  #: g of the last update
    inverse_hessian: tree.PyTree  #: H, n × n; with ``ravel=False`` the rows of each leaf in one
    info: QuasiNewtonInfo


@checked
def scale_by_bfgs(
    *, self_scaling: bool = True, ravel: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of :func:`bfgs`, without step or sign: :math:`H g`.

    Args:
      self_scaling: see :func:`bfgs`.
      ravel: see :func:`bfgs`.

    Returns:
      The transformation; ``update`` needs ``params``. It keeps an n × n matrix.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx, x, g = gx.scale_by_bfgs(), jnp.asarray([1.0, 1.0]), jnp.asarray([1.0, 4.0])
    >>> _, state = tx.update(g, tx.init(x), x)
    >>> tx.update(jnp.asarray([1.0, 0.0]), state, jnp.asarray([1.0, 0.0]))[1].inverse_hessian[1, 1]
    Array(0.25, dtype=float32)
    """
    return _bfgs_direction("scale_by_bfgs", self_scaling, ravel)


def _bfgs_direction(
    method: str, self_scaling: bool, ravel: bool
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_bfgs` as a part of ``method``, which its errors name."""

    def flatten(values: tree.PyTree) -> tree.PyTree:
        values = jax.tree.map(tree.promote, values)
        return tree.ravel(values)[0] if ravel else values

    def init(params: tree.PyTree) -> ScaleByBfgsState:
        size = tree.count(params)
        if size != tree.count_int32(params):
            raise ValueError(
                f"{method}: there are {size} parameters, and a matrix of {size} × {size} entries "
                f"takes {4 * size**2 / 2**30:.3g} GiB in float32: use gx.lbfgs"
            )
        if ravel:
            tree.check_whole(method, params)
        return ScaleByBfgsState(
            started=jnp.array(False),
            learnt=jnp.array(False),
            params=flatten(tree.zeros_like(params)),
            grad=flatten(tree.zeros_like(params)),
            inverse_hessian=tree.identity_rows(flatten(params)),
            info=_no_pairs(),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByBfgsState,
        params: tree.PyTree = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByBfgsState]:
        del extra_args
        params = require_params(method, params, grads)
        theta, g = flatten(params), flatten(grads)
        change = (
            tree.map(jnp.subtract, theta, state.params),
            tree.map(jnp.subtract, g, state.grad),
        )
        pair = _pair(*change, state.started)

        # the first pair shows the scale that H should have started with (N&W eq. 6.20)
        hy = tree.rows_dot(state.inverse_hessian, pair.y)
        yhy = tree.vdot(pair.y, hy)
        by_direction = tree.divide(pair.sy, yhy)
        scale = jnp.where(
            ~state.learnt, by_direction, jnp.maximum(by_direction, 1) if self_scaling else 1
        )
        scale = jnp.where(pair.useful, scale, 1)
        # N&W eq. 6.17, (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ, multiplied out: H − s pᵀ − p sᵀ
        rho = tree.divide(scalar(1), pair.sy)
        middle = 0.5 * (1 + rho * scale * yhy)
        p = tree.map(lambda hy, s: rho * (scale * hy - middle * s), hy, pair.s)
        (row_s, _), (row_p, _) = tree.ravel(pair.s), tree.ravel(p)
        h = tree.map(
            lambda h, s, p: scale * h - tree.outer(s, row_p) - tree.outer(p, row_s),
            state.inverse_hessian,
            pair.s,
            p,
        )
        info = _counted(state.info, pair)
        started, learnt = jnp.ones_like(state.started), state.learnt | pair.useful
        new_state = ScaleByBfgsState(started, learnt, theta, g, h, info)
        direction = tree.unflatten(tree.rows_dot(h, g), grads)
        return tree.cast_like(direction, grads), new_state

    return transformation(init, update)


class ScaleByLbfgsState(NamedTuple):
    """State of :func:`scale_by_lbfgs`, all in at least float32.

    The pairs are kept in m slots, a new one in the place of the oldest. The rows and columns of
    the matrices are in the order of the slots, not of time.
    """

    started: jax.Array  #: whether there was an update yet
    params: tree.PyTree  #: θ of the last update
    grad: tree.PyTree  #: g of the last update
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
    return _lbfgs_direction("scale_by_lbfgs", memory_size, ravel)


def _lbfgs_direction(method: str, m: int, ravel: bool) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_lbfgs` as a part of ``method``, which its errors name."""

    def flatten(values: tree.PyTree) -> tree.PyTree:
        values = jax.tree.map(tree.promote, values)
        return tree.ravel(values)[0] if ravel else values

    def init(params: tree.PyTree) -> ScaleByLbfgsState:
        if ravel:
            tree.check_whole(method, params)

        def zeros() -> tree.PyTree:
            return flatten(tree.zeros_like(params))

        def slots() -> tree.PyTree:
            copies = jax.tree.map(lambda x: jnp.stack([x] * m), flatten(params))
            return tree.zeros_like(copies)

        dtype = jnp.result_type(float, *jax.tree.leaves(zeros()))
        return ScaleByLbfgsState(
            started=jnp.array(False),
            params=zeros(),
            grad=zeros(),
            oldest=jnp.array(0, jnp.int32),
            s=slots(),
            y=slots(),
            sy=jnp.zeros(m, dtype),
            r_inverse=jnp.zeros((m, m), dtype),
            gamma=jnp.ones((), dtype),
            info=_no_pairs(),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByLbfgsState,
        params: tree.PyTree = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByLbfgsState]:
        del extra_args
        params = require_params(method, params, grads)
        if tree.count(grads) == 0:
            return grads, state
        theta, g = flatten(params), flatten(grads)
        change = (
            tree.map(jnp.subtract, theta, state.params),
            tree.map(jnp.subtract, g, state.grad),
        )
        pair = _pair(*change, state.started)
        slot = (
            jnp.arange(m, dtype=jnp.int32) == state.oldest
        ) & pair.useful  # where the pair goes, if it does

        def put(slots: tree.PyTree, new: tree.PyTree) -> tree.PyTree:
            return jax.tree.map(
                lambda old, x: jnp.where(slot.reshape(-1, *[1] * x.ndim), x, old), slots, new
            )

        s, y = put(state.s, pair.s), put(state.y, pair.y)
        d = jnp.where(slot, pair.sy, state.sy)
        # the inverse of a triangle without its oldest row and column is the triangle's inverse
        # without them; a new last column r, ρ of R gives it the column -R⁻¹ r / ρ, 1 / ρ
        r = jnp.where(slot, 0, _products(s, pair.y))
        column = tree.divide(jnp.where(slot, 1, state.r_inverse @ -r), pair.sy)
        rest = jnp.where(slot[:, None], 0, state.r_inverse)
        r_inverse = jnp.where(slot, column[:, None], rest)
        gamma = jnp.where(pair.useful, tree.divide(pair.sy, pair.yy), state.gamma)

        # Byrd, Nocedal & Schnabel, eq. 3.1, multiplied by g; an empty slot has zeros throughout
        u = r_inverse @ _products(s, g)
        q = tree.map(lambda g, y: g - jnp.tensordot(u, y, 1), g, y)
        w = (d * u - gamma * _products(y, q)) @ r_inverse
        direction = tree.map(lambda q, s: gamma * q + jnp.tensordot(w, s, 1), q, s)
        direction = tree.unflatten(direction, grads)
        new_state = ScaleByLbfgsState(
            started=jnp.ones_like(state.started),
            params=theta,
            grad=g,
            oldest=jnp.where(pair.useful, (state.oldest + 1) % m, state.oldest),
            s=s,
            y=y,
            sy=d.astype(state.sy.dtype),
            r_inverse=r_inverse.astype(state.r_inverse.dtype),
            gamma=gamma.astype(state.gamma.dtype),
            info=_counted(state.info, pair),
        )
        return tree.cast_like(direction, grads), new_state

    return transformation(init, update)


def _products(slots: tree.PyTree, vector: tree.PyTree) -> jax.Array:
    """The inner products of ``vector`` with every slot."""
    products = jax.tree.map(
        lambda a, x: jnp.tensordot(a, x, x.ndim, out_sharding=tree.whole(x)), slots, vector
    )
    return jnp.asarray(sum(jax.tree.leaves(products), start=0.0))


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
    r"""BFGS with a line search.

    With :math:`s = \theta - \theta_{old}`, :math:`y = g - g_{old}` and :math:`\rho = 1 / s^T y`:

    .. math::
        H &\leftarrow (I - \rho s y^T)\, H\, (I - \rho y s^T) + \rho s s^T \\
        \theta &\leftarrow \theta - t H g

    H starts as the identity, and as :math:`(s^T y / y^T y) I` before its first update. Where the
    curvature has fallen since, H is enlarged before the update, :math:`H \leftarrow
    \max(1, s^T y / y^T H y)\, H`. A pair whose :math:`s^T y` is not positive, relative to
    :math:`\|s\| \|y\|`, is left out. The step t comes
    from :func:`gradxform.with_line_search`: the loop holds trial points, and
    :func:`gradxform.eval_params` gives θ.

    Args:
      self_scaling: whether to enlarge H like that; False is the plain formula, which needs more
        steps from a start where the curvature is much larger than at the minimum.
      ravel: work on one vector, which compiles and runs faster where there are many leaves; False
        works leaf by leaf, all sharded like the parameters, the rows of H among them.
      decrease: δ of the search, see :func:`gradxform.with_line_search`.
      curvature: σ of the search.
      noise: relative error of the objective.
      max_trials: trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``, of one fixed objective: the
      full batch, not minibatches. It keeps an n × n matrix and 5 vectors.

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
        _bfgs_direction("bfgs", self_scaling, ravel),
        unit_step=True,
        ravel=ravel,
        repeatable=True,
        decrease=decrease,
        curvature=curvature,
        noise=noise,
        max_trials=max_trials,
    )


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
      full batch, not minibatches. It keeps 2m + 5 vectors.

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
        _lbfgs_direction("lbfgs", memory_size, ravel),
        unit_step=True,
        ravel=ravel,
        repeatable=True,
        decrease=decrease,
        curvature=curvature,
        noise=noise,
        max_trials=max_trials,
    )
