"""Nonlinear conjugate gradients: each direction keeps a part of the one before.

Nocedal & Wright, *Numerical Optimization* (2006), Algorithm 5.4, with restarts::

    d ← −g
    repeat
        θ ← θ + t d                     t by a line search
        β ← one of the formulas of :func:`nonlinear_cg`
        β ← 0 after 6 n updates, where |gᵀg_old| > ν ‖g‖², and where −g + β d would not descend
        d ← −g + β d

The state keeps p = −d, a direction of ascent as Optax's methods return it.
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

# updates for each parameter after which it begins again, as in Hager & Zhang's CG_DESCENT: where n
# is small, n updates are too few to follow a valley
_CYCLE = 6


@diagnostics
class NonlinearCgInfo(NamedTuple):
    """What the last updates did."""

    beta: jax.Array  #: β of the last update, 0 after a restart
    restarts: jax.Array  #: how often the direction was the gradient again, the start apart


class ScaleByNonlinearCgState(NamedTuple):
    """State of :func:`scale_by_nonlinear_cg`; the trees are in at least float32."""

    since_restart: jax.Array  #: updates since the direction was the gradient, 0 before the first
    grad: tree.PyTree  #: g of the last update
    direction: tree.PyTree  #: p, the last direction of ascent
    info: NonlinearCgInfo


@checked
def scale_by_nonlinear_cg(
    beta: Beta = "polak_ribiere", *, restart: NonNegative = 1.0, truncation: NonNegative = 0.4
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of :func:`nonlinear_cg`, without step or sign: :math:`p = g + \beta p_{old}`.

    Args:
      beta: which formula, see :func:`nonlinear_cg`.
      restart: ν ≥ 0: begin again with the gradient when successive gradients are far from
        orthogonal, :math:`|g^T g_{old}| > \nu \|g\|^2` (Powell).
      truncation: η of Hager and Zhang's lower bound of β.

    Returns:
      The transformation; ``update`` needs the gradient alone, at points that an accurate line
      search gives.

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
        # β does not depend on the unit of the gradient; this one keeps squares from underflowing
        unit = tree.reciprocal(constant_size((g, state.grad)))
        new, old, p = (tree.scale(unit, x) for x in (g, state.grad, state.direction))
        gg = tree.vdot(new, new)
        b = _beta(beta, new, old, p, scalar(truncation))
        ascent = tree.map(lambda g, p: g + b * p, new, p)
        cycle = min(_CYCLE * tree.count(g), jnp.iinfo(jnp.int32).max)
        again = (
            (state.since_restart == 0)
            | (state.since_restart >= cycle)
            | (jnp.abs(tree.vdot(new, old)) > scalar(restart) * gg)
            | ~(tree.vdot(new, ascent) > 0)
            | ~jnp.isfinite(b)
        )
        b = jnp.where(again, 0, b)
        direction = tree.select(again, g, tree.map(lambda g, p: g + b * p, g, state.direction))
        started = state.since_restart > 0
        info = NonlinearCgInfo(
            b.astype(state.info.beta.dtype),
            tree.add_count(state.info.restarts, (again & started).astype(jnp.int32)),
        )
        since = jnp.where(again, 1, state.since_restart + 1)
        return tree.cast_like(direction, grads), ScaleByNonlinearCgState(since, g, direction, info)

    return transformation(init, update)


def _beta(
    beta: Beta, g: tree.PyTree, old: tree.PyTree, p: tree.PyTree, truncation: jax.Array
) -> jax.Array:
    """β from the new and the old gradient and the last direction of ascent p.

    d = -p is the direction of descent in the papers, so their dᵀy is -pᵀy here.
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
    r"""Nonlinear conjugate gradients with a line search.

    .. math::
        d \leftarrow -g + \beta d_{old}, \qquad \theta \leftarrow \theta + t d

    with :math:`y = g - g_{old}` and β one of

    .. math::
        \beta^{FR} &= \frac{g^T g}{g_{old}^T g_{old}}, &
        \beta^{PR+} &= \max\Big(\frac{g^T y}{g_{old}^T g_{old}}, 0\Big), &
        \beta^{HS} &= \frac{g^T y}{d_{old}^T y}, \\
        \beta^{DY} &= \frac{g^T g}{d_{old}^T y}, &
        \beta^{HZ} &= \max\Big(\frac{1}{d_{old}^T y}
            \big(y - 2 d_{old} \frac{\|y\|^2}{d_{old}^T y}\big)^T g,\;
            \eta \frac{d_{old}^T g_{old}}{d_{old}^T d_{old}}\Big)

    All agree, and are linear conjugate gradients, where the objective is quadratic and the steps
    are exact. It begins again with d = −g every 6 n updates, when
    :math:`|g^T g_{old}| > \nu \|g\|^2` (Powell), and where d would not
    descend. The step t comes from
    :func:`gradxform.with_line_search`: the loop holds trial points, and
    :func:`gradxform.eval_params` gives θ.

    Args:
      beta: ``"polak_ribiere"`` (PR+), ``"fletcher_reeves"``, ``"hestenes_stiefel"``,
        ``"dai_yuan"`` or ``"hager_zhang"``.
      restart: ν ≥ 0 of Powell's test.
      truncation: η ≥ 0 of Hager and Zhang's lower bound.
      ravel: work on one vector, which compiles and runs many times faster where there are many
        leaves; False works leaf by leaf, sharded like the parameters.
      decrease: δ of the search, see :func:`gradxform.with_line_search`.
      curvature: σ of the search; conjugacy wants accurate steps, so it is small.
      noise: relative error of the objective.
      max_trials: trial points after which a search has failed.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value``, of one fixed objective: the
      full batch, not minibatches. It keeps five vectors.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range.

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
