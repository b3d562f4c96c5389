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
from gradxform.hyperparameters import BelowQuarter, Fraction, Positive, Size, checked, scalar
from gradxform.info import diagnostics
from gradxform.second_order.region import Rules, no_info, region
from gradxform.second_order.subproblems import Subproblem
from gradxform.second_order.subproblems.dense_faces import residuals_within
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
    grad_norm: jax.Array  #: largest absolute entry of ∇f(x) at the accepted point
    radius: jax.Array  #: Δ for the trial point in the loop
    ratio: jax.Array  #: ρ of the last trial point: actual over predicted reduction
    expected: jax.Array  #: reduction of f predicted for the full step, which no radius cuts
    stalled: jax.Array  #: whether Δ is too small to move θ, or ten points brought no progress
    relative_step: jax.Array  #: ‖Dp‖ / ‖Dx‖ of the full step


def _no_info() -> LevenbergMarquardtInfo:
    return LevenbergMarquardtInfo(*no_info(), relative_step=jnp.array(scalar(0), copy=True))


@checked
def levenberg_marquardt(
    *,
    initial_radius: Positive | None = None,
    max_radius: Positive | None = None,
    decrease: BelowQuarter = 1e-4,
    noise: Fraction = 0.0,
    columns: Size = 64,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TODO"""

    def subproblem(params: tree.PyTree) -> Subproblem:
        solve = from_residuals(initial_radius=initial_radius, columns=columns)
        return solve if bounds is None else solve._replace(step=residuals_within)

    linearise = functools.partial(least_squares_at, "levenberg_marquardt")
    rules = Rules(decrease, noise, _POOR, max_radius)
    return region("levenberg_marquardt", linearise, subproblem, rules, _no_info, bounds)
