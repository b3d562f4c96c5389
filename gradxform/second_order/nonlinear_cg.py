"""Nonlinear conjugate gradients: each direction is −g plus a multiple of the last direction.

Nocedal & Wright, *Numerical Optimization* (2006), Algorithm 5.4, with restarts::

    d ← −g
    repeat
        θ ← θ + t d                     t by a line search
        β ← one of the formulas of :func:`nonlinear_cg`
        β ← 0 after 6 n updates, if |gᵀg_old| > ν ‖g‖², or if −g + β d does not descend
        d ← −g + β d

:func:`scale_by_nonlinear_cg` is this direction. :func:`nonlinear_cg` multiplies g by a matrix P
that it makes at restarts, see :mod:`gradxform.second_order.preconditioned_cg`. The state holds
p = −d, because Optax's methods return directions of ascent.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.derivatives import constant_size
from gradxform.hyperparameters import BelowHalf, Count, Fraction, NonNegative, checked, scalar
from gradxform.kernels import vdots
from gradxform.line_search import search
from gradxform.protocol import transformation
from gradxform.second_order.beta import Beta, Products, beta_of, restart_is_due
from gradxform.second_order.preconditioned_cg import NonlinearCgInfo, preconditioned_cg
from gradxform.section import Rules

# Restart after 6 n updates, as Hager & Zhang's CG_DESCENT does. With few parameters, n updates are
# too few to follow a valley.
_CYCLE = 6


class ScaleByNonlinearCgState(NamedTuple):
    """State of :func:`scale_by_nonlinear_cg`; the trees are in at least float32."""

    since_restart: jax.Array  #: updates since the last restart; 0 before the first update
    grad: tree.PyTree  #: g in the last update
    direction: tree.PyTree  #: p in the last update, a direction of ascent
    info: NonlinearCgInfo


@checked
def scale_by_nonlinear_cg(
    beta: Beta = "polak_ribiere", *, restart: NonNegative = 1.0, truncation: NonNegative = 0.4
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`nonlinear_cg`, without step or sign: p = g + β p_old.

    Args:
      beta: the formula for β, see :func:`nonlinear_cg`.
      restart: ν ≥ 0. Powell's test restarts with p = g if ``|gᵀg_old| > ν ‖g‖²``, that is, if
        successive gradients are far from orthogonal.
      truncation: η ≥ 0 in Hager and Zhang's lower bound on β.

    Returns:
      The transformation. ``update`` needs only the gradient. Take the steps with an accurate line
      search.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.scale_by_nonlinear_cg("fletcher_reeves", restart=1.0)
    >>> _, state = tx.update(jnp.asarray([2.0, 0.0]), tx.init(jnp.zeros(2)))
    >>> tx.update(jnp.asarray([0.0, 1.0]), state)[0]  # β = 1/4
    Array([0.5, 1. ], dtype=float32)
    """

    def init(params: tree.PyTree) -> ScaleByNonlinearCgState:
        return ScaleByNonlinearCgState(
            since_restart=jnp.array(0, jnp.int32),
            grad=tree.zeros_like(params),
            direction=tree.zeros_like(params),
            info=NonlinearCgInfo(jnp.array(scalar(0), copy=True), jnp.array(0, jnp.int32)),
        )

    def update(
        grads: tree.PyTree,
        state: ScaleByNonlinearCgState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByNonlinearCgState]:
        del params, extra_args
        g = tree.map(lambda _, g: g, state.grad, grads)
        # β does not depend on the scale of the gradient; this scale keeps squares from underflowing
        unit = tree.reciprocal(constant_size((g, state.grad)))
        new, old, p = (tree.scale(unit, x) for x in (g, state.grad, state.direction))
        q = _products(beta, new, old, p)
        b = beta_of(beta, q, scalar(truncation))
        cycle = min(_CYCLE * tree.count(g), jnp.iinfo(jnp.int32).max)
        since = state.since_restart
        restarts = restart_is_due(b, q, since, cycle=cycle, nu=scalar(restart))
        b = jnp.where(restarts, 0, b)
        direction = tree.select(restarts, g, tree.map(lambda g, p: g + b * p, g, state.direction))
        started = since > 0
        info = NonlinearCgInfo(
            b.astype(state.info.beta.dtype),
            tree.add_count(state.info.restarts, (restarts & started).astype(jnp.int32)),
        )
        since = jnp.where(restarts, 1, since + 1)
        return tree.cast_like(direction, grads), ScaleByNonlinearCgState(since, g, direction, info)

    return transformation(init, update)


def _products(formula: Beta, g: tree.PyTree, old: tree.PyTree, p: tree.PyTree) -> Products:
    y = tree.map(jnp.subtract, g, old)
    pairs = [(g, g), (old, old), (g, old), (g, y), (p, y), (g, p)]
    if formula == "hager_zhang":
        pairs += [(y, y), (old, p), (p, p)]
    products = vdots(*pairs)
    return Products._make([*products, *[jnp.zeros(())] * (9 - len(products))])


@checked
def nonlinear_cg(
    beta: Beta = "polak_ribiere",
    *,
    restart: NonNegative = 0.5,
    truncation: NonNegative = 0.4,
    ravel: bool = True,
    decrease: BelowHalf = 0.1,
    curvature: Fraction = 0.2,
    noise: Fraction = 1e-6,
    max_trials: Count = 30,
) -> optax.GradientTransformationExtraArgs:
    """Nonlinear conjugate gradients with a line search.

    The direction and the step are::

        d ← −P g + β d_old
        θ ← θ + t d

    With y = g − g_old and d for d_old, β is one of the following. With P ≠ I, the products of two
    gradients have P between them, and dᵀd has P⁻¹::

        fletcher_reeves   gᵀg / g_oldᵀg_old
        polak_ribiere     max(gᵀy / g_oldᵀg_old, 0)
        hestenes_stiefel  gᵀy / dᵀy
        dai_yuan          gᵀg / dᵀy
        hager_zhang       max((gᵀy − 2 ‖y‖² gᵀd / dᵀy) / dᵀy, η dᵀg_old / dᵀd)

    All five agree if the objective is quadratic and the steps are exact; the method then is linear
    conjugate gradients. The method restarts with d = −P g every 2 n updates for n parameters, if
    ``|gᵀP g_old| > ν gᵀP g`` (Powell's test), and if d does not descend. At a restart P becomes
    what BFGS makes of γ I and the last step s, with γ = sᵀy / yᵀy; at the start it is I. P gives
    the direction the length of a step, so t = 1 is tried first. :func:`scale_by_nonlinear_cg` is
    the plain direction, with P = I.

    The step t comes from :func:`gradxform.with_line_search`. The loop holds the trial point;
    :func:`gradxform.eval_params` gives the accepted θ.

    Args:
      beta: ``"polak_ribiere"``, ``"fletcher_reeves"``, ``"hestenes_stiefel"``, ``"dai_yuan"`` or
        ``"hager_zhang"``.
      restart: ν ≥ 0 in Powell's test.
      truncation: η ≥ 0 in Hager and Zhang's lower bound on β.
      ravel: True flattens all parameters into one vector, which compiles and runs many times faster
        with many leaves. False keeps the leaves apart, sharded like the parameters.
      decrease: δ of the line search, see :func:`gradxform.with_line_search`.
      curvature: σ of the line search. It is small because the directions are conjugate only after
        accurate steps.
      noise: relative error of the objective.
      max_trials: number of trial points after which a line search has failed.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``. The objective must be the same
      in every update: the full batch, not minibatches. The state holds five vectors.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, or the parameters are sharded and ``ravel`` is True.

    References:
      Lecture 7, "Nonlinear Conjugate Gradients". Nocedal & Wright, *Numerical Optimization*
      (2006), §5.2. Shanno, "Conjugate gradient methods with inexact searches", Math. Oper. Res.
      3:244 (1978), for P. Powell, "Restart procedures for the conjugate gradient method", Math.
      Program. 12:241 (1977). Hager & Zhang, "A survey of nonlinear conjugate gradient methods",
      Pacific J. Optim. 2:35 (2006); "The limited memory conjugate gradient method", SIAM J. Optim.
      23:2150 (2013), for η and for the formulas with P.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: x[0] ** 2 + 50 * x[1] ** 2
    >>> solution = gx.minimize(bowl, jnp.asarray([5.0, 1.0]), gx.nonlinear_cg(), tol=1e-3)
    >>> gx.Status(int(solution.status)).name
    'converged'
    """
    return search(
        "nonlinear_cg",
        preconditioned_cg("nonlinear_cg", beta, restart, truncation),
        Rules(decrease, curvature, noise, max_trials),
        unit_step=True,
        ravel=ravel,
        asked="always, kept if accepted",
        passed=("last", "direction", "restart"),
    )
