"""Nonlinear conjugate gradients: each direction is −g plus a multiple of the last direction.

Nocedal & Wright, *Numerical Optimization* (2006), Algorithm 5.4, with restarts::

    d ← −g
    repeat
        θ ← θ + t d                     t by a line search
        β ← one of the formulas of :func:`nonlinear_cg`
        β ← 0 after 6 n updates, if |gᵀg_old| > ν ‖g‖², or if −g + β d does not descend
        d ← −g + β d

The state holds p = −d, because Optax's methods return directions of ascent.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.derivatives import constant_size
from gradxform.hyperparameters import BelowHalf, Count, Fraction, NonNegative, checked, scalar
from gradxform.info import diagnostics
from gradxform.line_search import search
from gradxform.protocol import transformation
from gradxform.section import Rules

Beta = Literal["polak_ribiere", "fletcher_reeves", "hestenes_stiefel", "dai_yuan", "hager_zhang"]

# Restart after 6 n updates, as Hager & Zhang's CG_DESCENT does. With few parameters, n updates are
# too few to follow a valley.
_CYCLE = 6


@diagnostics
class NonlinearCgInfo(NamedTuple):
    """The last β, and the number of restarts."""

    beta: jax.Array  #: β in the last update; 0 at a restart
    restarts: jax.Array  #: number of restarts along −g, not counting the first update


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
        gg = tree.vdot(new, new)
        b = _beta(beta, new, old, p, scalar(truncation))
        ascent = tree.map(lambda g, p: g + b * p, new, p)
        cycle = min(_CYCLE * tree.count(g), jnp.iinfo(jnp.int32).max)
        restarts = (
            (state.since_restart == 0)
            | (state.since_restart >= cycle)
            | (jnp.abs(tree.vdot(new, old)) > scalar(restart) * gg)
            | ~(tree.vdot(new, ascent) > 0)
            | ~jnp.isfinite(b)
        )
        b = jnp.where(restarts, 0, b)
        direction = tree.select(restarts, g, tree.map(lambda g, p: g + b * p, g, state.direction))
        started = state.since_restart > 0
        info = NonlinearCgInfo(
            b.astype(state.info.beta.dtype),
            tree.add_count(state.info.restarts, (restarts & started).astype(jnp.int32)),
        )
        since = jnp.where(restarts, 1, state.since_restart + 1)
        return tree.cast_like(direction, grads), ScaleByNonlinearCgState(since, g, direction, info)

    return transformation(init, update)


def _beta(
    beta: Beta, g: tree.PyTree, old: tree.PyTree, p: tree.PyTree, truncation: jax.Array
) -> jax.Array:
    """β from the new gradient, the old gradient and the last direction of ascent p.

    The papers write d = −p for the direction of descent, so their dᵀy is −pᵀy here.
    """
    y = tree.map(jnp.subtract, g, old)
    gg, old_gg, py, gy = (tree.vdot(a, b) for a, b in ((g, g), (old, old), (p, y), (g, y)))
    if beta == "fletcher_reeves":
        return tree.divide(gg, old_gg)
    if beta == "polak_ribiere":
        return jnp.maximum(tree.divide(gy, old_gg), 0)
    if beta == "hestenes_stiefel":
        return tree.divide(gy, -py)
    if beta == "dai_yuan":
        return tree.divide(gg, -py)
    along = tree.divide(tree.vdot(g, p), py)
    least = -truncation * tree.divide(tree.vdot(old, p), tree.vdot(p, p))
    return jnp.maximum(tree.divide(gy - 2 * tree.vdot(y, y) * along, -py), least)


@checked
def nonlinear_cg(
    beta: Beta = "polak_ribiere",
    *,
    restart: NonNegative = 1.0,
    truncation: NonNegative = 0.4,
    ravel: bool = True,
    decrease: BelowHalf = 0.1,
    curvature: Fraction = 0.2,
    noise: Fraction = 1e-6,
    max_trials: Count = 30,
) -> optax.GradientTransformationExtraArgs:
    """Nonlinear conjugate gradients with a line search.

    The direction and the step are::

        d ← −g + β d_old
        θ ← θ + t d

    With y = g − g_old and d for d_old, β is one of::

        fletcher_reeves   gᵀg / g_oldᵀg_old
        polak_ribiere     max(gᵀy / g_oldᵀg_old, 0)
        hestenes_stiefel  gᵀy / dᵀy
        dai_yuan          gᵀg / dᵀy
        hager_zhang       max((gᵀy − 2 ‖y‖² gᵀd / dᵀy) / dᵀy, η dᵀg_old / dᵀd)

    All five agree if the objective is quadratic and the steps are exact; the method then is linear
    conjugate gradients. The method restarts with d = −g every 6 n updates for n parameters, if
    ``|gᵀg_old| > ν ‖g‖²`` (Powell's test), and if d does not descend.

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
      (2006), §5.2. Hager & Zhang, "A survey of nonlinear conjugate gradient methods", Pacific J.
      Optim. 2:35 (2006); "The limited memory conjugate gradient method", SIAM J. Optim. 23:2150
      (2013), for η.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: x[0] ** 2 + 50 * x[1] ** 2
    >>> solution = gx.minimize(bowl, jnp.asarray([5.0, 1.0]), gx.nonlinear_cg(), tol=1e-3)
    >>> gx.Status(int(solution.status)).name
    'converged'
    """
    return search(
        "nonlinear_cg",
        scale_by_nonlinear_cg(beta, restart=restart, truncation=truncation),
        Rules(decrease, curvature, noise, max_trials),
        unit_step=False,
        ravel=ravel,
        asked="always, kept if accepted",
    )
