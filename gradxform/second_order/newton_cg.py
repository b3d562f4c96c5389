"""Newton's method with its step from conjugate gradients: products with the Hessian alone."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg

from gradxform import protocol, tree
from gradxform.curvature import (
    Curvature,
    Preconditioner,
    Product,
    checked_inverse,
    hessian,
)
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

Forcing = Literal["eisenstat_walker", "fixed"]


class NewtonCgInfo(NamedTuple):
    """What the updates did; the counters run over all updates."""

    curvature_products: jax.Array  #: products with the Hessian
    fallbacks: jax.Array  #: updates that took the gradient, as CG gave no direction of descent
    skipped: jax.Array  #: updates whose gradient was not finite, which moved nothing
    tol: jax.Array  #: η of the last update, the relative residual that CG went down to


class ScaleByNewtonCgState(NamedTuple):
    """State of :func:`scale_by_newton_cg`."""

    count: jax.Array  #: updates made so far
    grad_norm: jax.Array  #: ‖g‖ of the last update
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

    Returns:
      The transformation; ``update`` needs ``params`` and ``value_fn``.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4  # its minima are −1
    >>> tx = gx.with_line_search(gx.scale_by_newton_cg())
    >>> gx.minimize(saddle, jnp.asarray([1.0, 0.1]), tx, tol=1e-3).value.round(3)
    Array(-1., dtype=float32)
    """
    return _direction(
        "scale_by_newton_cg", damping, curvature, tol, forcing, maxiter, preconditioner, warm_start
    )


def _direction(
    method: str,
    damping: Scalar,
    curvature: Curvature | None,
    tol: Scalar,
    forcing: Forcing,
    maxiter: Scalar,
    preconditioner: Preconditioner | None,
    warm_start: Scalar,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_newton_cg` as a part of ``method``, which its errors name."""

    def init(params: tree.PyTree) -> ScaleByNewtonCgState:
        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        def number() -> jax.Array:
            return jnp.array(scalar(0), copy=True)

        info = NewtonCgInfo(count(), count(), count(), number())
        return ScaleByNewtonCgState(count(), number(), tree.zeros_like(params), info)

    def update(
        grads: tree.PyTree,
        state: ScaleByNewtonCgState,
        params: tree.PyTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByNewtonCgState]:
        params = protocol.require_params(method, params, grads)
        value_fn = protocol.bind(protocol.require(method, "value_fn", value_fn), extra_args)
        protocol.check_unmasked(method, params)
        if tree.count(grads) == 0:
            return grads, state
        g = jax.tree.map(tree.promote, grads)
        finite = jnp.isfinite(tree.max_abs(g))
        g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))
        undamped, alpha = (curvature or hessian())(value_fn, params), scalar(damping)

        def product(v: tree.PyTree) -> tree.PyTree:
            return tree.map(lambda v, hv: hv + alpha * v, v, undamped(v))

        inverse, made = checked_inverse(method, preconditioner, product, g, state.count)
        norm = _norm(g)
        eta = scalar(tol)
        if forcing == "eisenstat_walker":
            eta = _eisenstat_walker(eta, norm, state)
        start = tree.scale(scalar(warm_start), state.direction)
        d, more = _solve(product, g, norm, start, eta, maxiter, preconditioner and inverse)

        slope = tree.vdot(d, g)
        descends = (slope > 0) & jnp.isfinite(slope) & jnp.isfinite(tree.max_abs(d))
        d = tree.select(descends, d, g)
        info = NewtonCgInfo(
            tree.add_count(state.info.curvature_products, more + made),
            tree.add_count(state.info.fallbacks, (~descends & (norm > 0)).astype(jnp.int32)),
            tree.add_count(state.info.skipped, (~finite).astype(jnp.int32)),
            jnp.where(finite, eta, state.info.tol),
        )
        new_state = ScaleByNewtonCgState(
            tree.add_count(state.count, 1),
            jnp.where(finite, norm, state.grad_norm),
            tree.select(finite, d, state.direction),
            info,
        )
        return tree.cast_like(d, grads), new_state

    return protocol.transformation(init, update)


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
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method without the Hessian: conjugate gradients solve for the step.

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
    p_j`, which leads uphill along directions :math:`p_j` of negative curvature. Here
    :math:`|\beta_j|` takes the place of β_j, so that −d descends and leaves saddles; where H + αI
    is positive definite nothing changes. CG ends before a direction without curvature, and where
    products are not finite. If nothing is left then, or if a warm start has led to an ascent, d is
    g; of a g that is not finite nothing moves.

    Far from a minimum a full step may still climb: there use
    ``gx.with_line_search(gx.scale_by_newton_cg())``, a smaller ε or a larger α.

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

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``; keyword arguments named like
      arguments of ``value_fn`` are handed on to it. It keeps one vector.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` is not
        given ``params`` and ``value_fn``, or the preconditioner returns another structure.

    References:
      Lecture 7, "Conjugate Gradients". Nocedal & Wright, *Numerical Optimization* (2006), §7.1;
      differs: negative curvature is used, where Algorithm 7.1 stops. Eisenstat & Walker, "Choosing
      the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17:16 (1996), choice 2.

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
        "newton_cg", damping, curvature, tol, forcing, maxiter, preconditioner, warm_start
    )
    return optax.chain(direction, sgd(learning_rate))


def _eisenstat_walker(
    largest: jax.Array, norm: jax.Array, state: ScaleByNewtonCgState
) -> jax.Array:
    """η_k of Eisenstat & Walker's choice 2, with γ = 0.9, α = 2 and their safeguard."""
    eta = 0.9 * jnp.square(tree.divide(norm, state.grad_norm))
    least = 0.9 * jnp.square(state.info.tol)
    eta = jnp.where(least > 0.1, jnp.maximum(eta, least), eta)
    known = (state.count > 0) & jnp.isfinite(eta)
    return jnp.where(known, jnp.minimum(eta, largest), largest)


def _norm(g: tree.PyTree) -> jax.Array:
    """‖g‖, without overflow or underflow of the squares."""
    size = tree.reciprocal(tree.max_abs(g))
    unit = tree.scale(size, g)
    return scalar(jnp.sqrt(tree.vdot(unit, unit)) / size)


_MOST_ITERATIONS = 1000
_NORM, _MARK = 1e6, 1e-12  # of the right-hand side, and what is small beside it

# CG neither tells its iterations nor looks at the curvature, so its operator does. A row of marks,
# all 0 at first, travels with the vector; each product sets one more of them, too small to count
# in the inner products. Those set in the solution are the products made before the last.
_Marked: TypeAlias = tuple[tree.PyTree, jax.Array]


def _solve(
    product: Product,
    g: tree.PyTree,
    norm: jax.Array,
    start: tree.PyTree,
    tol: jax.Array,
    maxiter: Scalar,
    approximate_inverse: Product | None,
) -> tuple[tree.PyTree, jax.Array]:
    """The d of :func:`newton_cg`, and how many products it took."""
    dtype = jnp.result_type(*jax.tree.leaves(g))  # CG wants one for all leaves
    most = min(2 * sum(leaf.size for leaf in jax.tree.leaves(g)), _MOST_ITERATIONS)
    if isinstance(maxiter, int | float | np.number):
        most = min(most, int(maxiter))

    def inverse(marked: _Marked) -> _Marked:
        r, marks = marked
        assert approximate_inverse is not None
        z = approximate_inverse(tree.cast_like(r, g))
        return jax.tree.map(lambda z: z.astype(dtype), z), marks

    unit = tree.divide(scalar(_NORM), norm)
    b, x0 = (jax.tree.map(lambda x: (unit * x).astype(dtype), vector) for vector in (g, start))
    no_marks = jnp.zeros(most, dtype)
    d, marks = _conjugate_gradients(
        _operator(product, g, scaled=approximate_inverse is not None),
        (b, no_marks),
        (x0, no_marks),
        None if approximate_inverse is None else inverse,
        tol,
        jnp.minimum(scalar(maxiter), most),
    )
    products = jnp.sum(marks != 0, dtype=jnp.int32) + (norm > 0)
    return tree.scale(norm / _NORM, d), products


def _conjugate_gradients(
    operator: Callable[[_Marked], _Marked],
    b: _Marked,
    x0: _Marked,
    inverse: Callable[[_Marked], _Marked] | None,
    tol: jax.Array,
    maxiter: jax.Array,
) -> _Marked:
    """``jax.scipy.sparse.linalg.cg``, in automatic mode where the mesh has explicit axes.

    It takes inner products that explicit axes do not allow. The functions it calls see the mesh as
    it is.
    """

    def solve(a: Any, m: Any, b: _Marked, x0: _Marked, tol: Any, maxiter: jax.Array) -> _Marked:
        return cg(a, b, x0, tol=tol, maxiter=maxiter, M=m)[0]

    divided = [jax.typeof(x).sharding for x in jax.tree.leaves(b) if tree.is_explicit(x)]
    if not divided:
        return solve(operator, inverse, b, x0, tol, maxiter)
    mesh, specs = divided[0].mesh, jax.tree.map(lambda x: jax.typeof(x).sharding.spec, b)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    a, m = (
        f and jax.sharding.explicit_axes(f, axes=axes, in_sharding=(specs,))
        for f in (operator, inverse)
    )
    automatic: Any = jax.sharding.auto_axes(
        functools.partial(solve, a, m), axes=axes, out_sharding=specs
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return automatic(b, x0, tol, maxiter)


def _operator(product: Product, like: tree.PyTree, *, scaled: bool) -> Callable[[_Marked], _Marked]:
    """The product with the sign of its curvature turned to +, and one more mark."""

    def operator(marked: _Marked) -> _Marked:
        v, marks = marked
        tangent = tree.cast_like(v, like)
        hv = jax.lax.cond(  # CG begins with the product of zero
            tree.max_abs(v) > 0,
            lambda: product(tangent),
            lambda: jax.tree.map(jnp.zeros_like, tangent),
        )
        bend, length = tree.vdot(v, hv), tree.vdot(v, v)
        sizes = (jax.tree.map(jnp.abs, x) for x in (v, hv))
        rounding = jnp.finfo(marks.dtype).eps * tree.vdot(*sizes)
        flat = ~((jnp.abs(bend) > rounding) & jnp.isfinite(bend))

        # β = ‖r‖² / vᵀHv turns |β| where Hv turns its sign, and the residual, which subtracts β Hv,
        # is what it would have been. Of infinite curvature β is 0 and the residual NaN: CG stops.
        def turned(v: jax.Array, hv: jax.Array) -> jax.Array:
            infinite = jnp.where(v == 0, 0, jnp.sign(v) * jnp.inf)
            return jnp.where(flat, infinite, jnp.where(bend < 0, -hv, hv)).astype(v.dtype)

        # β times this is near 1, in whatever units the curvature is
        size = 1 if scaled else jnp.abs(tree.divide(bend, length))
        following = jnp.arange(len(marks)) == jnp.argmin(marks != 0)
        mark = jnp.where(following & ~flat, _MARK * size, 0).astype(marks.dtype)
        return jax.tree.map(turned, v, hv), mark

    return operator
