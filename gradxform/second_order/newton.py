"""Newton's method with the whole Hessian.

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
    """What the updates did; the counters run over all updates."""

    curvature_products: jax.Array  #: columns of the Hessian evaluated, n an update
    modified: jax.Array  #: updates where the damped Hessian was not positive definite
    skipped: jax.Array  #: updates whose gradient was not finite, which moved nothing


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
    r"""The direction of :func:`newton`, without step or sign: :math:`(H + \alpha I)^{-1} g`.

    ``gx.with_line_search(gx.scale_by_newton())`` is Newton's method that converges from far away.

    Args:
      damping: α, see :func:`newton`.
      floor: see :func:`newton`.
      curvature: see :func:`newton`.
      columns: see :func:`newton`.
      max_size: see :func:`newton`.

    Returns:
      The transformation; ``update`` needs ``params`` and ``value_fn``.

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
    """:func:`scale_by_newton` as a part of ``method``, which its errors name."""

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
    r"""Newton's method, regularised when α > 0.

    Its steps may climb far from a minimum: ``gx.with_line_search(gx.scale_by_newton())`` and
    :func:`gradxform.trust_region` are the safe forms.

    .. math::
        \theta \leftarrow \theta - \varepsilon_k\, (H + \alpha I)^{-1} g

    with H the Hessian of ``value_fn`` at θ. One step goes to the minimum of a quadratic whose H is
    positive definite. Where :math:`H + \alpha I = Q \Lambda Q^T` is not, Newton's step would go to
    a saddle or a maximum; then its eigenvalues are replaced, so that the step descends:

    .. math::
        \lambda_i \leftarrow \max(|\lambda_i|, \phi \max_j |\lambda_j|)

    If H is not finite, the step is along g. If g is not finite either, the step is zero. A smaller
    ε or a larger α shortens the steps.

    Args:
      learning_rate: ε, a number, an array or a schedule of the update count.
      damping: α ≥ 0, in units of the curvature.
      floor: φ in [0, 1).
      curvature: of ``(value_fn, params)`` to a symmetric map, such as ``gx.gauss_newton()``;
        ``None`` for ``gx.hessian()``.
      columns: how many columns of the Hessian are evaluated at once: more is faster and takes the
        memory of as many gradients.
      max_size: most parameters n. An update keeps a few n × n matrices and takes n curvature
        products and O(n³) operations, on every device where parameters are sharded.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``; keyword arguments named like
      arguments of ``value_fn`` are handed on to it.

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
    """The matrix of a curvature of ravelled parameters, a few columns at once."""
    vector, unravel = tree.ravel(tree.zeros_like(params))

    def column(i: jax.Array) -> jax.Array:
        unit = (jnp.arange(vector.size) == i).astype(vector.dtype)
        return tree.ravel(product(unravel(unit)))[0].astype(vector.dtype)

    indices = jnp.arange(vector.size)
    if vector.size <= columns:
        return jax.vmap(column)(indices)
    return jax.lax.map(column, indices, batch_size=columns)


@jax.jit  # jax_debug_nans looks at what leaves it alone: no NaN does
def _cholesky(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower factor, and whether there is one; the identity where there is none."""
    factor = jnp.linalg.cholesky(matrix)  # NaN where the matrix is not positive definite
    definite = jnp.isfinite(factor).all()
    return jnp.where(definite, factor, jnp.eye(len(matrix), dtype=matrix.dtype)), definite


def _definite_solve(matrix: jax.Array, factor: jax.Array, g: jax.Array) -> jax.Array:
    """The solution by the factor, with derivatives by the same factor."""
    return jax.lax.custom_linear_solve(
        lambda d: _dot(matrix, d), g, lambda _, b: cho_solve((factor, True), b), symmetric=True
    )


@jax.custom_jvp
def _modified_solve(matrix: jax.Array, g: jax.Array, floor: jax.Array) -> jax.Array:
    """The solution with the absolute eigenvalues, at least ``floor`` times the largest."""
    eigenvalues, q = jnp.linalg.eigh(matrix)
    size = jnp.abs(eigenvalues)
    size = jnp.maximum(size, floor * jnp.max(size))
    d = _dot(q, tree.reciprocal(size) * _dot(g, q))
    return jnp.where(jnp.isfinite(d).all(), d, g)  # of a Hessian that is not finite nothing is left


@_modified_solve.defjvp
def _(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """By Daleckii and Krein's formula, which equal eigenvalues do not trouble."""
    (matrix, g, floor), (d_matrix, d_g, d_floor) = primals, tangents
    eigenvalues, q = jnp.linalg.eigh(matrix)
    size = jnp.abs(eigenvalues)
    most = jnp.max(size)
    floored, is_most = size < floor * most, size == most
    size = jnp.where(floored, floor * most, size)
    inverse = tree.reciprocal(size)
    u = inverse * _dot(g, q)

    # the quotient of differences of the sizes and the eigenvalues, or the slope where these agree
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
            "which takes products with it alone, or raise max_size"
        )
