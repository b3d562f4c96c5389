"""Newton's method with its step from conjugate gradients: products with the Hessian alone.

At θ, with the gradient g, products with the Hessian H and the learning rate ε::

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
from gradxform.preconditioners import Preconditioner, checked_inverse
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
    """What the updates did; the counters run over all updates."""

    curvature_products: jax.Array  #: products with the Hessian
    evaluations: jax.Array  #: of ``value_fn``, where a long step was doubtful
    fallbacks: jax.Array  #: updates that took the gradient, as CG gave no direction of descent
    skipped: jax.Array  #: updates whose gradient was not finite, which moved nothing
    tol: jax.Array  #: η of the last update, the relative residual that CG went down to


class ScaleByNewtonCgState(NamedTuple):
    """State of :func:`scale_by_newton_cg`."""

    count: jax.Array  #: updates made so far
    grad_norm: jax.Array  #: ‖g‖ of the last update
    tol: jax.Array  #: η of the last update
    direction: tree.PyTree  #: d of the last update, in at least float32
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
    r"""The direction of :func:`newton_cg`, without step or sign: :math:`d \approx (H + αI)^{-1} g`.

    ``gx.with_line_search(gx.scale_by_newton_cg())`` is the method that converges from far away.

    Args:
      damping: α, see :func:`newton_cg`.
      curvature: see :func:`newton_cg`.
      tol: see :func:`newton_cg`.
      forcing: see :func:`newton_cg`.
      maxiter: see :func:`newton_cg`.
      preconditioner: see :func:`newton_cg`.
      warm_start: see :func:`newton_cg`.
      bound: see :func:`newton_cg`; ``None`` here, since a line search bounds the step.

    Returns:
      The transformation; ``update`` needs ``params`` and ``value_fn``.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4  # its minima are −1
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
    """What a solve tells beside d."""

    grad_norm: jax.Array
    tol: jax.Array
    products: jax.Array
    descends: jax.Array  # whether −d leads downhill
    longest: jax.Array  # the bound of ‖d‖ where the model is not to be believed


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
    """:func:`scale_by_newton_cg` as a part of ``method``, which its errors name."""

    def init(params: tree.PyTree) -> ScaleByNewtonCgState:
        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        def number() -> jax.Array:
            return jnp.array(scalar(0), copy=True)

        info = NewtonCgInfo(count(), count(), count(), count(), number())
        return ScaleByNewtonCgState(count(), number(), number(), tree.zeros_like(params), info)

    def solve(
        consts: list[jax.Array],
        g: tree.PyTree,
        state: ScaleByNewtonCgState,
        of_consts: Callable[..., tree.PyTree],
    ) -> tuple[tree.PyTree, _Found]:
        """d, and what was found on the way."""

        def product(v: tree.PyTree) -> tree.PyTree:
            return of_consts(v, *consts)

        inverse, made = checked_inverse(method, preconditioner, product, g, state.count)
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
        return d, _Found(grad_norm, eta, products, descends, longest)

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

        # d is found by loops without a derivative, and is then given that of the exact solution
        product, consts = of_constants(
            lambda v: tree.map(lambda v, hv: hv + alpha * v, v, undamped(v)), g
        )
        d, found = solve(*jax.lax.stop_gradient((consts, g, state)), product)
        evaluations = jnp.array(0, jnp.int32)
        if bound is not None:
            part, evaluations = _believed(value_fn, *jax.lax.stop_gradient((params, d)), found)
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
            info,
        )
        return tree.cast_like(d, grads), new_state

    return protocol.transformation(init, update)


def _believed(
    value_fn: Callable[..., Any], params: tree.PyTree, d: tree.PyTree, found: _Found
) -> tuple[jax.Array, jax.Array]:
    """The part of a long step that is taken, and the evaluations made to know.

    A long step whose end is higher than its beginning is shortened to the bound.
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
    r"""Newton's method without the Hessian: conjugate gradients solve for the step.

    Its steps may climb far from a minimum: ``gx.with_line_search(gx.scale_by_newton_cg())`` and
    :func:`gradxform.trust_region` are the safe forms.

    .. math::
        \theta \leftarrow \theta - \varepsilon_k d, \qquad (H + \alpha I)\, d \approx g

    ``jax.scipy.sparse.linalg.cg`` goes on until :math:`\|(H + \alpha I) d - g\| \le \eta_k \|g\|`.
    Each of its iterations takes one product with H; H itself is never made.
    With the Eisenstat–Walker sequence

    .. math::
        \eta_k = \min\big(\eta,\; 0.9 (\|g_k\| / \|g_{k-1}\|)^2\big)

    the steps are rough far from a minimum and exact near it. (η_k is not let fall below 0.9
    η_{k−1}² while that is above 0.1.)

    CG writes :math:`d = \sum_j \beta_j p_j` with :math:`\beta_j = \|r_j\|^2 / p_j^T (H + \alpha I)
    p_j`. Along a direction :math:`p_j` of negative curvature that leads uphill, and along one of
    little curvature it leads far beyond where the quadratic model holds: on a small tanh net such a
    step can multiply the loss by a million. So CG ends before the first direction along which H
    itself has negative curvature, and d is then at most K times as long as the gradient step that
    the size of the curvature suggests,

    .. math::
        \|d\| \le K \frac{\|g\|^2}{\|(H + \alpha I)\, g\|}

    with K the ``bound``. Where CG meets no negative curvature, a longer d is taken if the objective
    is not higher at its end, which takes two evaluations; otherwise the bound holds. So one step
    solves a quadratic. With ``bound=None``, the slide's form, CG goes on with :math:`|\beta_j|`, so
    that −d descends and leaves saddles, however far.

    CG also ends before a direction without curvature, and where products are not finite. If nothing
    is left then, or if a warm start has led to an ascent, d = g. If g is not finite, the step is
    zero. Derivatives through d are those of the exact solution of :math:`(H + \alpha I)\, d = g`. A
    smaller ε or a larger α shortens the steps.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      damping: α ≥ 0, in units of the curvature.
      curvature: of ``(value_fn, params)`` to a symmetric map; ``None`` for ``gx.hessian()``.
        ``gx.gauss_newton()`` is positive semi-definite and its product cheaper.
      tol: η in [0, 1), a relative residual.
      forcing: ``"eisenstat_walker"``, or ``"fixed"`` for η_k = η.
      maxiter: most iterations of CG in an update; never more than twice the parameters, nor 1000.
      preconditioner: ``gx.hutchinson_diagonal()``, ``gx.nystrom()``, or a function that is called
        in each update with the damped product, the gradient and the update count, and returns an
        approximate inverse, positive definite, and how many products it made.
      warm_start: in [0, 1): what multiple of the last d CG begins from. Takes one product more
        unless 0. For gradients that change little from update to update.
      bound: K ≥ 1, or ``None`` for no bound.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``; keyword arguments named like
      arguments of ``value_fn`` are handed on to it. It keeps one vector.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` is not
        given ``params`` and ``value_fn``, or the preconditioner returns another structure.

    References:
      Lecture 7, "Conjugate Gradients". Nocedal & Wright, *Numerical Optimization* (2006),
      Algorithm 7.1; differs: the bound on d, and what ``bound=None`` does. Eisenstat & Walker,
      "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17:16 (1996),
      choice 2.

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
    """η_k of Eisenstat & Walker's choice 2, with γ = 0.9, α = 2 and their safeguard."""
    eta = 0.9 * jnp.square(tree.divide(norm, state.grad_norm))
    least = 0.9 * jnp.square(state.tol)
    eta = jnp.where(least > 0.1, jnp.maximum(eta, least), eta)
    known = (state.count > 0) & jnp.isfinite(eta)
    return jnp.where(known, jnp.minimum(eta, largest), largest)
