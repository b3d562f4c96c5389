"""The covariance matrix of estimated parameters.

For residuals r(θ) with the Jacobian J (m × n), with θ at the minimum of Σ rᵢ²::

    D ← the lengths of the columns of J
    Q R ← J D⁻¹                         so that (JᵀJ)⁻¹ = D⁻¹ R⁻¹ R⁻ᵀ D⁻¹
    s² ← Σ rᵢ² / (m − n)
    C ← s² (JᵀJ)⁻¹

For a negative log likelihood with the Hessian H::

    D ← the roots of the diagonal of H
    L Lᵀ ← D⁻¹ H D⁻¹
    C ← H⁻¹ = D⁻¹ L⁻ᵀ L⁻¹ D⁻¹

The scaling makes C independent of the units of the parameters, up to rounding.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from gradxform import tree
from gradxform.arguments import joined, split, with_arguments
from gradxform.complex_leaves import has_parts, of_real, to_real
from gradxform.curvature import Curvature, hessian
from gradxform.derivatives import constant_size
from gradxform.hyperparameters import checked, shown
from gradxform.leaves import check_floating
from gradxform.objective import Composed, bind
from gradxform.programs import is_comparable, program
from gradxform.second_order.newton import dense
from gradxform.squares import squares_of

# The result is NaN if rounding errors, times the condition number, reach this part of it.
_WORST = 0.01


@checked
def covariance(
    fn: Callable[..., Any],
    params: tree.PyTree,
    *,
    args: tuple[Any, ...] | list[Any] | Mapping[str, Any] = (),
    curvature: Curvature | None = None,
) -> jax.Array:
    """The covariance matrix of estimated parameters, from the curvature at the estimate.

    What ``fn`` returns decides the formula:

    * **Residuals**, one array or a pytree of arrays, or their plain
      :func:`gradxform.sum_of_squares`: s² (JᵀJ)⁻¹. J is the Jacobian of the m
      residuals over the n parameters, and s² is the sum of the squared residuals divided by m − n.
      This is the covariance that least-squares programs print. Divide each residual by the standard
      deviation of its datum if these differ; a common factor does not matter.
    * **One number**, a negative log likelihood: H⁻¹, the inverse of the observed information. The
      likelihood is a sum over the data; with a mean over m data the result is m times too large.
      With a log prior added it is the Laplace approximation of the posterior's covariance.

    A complex residual or parameter counts as two real ones. In the matrix the real parts of a leaf
    come before its imaginary parts.

    ``params`` must be the minimum, because the formulas hold nowhere else. Standard errors are the
    roots of the diagonal. The rows and columns are in the order of ``ravel_pytree(params)``.

    If the data do not determine all parameters, every entry is NaN. That is so if H is not positive
    definite, if J has dependent columns, or if either is so close to it that rounding leaves fewer
    than two digits. Float64 resolves far more problems than float32.

    Args:
      fn: the residuals or the negative log likelihood, a function of the parameters and of
        ``args``. It must support forward-mode differentiation, so it cannot use
        ``jax.custom_vjp``.
      params: the estimate: a pytree of floating-point or complex arrays with n entries.
      args: further arguments of ``fn``, as in :func:`gradxform.minimize`.
      curvature: the curvature H of a negative log likelihood; ``None`` for
        :func:`gradxform.hessian`. :func:`gradxform.gauss_newton` gives the Fisher information for
        many likelihoods.

    Returns:
      A matrix of n × n entries, in at least float32. It takes n products with J or H, and O(n³)
      further operations.

    Raises:
      TypeError: an argument is of the wrong type, ``fn`` does not take ``args``, or a parameter is
        neither floating-point nor complex.
      ValueError: ``fn`` returns no such numbers, or no more residuals than there are parameters, or
        ``curvature`` is given with residuals.

    References:
      Seber & Wild, *Nonlinear Regression* (1989), §2.1. Efron & Hinkley, "Assessing the accuracy of
      the maximum likelihood estimator: observed versus expected Fisher information", Biometrika
      65:457 (1978).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> t, y = jnp.asarray([0.0, 1.0, 2.0, 3.0]), jnp.asarray([0.1, 0.9, 2.1, 2.9])
    >>> residuals = lambda p, t, y: p["a"] + p["b"] * t - y
    >>> fit = {"a": jnp.asarray(0.06), "b": jnp.asarray(0.96)}  # the line closest to the data
    >>> jnp.sqrt(jnp.diag(gx.covariance(residuals, fit, args=(t, y)))).round(4)
    Array([0.1058, 0.0566], dtype=float32)
    """
    is_complex = check_floating(params, "covariance: params")
    params = jax.tree.map(tree.promote, to_real(params) if is_complex else params)
    fixed_fn, arrays_of_fn = split(fn, floats=False)
    fixed, arrays = split(args)
    program_of = program if is_comparable(jax.tree.structure(params)) else functools.partial
    run = program_of(_covariance, fixed_fn, curvature, fixed)
    return run(params, [*arrays_of_fn, *arrays])


def _covariance(
    fn: Callable[..., Any],
    curvature: Curvature | None,
    args: Any,
    params: tree.PyTree,
    arrays: list[Any],
) -> jax.Array:
    fn, args = joined((fn, args), arrays)
    fn = with_arguments("covariance", fn, args)
    squares = squares_of(fn)
    if isinstance(fn, Composed) and squares is not None and squares.name == "linear":
        fn = fn.parts()[1]  # the residuals
    fn = of_real(fn) if has_parts(params) else fn
    if not _is_of_residuals(jax.eval_shape(fn, params)):
        value_fn = bind(fn, {}, "covariance: fn")
        return _inverse(dense((curvature or hessian())(value_fn, params), params))
    if curvature is not None:
        raise ValueError(
            f"covariance(curvature={shown(curvature)}): fn returns residuals, and their Jacobian "
            "gives the covariance: leave curvature out"
        )
    return _of_residuals(fn, params)


def _is_of_residuals(outputs: tree.PyTree) -> bool:
    """Whether a function with these outputs returns residuals, or one number.

    Raises:
      ValueError: the outputs are neither.
    """
    found = jax.tree.leaves(outputs)
    is_pair = isinstance(outputs, tuple | list) and len(outputs) == 2
    if is_pair and getattr(outputs[0], "shape", None) == ():
        raise ValueError(
            "covariance: fn returns a pair of one number and something else, as with has_aux=True: "
            "pass a function that returns the number alone"
        )
    if not found or not all(jnp.issubdtype(x.dtype, jnp.inexact) for x in found):
        raise ValueError(
            "covariance: fn must return one real number or residuals, got "
            f"{shown([f'{x.dtype}{list(x.shape)}' for x in found])}"
        )
    return jax.tree.structure(outputs) != jax.tree.structure(0) or found[0].shape != ()


def _of_residuals(
    residuals: Callable[[tree.PyTree], tree.PyTree], params: tree.PyTree
) -> jax.Array:
    """s² (JᵀJ)⁻¹."""

    def flat(params: tree.PyTree) -> jax.Array:
        return tree.ravel(jax.tree.map(tree.promote, to_real(residuals(params))))[0]

    r, push = jax.linearize(flat, params)
    m, n = r.size, tree.count(params)
    if m <= n:
        raise ValueError(
            f"covariance: fn returns {m} residuals for {n} parameters; their scatter needs more "
            "residuals than parameters"
        )
    columns = dense(push, params)  # Jᵀ
    scale = tree.reciprocal(jax.lax.stop_gradient(jax.vmap(_length)(columns)))
    triangle = jnp.linalg.qr(columns.T * scale[None, :], mode="r")
    inverse = solve_triangular(triangle, jnp.eye(n, dtype=triangle.dtype))
    s = (_length(r) / (m - n) ** 0.5).astype(scale.dtype)
    root = s * scale[:, None] * inverse
    return _unless_lost(_dot(root, root.T), triangle, inverse)


def _inverse(matrix: jax.Array) -> jax.Array:
    """H⁻¹ of a positive definite H, otherwise NaN."""
    scale = tree.reciprocal(tree.sqrt(jax.lax.stop_gradient(jnp.diagonal(matrix))))
    scaled = scale[:, None] * matrix * scale[None, :]
    factor = jnp.linalg.cholesky(scaled)  # NaN if the matrix is not positive definite
    root = solve_triangular(factor, jnp.eye(len(matrix), dtype=matrix.dtype), lower=True)
    inverse = _dot(root.T, root)
    return _unless_lost(scale[:, None] * inverse * scale[None, :], scaled, inverse)


def _unless_lost(result: jax.Array, matrix: jax.Array, inverse: jax.Array) -> jax.Array:
    """``result``, or NaN if the condition number of ``matrix`` is too large for its precision."""
    condition = jnp.linalg.norm(matrix) * jnp.linalg.norm(inverse)
    is_known = jnp.finfo(matrix.dtype).eps * condition < _WORST
    # a factor, so that derivatives of a NaN are NaN too
    return result * jnp.where(jax.lax.stop_gradient(is_known), 1, jnp.nan)


def _length(x: jax.Array) -> jax.Array:
    """``‖x‖``, whose squares neither overflow nor underflow."""
    factor = tree.reciprocal(constant_size(x))
    return tree.norm(factor * x) / factor


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
