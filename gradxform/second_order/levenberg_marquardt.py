"""Levenberg–Marquardt: a trust region whose model is the sum of the squared linear residuals.

For f(x) = ½ ‖r(x)‖² with the Jacobian J of the residuals r, after Moré (1978)::

    D ← the lengths of the columns of J, but at least 0.99 times the last D
    p ← the minimum of ½ ‖r + J p‖² within ‖Dp‖ ≤ Δ
    ρ ← (f(x) − f(x + p)) / (½ ‖r‖² − ½ ‖r + J p‖²)
    if ρ < 1/4:                               Δ ← a part of ‖Dp‖
    if ρ ≥ 3/4 and ‖Dp‖ is near Δ:            Δ ← 2Δ
    if ρ ≥ η:                                 x ← x + p
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.bounds import Bounds
from gradxform.curvature import Curvature
from gradxform.hyperparameters import BelowQuarter, Count, Fraction, Positive, Size, checked, scalar
from gradxform.info import diagnostics
from gradxform.second_order.region import Rules, no_info, region
from gradxform.second_order.subproblems import Subproblem
from gradxform.second_order.subproblems.dense_faces import residuals_within
from gradxform.second_order.subproblems.large import large
from gradxform.second_order.subproblems.residuals import from_residuals, least_squares_at

_POOR = 0.25  # Moré's; residuals are closer to their model than a general objective


@diagnostics
class LevenbergMarquardtInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    accepted: jax.Array  #: points accepted, including the start
    rejected: jax.Array  #: trial points rejected
    non_finite: jax.Array  #: updates with a NaN or infinite value, gradient or Jacobian
    negative_curvature: jax.Array  #: always 0
    curvature_products: jax.Array  #: products with the Jacobian; a full one of n columns counts n
    value: jax.Array  #: f(x) at the accepted point x
    grad_norm: jax.Array  #: largest absolute entry of the (projected) gradient at that point
    radius: jax.Array  #: Δ for the trial point in the loop
    ratio: jax.Array  #: ρ of the last trial point: actual over predicted reduction
    expected: jax.Array  #: reduction of f predicted for the full step, which no radius cuts
    stalled: jax.Array  #: as in ``TrustRegionInfo``, or rounding hides what a full step would bring
    relative_step: jax.Array  #: ‖Dp‖ / ‖Dx‖ of the full step


def _no_info() -> LevenbergMarquardtInfo:
    return LevenbergMarquardtInfo(
        *no_info(), relative_step=jnp.array(scalar(tree.largest()), copy=True)
    )


@checked
def levenberg_marquardt(
    *,
    curvature: Curvature | None = None,
    initial_radius: Positive | None = None,
    max_radius: Positive | None = None,
    decrease: BelowQuarter = 1e-4,
    noise: Fraction = 0.0,
    tol: Fraction = 0.5,
    maxiter: Count = 1000,
    columns: Size = 64,
    max_size: Size = 2000,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gauss–Newton's method within a radius, for objectives that are a sum of squares.

    From the accepted point x, with the residuals r and their Jacobian J, the step p is::

        p = the minimum of ½ ‖r + J p‖² within ‖Dp‖ ≤ Δ

    So it solves (JᵀJ + λD²) p = −Jᵀr with the least λ ≥ 0 that keeps it within the radius. The next
    update compares the actual reduction with the predicted one, as :func:`gradxform.trust_region`
    does, and the loop holds the trial point: an update costs the value and gradient that a loop
    computes anyway, and J at a new point.

    Three ways lead to p. All take D and Δ into account, and JᵀJ is formed by none of the first two:

    * up to ``max_size`` parameters: by the QR factorisation and singular values of J, with D from
      the lengths of the columns of J, so that the units of the parameters do not matter;
    * more parameters, but at most ``max_size`` residuals: by the eigenvalues of J Jᵀ, with D = I;
    * more of both: by conjugate gradients from products with J and Jᵀ, with D = I.

    Of an objective of :func:`gradxform.compose` with another loss L, Jᵀ H_L J takes the place of
    JᵀJ; see :func:`gradxform.gauss_newton`.

    Args:
      curvature: a positive semi-definite matrix to take in place of JᵀJ, for objectives that are no
        sum of squares; ``None`` for JᵀJ or Jᵀ H_L J.
      initial_radius: the first Δ > 0, in the units of ‖Dp‖; ``None`` for ‖Dx‖ at the start, or, if
        a parameter is zero there, at least the distance at which the gradient may vanish.
      max_radius: the largest Δ; ``None`` for no bound.
      decrease: η in [0, 1/4), the smallest ρ of an accepted step.
      noise: relative error of the objective; at least ten units of rounding are assumed.
      tol: for conjugate gradients, see :func:`gradxform.trust_region`.
      maxiter: for conjugate gradients: largest number of products in an update.
      columns: how many columns or rows of J are computed at once. More is faster, and each takes
        the memory of a gradient or of all residuals.
      max_size: largest number n of parameters, or of residuals, for the first two ways. The state
        of the first one holds an n × n matrix.
      bounds: a pair ``(low, high)``, each a pytree like the parameters or a prefix of it, or
        ``None`` in place of a number without a bound. No trial point is ever outside; see
        :func:`gradxform.trust_region`. On each set of fixed entries the step comes from the
        singular values of the other columns, or beyond ``max_size`` from conjugate gradients.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``, which must come
      from :func:`gradxform.sum_of_squares` or :func:`gradxform.compose`. The objective must be the
      same in every update: all data, not minibatches. Other keyword arguments of ``update`` reach
      the residuals' arguments of the same name.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, the bounds do not fit the parameters, or ``value_fn`` does not tell its residuals.

    References:
      Moré, "The Levenberg-Marquardt algorithm: implementation and theory", in *Numerical Analysis*
      (1978). Differs: the secular equation is solved by singular values, up to rounding; the
      lengths in D may fade by one percent at each point; after a poor step the radius shrinks by
      the parabola through two values and a slope. Bounds: Lin & Moré, "Newton's method for large
      bound-constrained optimization problems", SIAM J. Optim. 9:1100 (1999).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> valley = gx.sum_of_squares(lambda x: jnp.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]))
    >>> gx.minimize(valley, jnp.asarray([-1.2, 1.0]), gx.levenberg_marquardt()).params.round(3)
    Array([1., 1.], dtype=float32)
    """

    def subproblem(params: tree.PyTree) -> Subproblem:
        if tree.count(params) <= max_size:
            solve = from_residuals(initial_radius=initial_radius, columns=columns)
            return solve if bounds is None else solve._replace(step=residuals_within)
        return large(
            initial_radius=initial_radius,
            max_radius=max_radius,
            tol=tol,
            maxiter=maxiter,
            columns=columns,
            max_size=max_size,
            bounded=bounds is not None,
        )

    linearise = curvature or functools.partial(least_squares_at, "levenberg_marquardt")
    rules = Rules(decrease, noise, _POOR, max_radius)
    return region("levenberg_marquardt", linearise, subproblem, rules, _no_info, bounds)
