"""The direction of nonlinear conjugate gradients with a preconditioner that each restart renews.

Shanno (1978), with Beale's restarts::

    P ← I
    p ← P g
    repeat
        β ← one of the formulas, with P
        if a restart is due:
            γ ← sᵀy / yᵀy               s and y of the last step
            P ← what BFGS makes of γ I and s, y
            β ← 0
        p ← P g + β p

Between two restarts P does not change, so that on a quadratic the method is still linear conjugate
gradients. P makes the direction as long as a step, and t = 1 is tried first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.hyperparameters import NonNegative, scalar
from gradxform.info import diagnostics
from gradxform.kernels import max_abs, quotients, vdots
from gradxform.line_search import Point
from gradxform.protocol import require_params, transformation
from gradxform.second_order.beta import Beta, Products, beta_of, restart_is_due
from gradxform.second_order.pairs import curvature_pair

# updates for each parameter after which it restarts. P is renewed at restarts, so more of
# them pay than in the plain method
_CYCLE = 2


@diagnostics
class NonlinearCgInfo(NamedTuple):
    """The last β, and the number of restarts."""

    beta: jax.Array  #: β in the last update; 0 at a restart
    restarts: jax.Array  #: number of restarts, not counting the first update


class Preconditioner(NamedTuple):
    """P / γ: what BFGS makes of I and one pair. It is I where s and y are 0.

    The pair is scaled so that sᵀy = yᵀy = 1, which does not change P / γ.
    """

    s: tree.PyTree  #: change of θ
    y: tree.PyTree  #: change of g
    gamma: jax.Array  #: γ; 1 before there is a pair


class PreconditionedCgState(NamedTuple):
    """State of :func:`preconditioned_cg`; the trees are in at least float32."""

    since_restart: jax.Array  #: updates since the last restart; 0 before P has learnt anything
    preconditioner: Preconditioner
    info: NonlinearCgInfo


def preconditioned_cg(
    method: str, formula: Beta, nu: NonNegative, truncation: NonNegative
) -> optax.GradientTransformationExtraArgs:
    """The direction, as a part of ``method``, which its errors name.

    ``update`` is given the last accepted point and the direction of descent that led on from it.
    """

    def init(params: tree.PyTree) -> PreconditionedCgState:
        def zeros() -> tree.PyTree:
            return tree.zeros_like(params)

        gamma = jnp.ones((), jnp.result_type(float, *jax.tree.leaves(zeros())))
        return PreconditionedCgState(
            since_restart=jnp.array(0, jnp.int32),
            preconditioner=Preconditioner(zeros(), zeros(), gamma),
            info=NonlinearCgInfo(jnp.array(scalar(0), copy=True), jnp.array(0, jnp.int32)),
        )

    def update(
        grads: tree.PyTree,
        state: PreconditionedCgState,
        params: tree.PyTree | None = None,
        *,
        last: Point,
        direction: tree.PyTree,
        restart: jax.Array,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, PreconditionedCgState]:
        del extra_args
        theta = require_params(method, params, grads)
        before = state.preconditioner
        g = tree.map(lambda _, g: g, last.grad, grads)
        s, y = tree.map(jnp.subtract, theta, last.params), tree.map(jnp.subtract, g, last.grad)
        sizes = max_abs(*jax.lax.stop_gradient((s, y, g, last.grad)))
        learnt, is_useful = _learnt(before, s, y, sizes[:2])

        # β does not depend on the scale of the gradient; this scale keeps squares from underflowing
        unit = tree.reciprocal(jnp.maximum(sizes[2], sizes[3]))
        new, old = tree.scale(unit, g), tree.scale(unit, last.grad)
        p = tree.scale(-unit / before.gamma, direction)
        along, along_old, along_learnt = _along((before, new), (before, old), (learnt, new))
        steep, steep_old = _applied(before, new, along), _applied(before, old, along_old)
        q = _products(formula, before, new, old, steep, steep_old, p)
        b = beta_of(formula, q, scalar(truncation))
        cycle = min(_CYCLE * tree.count(g), jnp.iinfo(jnp.int32).max)
        restarts = restart | restart_is_due(b, q, state.since_restart, cycle=cycle, nu=scalar(nu))

        used = tree.select(restarts, learnt, before)
        steep = _applied(used, new, tree.select(restarts, along_learnt, along))
        b = jnp.where(restarts, 0, b)
        ascent = tree.map(lambda g, p: g + b * p, steep, tree.select(restarts, steep, p))
        started = state.since_restart > 0
        info = NonlinearCgInfo(
            b.astype(state.info.beta.dtype),
            tree.add_count(state.info.restarts, (restarts & started).astype(jnp.int32)),
        )
        first = (is_useful | started).astype(jnp.int32)
        since = jnp.where(restarts, first, state.since_restart + 1)
        ascent = tree.scale(used.gamma / unit, ascent)
        return tree.cast_like(ascent, grads), PreconditionedCgState(since, used, info)

    return transformation(init, update)


def _learnt(
    before: Preconditioner, s: tree.PyTree, y: tree.PyTree, sizes: list[jax.Array]
) -> tuple[Preconditioner, jax.Array]:
    """The preconditioner of the pair s, y, if that has positive curvature, and whether it has."""
    pair = curvature_pair(s, y, jnp.array(True), sizes)
    length = tree.sqrt(pair.yy)
    of_s, of_y, gamma = quotients(
        (length, pair.sy), (jnp.ones_like(length), length), (pair.sy, pair.yy)
    )
    new = Preconditioner(tree.scale(of_s, pair.s), tree.scale(of_y, pair.y), gamma)
    is_useful = pair.is_useful & (gamma > 0)
    return tree.select(is_useful, new, before), is_useful


def _along(*pairs: tuple[Preconditioner, tree.PyTree]) -> list[tuple[jax.Array, jax.Array]]:
    """The products sᵀv and yᵀv of several preconditioners and vectors, in one pass."""
    products = iter(vdots(*((x, v) for matrix, v in pairs for x in (matrix.s, matrix.y))))
    return list(zip(products, products, strict=True))


def _applied(
    matrix: Preconditioner, v: tree.PyTree, along: tuple[jax.Array, jax.Array]
) -> tree.PyTree:
    """P v / γ, of v and its products ``along`` s and y."""
    sv, yv = along
    return tree.map(lambda v, s, y: v - sv * y + (2 * sv - yv) * s, v, matrix.s, matrix.y)


def _products(
    formula: Beta,
    matrix: Preconditioner,
    g: tree.PyTree,
    old: tree.PyTree,
    steep: tree.PyTree,
    steep_old: tree.PyTree,
    p: tree.PyTree,
) -> Products:
    """What the formula needs, where ``steep`` and ``steep_old`` are the gradients times P / γ."""
    y, steep_y = tree.map(jnp.subtract, g, old), tree.map(jnp.subtract, steep, steep_old)
    pairs = [(g, steep), (old, steep_old), (g, steep_old), (g, steep_y), (p, y), (g, p)]
    if formula != "hager_zhang":
        return Products._make([*vdots(*pairs), *[jnp.zeros(())] * 3])
    s = matrix.s
    pairs += [(y, steep_y), (old, p), (p, p), (s, p), (matrix.y, p), (s, s)]
    *products, p_p, s_p, y_p, s_s = vdots(*pairs)
    # pᵀ (P / γ)⁻¹ p
    p_p = jnp.maximum(p_p - s_p * tree.divide(s_p, s_s), 0) + y_p**2
    return Products._make([*products, p_p])
