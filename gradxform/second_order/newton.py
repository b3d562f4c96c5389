"""Newton's method with the full Hessian matrix.

The lecture's step at θ, with the gradient g, the Hessian H and the learning rate ε::

    solve (H + αI) d = g
    θ ← θ − ε d
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_solve

from gradxform import protocol, tree
from gradxform.curvature import Curvature, Product, hessian
from gradxform.first_order.sgd import sgd
from gradxform.hyperparameters import (
    Fraction,
    LearningRate,
    NonNegative,
    Scalar,
    Size,
    checked,
    scalar,
)
from gradxform.info import diagnostics
from gradxform.leaves import check_floating
from gradxform.objective import bind


@diagnostics
class NewtonInfo(NamedTuple):
    """Counts over all updates."""

    curvature_products: jax.Array  #: Hessian columns evaluated: n in every update
    modified: jax.Array  #: updates in which H + αI was not positive definite
    skipped: jax.Array  #: updates skipped because the gradient was NaN or infinite


class ScaleByNewtonState(NamedTuple):
    """State of :func:`scale_by_newton`."""

    info: NewtonInfo


@checked
def scale_by_newton(
    *,
    damping: NonNegative = 0.0,
    floor: Fraction = 1e-4,
    curvature: Curvature | None = None,
    columns: Size = 64,
    max_size: Size = 10_000,
) -> optax.GradientTransformationExtraArgs:
    """The direction of :func:`newton`, without step or sign: (H + αI)⁻¹ g.

    ``gx.with_line_search(gx.scale_by_newton())`` is Newton's method with a line search. It is safe
    to start far from a minimum.

    Args:
      damping: α, see :func:`newton`.
      floor: see :func:`newton`.
      curvature: see :func:`newton`.
      columns: see :func:`newton`.
      max_size: see :func:`newton`.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``.

    >>> import jax, jax.numpy as jnp, gradxform as gx
    >>> f, x = lambda x: x[0] ** 2 + 5 * x[1] ** 2, jnp.asarray([3.0, 1.0])
    >>> tx = gx.scale_by_newton()
    >>> direction, _ = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
    >>> bool(jnp.allclose(direction, x))
    True
    """
    return _direction("scale_by_newton", damping, floor, curvature, columns, max_size)


def _direction(
    method: str,
    damping: Scalar,
    floor: Scalar,
    curvature: Curvature | None,
    columns: int,
    max_size: int,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_newton`, with errors that name ``method``."""

    def init(params: tree.PyTree) -> ScaleByNewtonState:
        check_floating(params)
        _check_size(method, params, max_size)
        return ScaleByNewtonState(NewtonInfo(*(jnp.array(0, jnp.int32) for _ in range(3))))

    def update(
        grads: tree.PyTree,
        state: ScaleByNewtonState,
        params: tree.PyTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ScaleByNewtonState]:
        params = protocol.require_params(method, params, grads)
        value_fn = bind(protocol.require(method, "value_fn", value_fn), extra_args)
        protocol.check_unmasked(method, params)
        g, unravel = tree.ravel(jax.tree.map(tree.promote, grads))
        if g.size == 0:
            return grads, state

        product = (curvature or hessian())(value_fn, params)
        matrix = dense(product, params, columns)
        damped = matrix + scalar(damping).astype(g.dtype) * jnp.eye(g.size, dtype=g.dtype)
        factor, definite = _cholesky(jax.lax.stop_gradient(damped))
        d = jax.lax.cond(
            definite,
            lambda: _definite_solve(damped, factor, g),
            lambda: _modified_solve(damped, g, scalar(floor).astype(g.dtype)),
        )
        finite = jnp.isfinite(g).all()
        d = jnp.where(finite, d, 0)
        info = NewtonInfo(
            tree.add_count(state.info.curvature_products, g.size),
            tree.add_count(state.info.modified, (~definite).astype(jnp.int32)),
            tree.add_count(state.info.skipped, (~finite).astype(jnp.int32)),
        )
        return tree.cast_like(unravel(d), grads), ScaleByNewtonState(info)

    return protocol.transformation(init, update)


@checked
def newton(
    learning_rate: LearningRate = 1.0,
    damping: NonNegative = 0.0,
    *,
    floor: Fraction = 1e-4,
    curvature: Curvature | None = None,
    columns: Size = 64,
    max_size: Size = 10_000,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method with full steps; safer is ``gx.with_line_search(gx.scale_by_newton())``.

    Far from a minimum a full Newton step may increase the loss. The line search shortens the step
    until the loss falls; :func:`gradxform.trust_region` is safe too. The update here is the full
    step::

        θ ← θ − ε (H + αI)⁻¹ g

    H is the Hessian of ``value_fn`` at θ. With α > 0 the method is regularised. If the objective is
    quadratic and H is positive definite, one step (ε = 1, α = 0) reaches the minimum.

    If H + αI is not positive definite, a plain Newton step may go to a saddle or a maximum. So its
    eigenvalues are replaced, and the step descends::

        λᵢ ← max(|λᵢ|, φ maxⱼ |λⱼ|)

    If H is NaN or infinite, the step is along −g. If g is not finite either, the step is zero. A
    smaller ε or a larger α shortens the steps.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      damping: α ≥ 0, in units of the curvature.
      floor: φ in [0, 1), the smallest eigenvalue relative to the largest.
      curvature: ``gx.hessian()``, ``gx.gauss_newton()``, or your own function of
        ``(value_fn, params)`` that returns a symmetric linear map; ``None`` for ``gx.hessian()``.
      columns: how many columns of the Hessian are evaluated at once. More is faster, and each takes
        the memory of a gradient.
      max_size: largest number of parameters n. An update takes n curvature products, O(n³)
        operations and a few n × n matrices. If the parameters are sharded, every device holds the
        full matrices.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``. Other keyword arguments of
      ``update`` reach the arguments of ``value_fn`` of the same name.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, there are more
        parameters than ``max_size``, or ``update`` is not given ``params`` and ``value_fn``.

    References:
      Lecture 7, "Newton's Method". Nocedal & Wright, *Numerical Optimization* (2006), §3.4. Dauphin
      et al., "Identifying and attacking the saddle point problem in high-dimensional non-convex
      optimization", NeurIPS 2014, for the absolute eigenvalues.

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> f = lambda x: (x[0] - 1) ** 2 + 100 * (x[1] + 2) ** 2 + x[0] * x[1]
    >>> x, tx = jnp.zeros(2), gx.newton()
    >>> updates, state = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
    >>> x = optax.apply_updates(x, updates)
    >>> bool(jnp.abs(jax.grad(f)(x)).max() < 1e-3)  # one step
    True
    """
    direction = _direction("newton", damping, floor, curvature, columns, max_size)
    return optax.chain(direction, sgd(learning_rate))


def dense(product: Product, params: tree.PyTree, columns: int = 64) -> jax.Array:
    """The matrix of a linear map of the ravelled parameters, ``columns`` columns at a time."""
    vector, unravel = tree.ravel(tree.zeros_like(params))

    def column(i: jax.Array) -> jax.Array:
        unit = (jnp.arange(vector.size) == i).astype(vector.dtype)
        return tree.ravel(product(unravel(unit)))[0].astype(vector.dtype)

    indices = jnp.arange(vector.size)
    if vector.size <= columns:
        return jax.vmap(column)(indices)
    return jax.lax.map(column, indices, batch_size=columns)


@jax.jit  # jax_debug_nans checks only what this returns, and that has no NaN
def _cholesky(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower Cholesky factor, and whether it exists; the identity if it does not."""
    factor = jnp.linalg.cholesky(matrix)  # NaN if the matrix is not positive definite
    definite = jnp.isfinite(factor).all()
    return jnp.where(definite, factor, jnp.eye(len(matrix), dtype=matrix.dtype)), definite


def _definite_solve(matrix: jax.Array, factor: jax.Array, g: jax.Array) -> jax.Array:
    """The solution from the Cholesky factor; its derivatives use the same factor."""
    return jax.lax.custom_linear_solve(
        lambda d: _dot(matrix, d), g, lambda _, b: cho_solve((factor, True), b), symmetric=True
    )


@jax.custom_jvp
def _modified_solve(matrix: jax.Array, g: jax.Array, floor: jax.Array) -> jax.Array:
    """The solution with |λᵢ| in place of λᵢ, each at least ``floor`` times the largest."""
    eigenvalues, q = jnp.linalg.eigh(matrix)
    size = jnp.abs(eigenvalues)
    size = jnp.maximum(size, floor * jnp.max(size))
    d = _dot(q, tree.reciprocal(size) * _dot(g, q))
    return jnp.where(jnp.isfinite(d).all(), d, g)  # the Hessian may be NaN or infinite


@_modified_solve.defjvp
def _(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Daleckii and Krein's formula, which is finite for equal eigenvalues too."""
    (matrix, g, floor), (d_matrix, d_g, d_floor) = primals, tangents
    eigenvalues, q = jnp.linalg.eigh(matrix)
    size = jnp.abs(eigenvalues)
    most = jnp.max(size)
    floored, is_most = size < floor * most, size == most
    size = jnp.where(floored, floor * most, size)
    inverse = tree.reciprocal(size)
    u = inverse * _dot(g, q)

    # (sizeᵢ − sizeⱼ) / (λᵢ − λⱼ), or the slope of the size if λᵢ = λⱼ
    gap = eigenvalues[:, None] - eigenvalues[None, :]
    slope = jnp.where(floored, 0, jnp.sign(eigenvalues))
    quotient = jnp.where(gap == 0, slope[:, None], tree.divide(size[:, None] - size[None, :], gap))
    turned = _dot(q.T, _dot(d_matrix, q))
    d_most = jnp.mean(jnp.sign(eigenvalues) * jnp.diagonal(turned), where=is_most)
    d_size = jnp.where(floored, floor * d_most + most * d_floor, 0)
    d_u = inverse * (_dot(d_g, q) - _dot(quotient * turned, u) - d_size * u)
    d = _dot(q, u)
    finite = jnp.isfinite(d).all()
    return jnp.where(finite, d, g), jnp.where(finite, _dot(q, d_u), d_g)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _check_size(method: str, params: tree.PyTree, max_size: int) -> None:
    size = tree.count(params)
    if size > max_size:
        raise ValueError(
            f"{method}(max_size={max_size}): there are {size} parameters, and a Hessian of {size} "
            f"× {size} entries takes {4 * size**2 / 2**30:.3g} GiB in float32: use gx.newton_cg, "
            "which needs only products with the Hessian, or raise max_size"
        )
