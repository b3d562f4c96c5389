"""Newton's method with a step from conjugate gradients: it needs only products with the Hessian.

With the gradient g and the Hessian H at θ, and the learning rate ε::

    d ← conjugate gradients for (H + αI) d = g, until ‖(H + αI) d − g‖ ≤ η ‖g‖
    θ ← θ − ε d
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.curvature import Curvature, hessian
from gradxform.first_order.sgd import sgd
from gradxform.hyperparameters import (
    Count,
    Fraction,
    LearningRate,
    NonNegative,
    Scalar,
    checked,
    scalar,
)
from gradxform.info import diagnostics
from gradxform.objective import bind
from gradxform.preconditioners import Preconditioner, Request, checked_inverse, first_memory
from gradxform.second_order.conjugate_gradients import (
    as_solution,
    counted_cg,
    norm,
    of_constants,
)
from gradxform.sharding import varying_like

Forcing = Literal["eisenstat_walker", "fixed"]


@diagnostics
class NewtonCgInfo(NamedTuple):
    """Counts over all updates, and the tolerance of the last one."""

    curvature_products: jax.Array  #: products with the Hessian
    evaluations: jax.Array  #: evaluations of ``value_fn``, made to check long steps
    fallbacks: jax.Array  #: updates along −g, because CG found no descent direction
    skipped: jax.Array  #: updates skipped because the gradient was NaN or infinite
    tol: jax.Array  #: η in the last update: CG stops at a residual of η ‖g‖


class ScaleByNewtonCgState(NamedTuple):
    """State of :func:`scale_by_newton_cg`."""

    count: jax.Array  #: updates made so far
    grad_norm: jax.Array  #: ‖g‖ in the last update
    tol: jax.Array  #: η in the last update
    direction: tree.PyTree  #: d in the last update, in at least float32
    preconditioner: tree.PyTree  #: memory of the preconditioner; () if it has none
    info: NewtonCgInfo


@checked
def scale_by_newton_cg(
    *,
    damping: NonNegative = 0.0,
    curvature: Curvature | None = None,
    tol: Fraction = 0.1,
    forcing: Forcing = "eisenstat_walker",
    maxiter: Count = 100,
    preconditioner: Preconditioner | None = None,
    warm_start: Fraction = 0.0,
    bound: Count | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`newton_cg`, without step or sign: d ≈ (H + αI)⁻¹ g.

    ``gx.with_line_search(gx.scale_by_newton_cg())`` is Newton-CG with a line search. It is safe to
    start far from a minimum.

    Args:
      damping: α, see :func:`newton_cg`.
      curvature: see :func:`newton_cg`.
      tol: see :func:`newton_cg`.
      forcing: see :func:`newton_cg`.
      maxiter: see :func:`newton_cg`.
      preconditioner: see :func:`newton_cg`.
      warm_start: see :func:`newton_cg`.
      bound: see :func:`newton_cg`. ``None`` by default, because a line search bounds the step.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4  # minimum value −1
    >>> tx = gx.with_line_search(gx.scale_by_newton_cg())
    >>> gx.minimize(saddle, jnp.asarray([1.0, 0.1]), tx, tol=1e-3).value.round(3)
    Array(-1., dtype=float32)
    """
    return _direction(
        "scale_by_newton_cg",
        damping,
        curvature,
        tol,
        forcing,
        maxiter,
        preconditioner,
        warm_start,
        bound,
    )


class _Found(NamedTuple):
    """What a solve returns besides d."""

    grad_norm: jax.Array  # ‖g‖
    tol: jax.Array  # η
    products: jax.Array  # products with the Hessian
    descends: jax.Array  # whether −d is a descent direction
    longest: jax.Array  # bound on ‖d‖ if the objective rises along the full step


def _direction(
    method: str,
    damping: Scalar,
    curvature: Curvature | None,
    tol: Scalar,
    forcing: Forcing,
    maxiter: Scalar,
    preconditioner: Preconditioner | None,
    warm_start: Scalar,
    bound: Scalar | None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_newton_cg`, with errors that name ``method``."""

    def init(params: tree.PyTree) -> ScaleByNewtonCgState:
        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        def number() -> jax.Array:
            return jnp.array(scalar(0), copy=True)

        info = NewtonCgInfo(count(), count(), count(), count(), number())
        memory = first_memory(preconditioner, params)
        return ScaleByNewtonCgState(
            count(), number(), number(), tree.zeros_like(params), memory, info
        )

    def solve(
        consts: list[jax.Array],
        g: tree.PyTree,
        state: ScaleByNewtonCgState,
        point: tuple[tree.PyTree, Any],
        of_consts: Callable[..., tree.PyTree],
    ) -> tuple[tree.PyTree, _Found, tree.PyTree]:
        """d, the numbers that come with it, and the preconditioner's next memory."""

        def product(v: tree.PyTree) -> tree.PyTree:
            return of_consts(v, *consts)

        request = Request(product, g, state.count, scalar(damping), *point)
        inverse, made, memory = checked_inverse(
            method, preconditioner, request, state.preconditioner
        )
        grad_norm = norm(g)
        eta = scalar(tol)
        if forcing == "eisenstat_walker":
            eta = _eisenstat_walker(eta, grad_norm, state)
        start = tree.scale(scalar(warm_start), state.direction)
        warm = tree.max_abs(start) > 0
        residual = jax.lax.cond(
            warm, lambda: jax.tree.map(jnp.subtract, g, product(start)), lambda: g
        )
        left = norm(residual)
        solution = counted_cg(
            product,
            residual,
            tol=jnp.where(left > 0, eta * tree.divide(grad_norm, left), 1),
            maxiter=maxiter,
            inverse=preconditioner and inverse,
            least=None if bound is None else damping,
        )
        step = solution.x
        longest = scalar(1 if bound is None else bound) * solution.first_step
        if bound is not None:
            within = jnp.minimum(tree.divide(longest, norm(step)), 1)
            step = tree.scale(jnp.where(solution.low, within, 1), step)
        d = jax.tree.map(jnp.add, start, step)
        products = solution.products + warm.astype(jnp.int32) + made
        slope = tree.vdot(d, g)
        descends = (slope > 0) & jnp.isfinite(slope) & jnp.isfinite(tree.max_abs(d))
        return d, _Found(grad_norm, eta, products, descends, longest), memory

    def update(
        grads: tree.PyTree,
        state: ScaleByNewtonCgState,
        params: tree.PyTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByNewtonCgState]:
        params = protocol.require_params(method, params, grads)
        value_fn = bind(protocol.require(method, "value_fn", value_fn), extra_args)
        protocol.check_unmasked(method, params)
        if tree.count(grads) == 0:
            return grads, state
        g = jax.tree.map(tree.promote, grads)
        finite = jnp.isfinite(tree.max_abs(g))
        g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))
        undamped = (curvature or hessian())(value_fn, params)
        alpha = varying_like(scalar(damping), g)

        # the loops that find d have no derivative; ``as_solution`` gives d that of the exact one
        product, consts = of_constants(
            lambda v: tree.map(lambda v, hv: hv + alpha * v, v, undamped(v)), g
        )
        at = jax.lax.stop_gradient(params), value_fn
        found_with = solve(*jax.lax.stop_gradient((consts, g, state)), at, product)
        d, found, memory = jax.lax.stop_gradient(found_with)
        evaluations = jnp.array(0, jnp.int32)
        if bound is not None:
            part, evaluations = _safe_part(value_fn, *jax.lax.stop_gradient((params, d)), found)
            d = tree.scale(part, d)
        d = as_solution(product, consts, g, jax.lax.stop_gradient(d))
        d = tree.select(found.descends, d, g)
        info = NewtonCgInfo(
            tree.add_count(state.info.curvature_products, found.products),
            tree.add_count(state.info.evaluations, evaluations),
            tree.add_count(
                state.info.fallbacks, (~found.descends & (found.grad_norm > 0)).astype(jnp.int32)
            ),
            tree.add_count(state.info.skipped, (~finite).astype(jnp.int32)),
            jnp.where(finite, found.tol, state.tol),
        )
        new_state = ScaleByNewtonCgState(
            tree.add_count(state.count, 1),
            jnp.where(finite, found.grad_norm, state.grad_norm),
            info.tol,
            tree.select(finite, d, state.direction),
            memory,
            info,
        )
        return tree.cast_like(d, grads), new_state

    return protocol.transformation(init, update)


def _safe_part(
    value_fn: Callable[..., Any], params: tree.PyTree, d: tree.PyTree, found: _Found
) -> tuple[jax.Array, jax.Array]:
    """The part of the step d to take, and the number of evaluations needed to find it.

    A step longer than the bound is taken in full unless the objective rises along it. Then it is
    shortened to the bound.
    """
    length = norm(d)
    is_long = found.descends & (length > found.longest) & jnp.isfinite(length)

    def part() -> jax.Array:
        end = tree.map(lambda x, d: x - d, params, d)
        rises = ~(scalar(value_fn(end)) <= scalar(value_fn(params)))
        shorter = jnp.where(rises, tree.divide(found.longest, length), 1)
        return varying_like(shorter, length)

    one = varying_like(scalar(1), length)
    return jax.lax.cond(is_long, part, lambda: one), 2 * is_long.astype(jnp.int32)


@checked
def newton_cg(
    learning_rate: LearningRate = 1.0,
    damping: NonNegative = 0.0,
    *,
    curvature: Curvature | None = None,
    tol: Fraction = 0.1,
    forcing: Forcing = "eisenstat_walker",
    maxiter: Count = 100,
    preconditioner: Preconditioner | None = None,
    warm_start: Fraction = 0.0,
    bound: Count | None = 10.0,
) -> optax.GradientTransformationExtraArgs:
    """Newton-CG with full steps; safer is ``gx.with_line_search(gx.scale_by_newton_cg())``.

    Far from a minimum a full Newton step may increase the loss. The line search shortens the step
    until the loss falls; :func:`gradxform.trust_region` is safe too. The update here is the full
    step::

        solve (H + αI) d = g by conjugate gradients, until ‖(H + αI) d − g‖ ≤ η_k ‖g‖
        θ ← θ − ε d

    Each iteration of ``jax.scipy.sparse.linalg.cg`` takes one product with the Hessian H. The
    matrix H itself is never formed. The tolerance is Eisenstat and Walker's::

        η_k = min(η, 0.9 (‖g_k‖ / ‖g_{k−1}‖)²)

    So the steps are rough far from a minimum and accurate near it. (η_k is at least 0.9 η_{k−1}²
    while that is above 0.1.)

    Conjugate gradients (CG) add up steps along directions p. If H has negative curvature along p,
    the step goes uphill. If the curvature is small, it goes far beyond where the quadratic model
    holds: on a small tanh net such a step can multiply the loss by a million. So CG stops before
    the first direction of negative curvature, and then the step is at most K times as long as a
    gradient step, with K the ``bound``::

        ‖d‖ ≤ K ‖g‖² / ‖(H + αI) g‖

    Without negative curvature, a longer step is taken if the objective does not rise along it;
    this check takes two evaluations. With ``bound=None``, the form of the lecture, CG uses the
    absolute value of the curvature instead of stopping. The step then descends and leaves saddles,
    but it may be very long.

    CG also stops before a direction of zero curvature and when a product is not finite. If CG found
    no descent direction, d = g. If g is not finite, the step is zero. Derivatives through d are
    those of the exact solution of (H + αI) d = g. A smaller ε or a larger α shortens the steps.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      damping: α ≥ 0, in units of the curvature.
      curvature: ``gx.hessian()``, ``gx.gauss_newton()``, or your own function of
        ``(value_fn, params)`` that returns a symmetric linear map; ``None`` for ``gx.hessian()``.
        The Gauss–Newton matrix is positive semi-definite and its products are cheaper.
      tol: η in [0, 1), the largest relative residual.
      forcing: ``"eisenstat_walker"``, or ``"fixed"`` for η_k = η.
      maxiter: largest number of CG iterations in an update. It is never more than 1000, nor twice
        the number of parameters.
      preconditioner: ``gx.hutchinson_diagonal()``, ``gx.nystrom()``, ``gx.kronecker_inverse()`` for
        nets, or your own function. Each update calls your function with v ↦ (H + αI) v, the
        gradient and the update count. It returns an approximate inverse (a positive definite map)
        and the number of products it took.
      warm_start: in [0, 1): CG starts from this multiple of the last d. Unless it is 0, that takes
        one more product. Useful if gradients change little between updates.
      bound: K ≥ 1, or ``None`` for no bound.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``. Other keyword arguments of
      ``update`` reach the arguments of ``value_fn`` of the same name. The state holds one vector.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` is not
        given ``params`` and ``value_fn``, or the preconditioner returns a pytree unlike the
        parameters.

    References:
      Lecture 7, "Conjugate Gradients". Nocedal & Wright, *Numerical Optimization* (2006),
      Algorithm 7.1. Differs: the bound on d, and ``bound=None``. Eisenstat & Walker, "Choosing the
      forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17:16 (1996), choice 2.

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> f = lambda x: jnp.sum(jnp.asarray([1.0, 10.0, 100.0]) * (x - 1) ** 2)
    >>> x, tx = jnp.zeros(3), gx.newton_cg(tol=1e-4)
    >>> updates, state = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
    >>> optax.apply_updates(x, updates).round(3)  # CG takes three iterations for three eigenvalues
    Array([1., 1., 1.], dtype=float32)
    >>> int(state[0].info.curvature_products)
    3
    """
    direction = _direction(
        "newton_cg", damping, curvature, tol, forcing, maxiter, preconditioner, warm_start, bound
    )
    return optax.chain(direction, sgd(learning_rate))


def _eisenstat_walker(
    largest: jax.Array, norm: jax.Array, state: ScaleByNewtonCgState
) -> jax.Array:
    """η_k by Eisenstat & Walker's choice 2, with γ = 0.9, α = 2 and their safeguard."""
    eta = 0.9 * jnp.square(tree.divide(norm, state.grad_norm))
    least = 0.9 * jnp.square(state.tol)
    eta = jnp.where(least > 0.1, jnp.maximum(eta, least), eta)
    is_known = (state.count > 0) & jnp.isfinite(eta)
    return jnp.where(is_known, jnp.minimum(eta, largest), largest)
