"""BFGS and L-BFGS: the inverse Hessian learnt from how the gradient changes along the path."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from gradxform import tree
from gradxform.hyperparameters import Scalar, check, check_static, scalar
from gradxform.line_search import with_line_search
from gradxform.protocol import require, transformation


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


def _pair(s: tree.PyTree, y: tree.PyTree, started: jax.Array) -> _Pair:
    factor = tree.reciprocal(jnp.sqrt(tree.max_abs(s)) * jnp.sqrt(tree.max_abs(y)))
    s, y = tree.scale(factor, s), tree.scale(factor, y)
    sy, ss, yy = tree.vdot(s, y), tree.vdot(s, s), tree.vdot(y, y)
    # relative to ‖s‖‖y‖: an objective in other units has the same pairs
    useful = started & (sy > jnp.finfo(sy.dtype).eps * jnp.sqrt(ss) * jnp.sqrt(yy))
    zeros = jax.tree.map(jnp.zeros_like, s)
    return _Pair(
        tree.select(useful, s, zeros),
        tree.select(useful, y, zeros),
        jnp.where(useful, sy, 0),
        jnp.where(useful, yy, 0),
        useful,
    )


def _counted(info: QuasiNewtonInfo, pair: _Pair, started: jax.Array) -> QuasiNewtonInfo:
    return QuasiNewtonInfo(
        tree.add_count(info.pairs, pair.useful.astype(jnp.int32)),
        tree.add_count(info.skipped, (started & ~pair.useful).astype(jnp.int32)),
    )


def _no_pairs() -> QuasiNewtonInfo:
    return QuasiNewtonInfo(jnp.array(0, jnp.int32), jnp.array(0, jnp.int32))


class ScaleByBfgsState(NamedTuple):
    """State of :func:`scale_by_bfgs`; vectors are ravelled, all in at least float32."""

    started: jax.Array  #: whether there was an update yet
    params: jax.Array  #: θ of the last update
    grad: jax.Array  #: g of the last update
    inverse_hessian: jax.Array  #: H, n × n
    info: QuasiNewtonInfo


def scale_by_bfgs() -> optax.GradientTransformationExtraArgs:
    r"""The direction of :func:`bfgs`, without step or sign: :math:`H g`.

    Returns:
      The transformation; ``update`` needs ``params``. It keeps an n × n matrix.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx, x, g = gx.scale_by_bfgs(), jnp.asarray([1.0, 1.0]), jnp.asarray([1.0, 4.0])
    >>> _, state = tx.update(g, tx.init(x), x)
    >>> tx.update(jnp.asarray([1.0, 0.0]), state, jnp.asarray([1.0, 0.0]))[1].inverse_hessian[1, 1]
    Array(0.25, dtype=float32)
    """

    def init(params: tree.PyTree) -> ScaleByBfgsState:
        zero, _ = ravel_pytree(tree.zeros_like(params))
        return ScaleByBfgsState(
            started=jnp.array(False),
            params=zero,
            grad=jnp.zeros_like(zero),
            inverse_hessian=jnp.eye(zero.size, dtype=zero.dtype),
            info=_no_pairs(),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByBfgsState,
        params: tree.PyTree = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByBfgsState]:
        del extra_args
        params = require("scale_by_bfgs", "params", params)
        theta, _ = ravel_pytree(jax.tree.map(tree.promote, params))
        g, unravel = ravel_pytree(jax.tree.map(tree.promote, grads))
        pair = _pair(theta - state.params, g - state.grad, state.started)

        # the first pair shows the scale that H should have started with (N&W eq. 6.20)
        first = state.info.pairs == 0
        h = jnp.where(first, tree.divide(pair.sy, pair.yy), 1) * state.inverse_hessian
        hy = h @ pair.y
        rho = tree.divide(scalar(1), pair.sy)
        cross = jnp.outer(pair.s, hy)
        # N&W eq. 6.17, (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ, multiplied out
        h = h - rho * (cross + cross.T) + rho * (1 + rho * pair.y @ hy) * jnp.outer(pair.s, pair.s)
        h = jnp.where(pair.useful, h, state.inverse_hessian).astype(state.inverse_hessian.dtype)
        info = _counted(state.info, pair, state.started)
        new_state = ScaleByBfgsState(jnp.ones_like(state.started), theta, g, h, info)
        return tree.cast_like(unravel(h @ g), grads), new_state

    return transformation(init, update)


class ScaleByLbfgsState(NamedTuple):
    """State of :func:`scale_by_lbfgs`; pairs are kept in a ring, all in at least float32."""

    started: jax.Array  #: whether there was an update yet
    params: tree.PyTree  #: θ of the last update
    grad: tree.PyTree  #: g of the last update
    oldest: jax.Array  #: the slot that the next pair goes to
    s: tree.PyTree  #: changes of θ, with a leading axis of m slots
    y: tree.PyTree  #: changes of g, with a leading axis of m slots
    sy: jax.Array  #: SᵀY, m × m
    yy: jax.Array  #: YᵀY, m × m
    gamma: jax.Array  #: γ, the scale of the inverse Hessian that the memory starts from
    info: QuasiNewtonInfo


def scale_by_lbfgs(
    memory_size: int = 10, *, ravel: bool = True
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
    check_static("scale_by_lbfgs", memory_size=memory_size)
    check("scale_by_lbfgs", memory_size=(memory_size, 1, float("inf")))
    m = memory_size

    def flatten(values: tree.PyTree) -> tree.PyTree:
        values = jax.tree.map(tree.promote, values)
        return ravel_pytree(values)[0] if ravel else values

    def init(params: tree.PyTree) -> ScaleByLbfgsState:
        def zeros() -> tree.PyTree:
            return flatten(tree.zeros_like(params))

        def slots() -> tree.PyTree:
            return jax.tree.map(lambda z: jnp.zeros_like(z, shape=(m, *z.shape)), zeros())

        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(zeros()))
        return ScaleByLbfgsState(
            started=jnp.array(False),
            params=zeros(),
            grad=zeros(),
            oldest=jnp.array(0, jnp.int32),
            s=slots(),
            y=slots(),
            sy=jnp.zeros((m, m), dtype),
            yy=jnp.zeros((m, m), dtype),
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
        params = require("scale_by_lbfgs", "params", params)
        theta, g = flatten(params), flatten(grads)
        change = (
            tree.map(jnp.subtract, theta, state.params),
            tree.map(jnp.subtract, g, state.grad),
        )
        pair = _pair(*change, state.started)
        k = state.oldest

        def put(slots: tree.PyTree, new: tree.PyTree) -> tree.PyTree:
            return jax.tree.map(
                lambda old, x: old.at[k].set(jnp.where(pair.useful, x, old[k])), slots, new
            )

        def cross(matrix: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
            changed = matrix.at[k].set(row).at[:, k].set(column)
            return jnp.where(pair.useful, changed, matrix).astype(matrix.dtype)

        s, y = put(state.s, pair.s), put(state.y, pair.y)
        y_products = _products(y, pair.y)
        sy = cross(state.sy, _products(y, pair.s), _products(s, pair.y))
        yy = cross(state.yy, y_products, y_products)
        gamma = jnp.where(pair.useful, tree.divide(pair.sy, pair.yy), state.gamma)
        gamma = gamma.astype(state.gamma.dtype)
        k = jnp.where(pair.useful, (k + 1) % m, k)

        # Byrd, Nocedal & Schnabel, eq. 3.1: H = γI + [S γY] M [S γY]ᵀ, with R the upper triangle of
        # SᵀY and D its diagonal, both in the order in which the pairs came
        order = (jnp.arange(m) + k) % m
        r, yy_ordered = jnp.triu(sy[order][:, order]), yy[order][:, order]
        d = jnp.diag(r)
        r = r + jnp.diag((d == 0).astype(r.dtype))  # an empty slot takes no part
        sg, yg = _products(s, g)[order], _products(y, g)[order]
        u = _solve_upper(r, sg)
        w = _solve_upper_transposed(r, d * u + gamma * (yy_ordered @ u - yg))
        back = jnp.argsort(order)
        direction = tree.map(
            lambda g, s, y: (
                gamma * g + jnp.tensordot(w[back], s, 1) - gamma * jnp.tensordot(u[back], y, 1)
            ),
            g,
            s,
            y,
        )
        if ravel:
            direction = ravel_pytree(jax.tree.map(tree.promote, grads))[1](direction)
        info = _counted(state.info, pair, state.started)
        started = jnp.ones_like(state.started)
        new_state = ScaleByLbfgsState(started, theta, g, k, s, y, sy, yy, gamma, info)
        return tree.cast_like(direction, grads), new_state

    return transformation(init, update)


def _products(slots: tree.PyTree, vector: tree.PyTree) -> jax.Array:
    """The inner products of ``vector`` with every slot."""
    products = jax.tree.map(lambda a, x: jnp.tensordot(a, x, x.ndim), slots, vector)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))


# The two substitutions are written out for the few rows they have: under vmap they stay
# elementwise, where the library's batched triangular solve is several times slower.
def _solve_upper(r: jax.Array, b: jax.Array) -> jax.Array:
    """x of R x = b for an upper triangular R."""
    rows = jnp.arange(len(b))
    for i in reversed(range(len(b))):
        x = b[i] / r[i, i]
        b = jnp.where(rows < i, b - x * r[:, i], jnp.where(rows == i, x, b))
    return b


def _solve_upper_transposed(r: jax.Array, b: jax.Array) -> jax.Array:
    """x of Rᵀ x = b for an upper triangular R."""
    rows = jnp.arange(len(b))
    for i in range(len(b)):
        x = b[i] / r[i, i]
        b = jnp.where(rows > i, b - x * r[i], jnp.where(rows == i, x, b))
    return b


def bfgs(
    *,
    decrease: Scalar = 0.1,
    curvature: Scalar = 0.9,
    noise: Scalar = 1e-6,
    max_trials: Scalar = 30,
) -> optax.GradientTransformationExtraArgs:
    r"""BFGS with a line search.

    With :math:`s = \theta - \theta_{old}`, :math:`y = g - g_{old}` and :math:`\rho = 1 / s^T y`:

    .. math::
        H &\leftarrow (I - \rho s y^T)\, H\, (I - \rho y s^T) + \rho s s^T \\
        \theta &\leftarrow \theta - t H g

    H starts as the identity, and as :math:`(s^T y / y^T y) I` before its first update. A pair whose
    :math:`s^T y` is not positive, relative to :math:`\|s\| \|y\|`, is left out. The step t comes
    from :func:`gradxform.with_line_search`: the loop holds trial points, and
    :func:`gradxform.eval_params` gives θ.

    Args:
      decrease: δ of the search, see :func:`gradxform.with_line_search`.
      curvature: σ of the search.
      noise: relative error of the objective.
      max_trials: trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``, of one fixed objective: the
      full batch, not minibatches. It keeps an n × n matrix.

    References:
      Lecture 7, "BFGS". Nocedal & Wright, *Numerical Optimization* (2006), Algorithm 6.1.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> solution = gx.minimize(rosenbrock, jnp.asarray([-1.2, 1.0]), gx.bfgs(), tol=1e-3)
    >>> solution.params.round(3)
    Array([1., 1.], dtype=float32)
    """
    return with_line_search(
        scale_by_bfgs(),
        decrease=decrease,
        curvature=curvature,
        noise=noise,
        max_trials=max_trials,
    )


def lbfgs(
    memory_size: int = 10,
    *,
    ravel: bool = True,
    decrease: Scalar = 0.1,
    curvature: Scalar = 0.9,
    noise: Scalar = 1e-6,
    max_trials: Scalar = 30,
) -> optax.GradientTransformationExtraArgs:
    r"""L-BFGS with a line search: :func:`bfgs` that remembers the last pairs alone.

    H is what BFGS makes of the last m pairs from :math:`(s^T y / y^T y) I` of the newest; H g takes
    4 m n operations in the compact form, and H itself is never made.

    Args:
      memory_size: m ≥ 1, the pairs that are remembered.
      ravel: keep the memory as one vector, which compiles and runs faster where there are many
        leaves; False keeps it leaf by leaf, sharded like the parameters.
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
    return with_line_search(
        scale_by_lbfgs(memory_size, ravel=ravel),
        decrease=decrease,
        curvature=curvature,
        noise=noise,
        max_trials=max_trials,
    )
