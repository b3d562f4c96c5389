"""Trust region: minimise a quadratic model of the objective within a radius.

Nocedal & Wright's Algorithm 4.1, for a model m of the objective f at x::

    p ← the minimum of m within ‖Dp‖ ≤ Δ
    ρ ← (f(x) − f(x + p)) / (m(0) − m(p))
    if ρ is poor:                        Δ ← a part of ‖Dp‖
    if ρ is good and ‖Dp‖ is near Δ:     Δ ← 2Δ
    if ρ ≥ η:                            x ← x + p

The loop holds the trial point x + p. An update sees f there and decides with ρ. Then it computes
the next p within the new Δ; the modules of ``subproblems`` do that.
"""

from typing import Any, Literal

import optax

from gradxform import tree
from gradxform.bounds import Bounds
from gradxform.curvature import Curvature, hessian
from gradxform.hyperparameters import (
    BelowQuarter,
    Count,
    Fraction,
    Positive,
    Size,
    checked,
)
from gradxform.second_order.region import Rules, region
from gradxform.second_order.subproblems import Subproblem
from gradxform.second_order.subproblems.bounded_steihaug import steihaug_within
from gradxform.second_order.subproblems.dense_faces import exact_within
from gradxform.second_order.subproblems.exact import Scaling, exact
from gradxform.second_order.subproblems.steihaug import steihaug

Solver = Literal["auto", "exact", "steihaug"]

# In a curved valley the reduction per step is largest at a ratio of 2/3: between this one and 3/4.
_POOR = 0.5


@checked
def trust_region(
    solver: Solver = "auto",
    *,
    curvature: Curvature | None = None,
    scaling: Scaling = "curvature",
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
    """Newton's method within a radius: it needs no line search and leaves saddles.

    From the accepted point x, the step p minimises the model m within the radius Δ::

        m(p) = f(x) + gᵀp + ½ pᵀHp,   ‖Dp‖ ≤ Δ

    The next update compares the actual reduction with the predicted one::

        ρ = (f(x) − f(x + p)) / (m(0) − m(p))

    The step is accepted if ρ ≥ η. If ρ < 1/2, the radius shrinks to between 0.1 and 0.5 of ‖Dp‖;
    the factor comes from the parabola through both values and the slope. If ρ ≥ 3/4 and the step
    reached the boundary, Δ doubles. A trial point with a NaN or infinite value is rejected. If
    rounding hides the difference of the values, the reduction is computed from the two gradients as
    −½ (g + g₊)ᵀp.

    **The loop holds the trial point.** So an update costs the one value and gradient that a
    training loop computes anyway, plus the curvature. :func:`gradxform.eval_params` gives the
    accepted point x.

    ``solver="exact"`` computes p = −(H + λD²)⁻¹ g from one eigendecomposition of D⁻¹HD⁻¹, with the
    λ ≥ 0 that solves the secular equation 1 / ‖Dp‖ = 1 / Δ. In the *hard case* g has no component
    along the most negative curvature, for instance at an exact saddle; then p follows that
    direction to the boundary. Negative curvature within rounding counts as zero. A rejected trial
    point needs no new decomposition. D lets parameters with little curvature move further::

        D_ii = √(‖H e_i‖ / max_j ‖H e_j‖)

    ``solver="steihaug"`` needs only products with H, and D = I. It runs conjugate gradients (CG)
    until they reach the boundary; at negative curvature it follows that direction to the boundary.
    After a rejected trial point CG runs again with the smaller radius. It cannot see directions in
    which every gradient is zero, such as the way down from a ridge that leads to a saddle.

    **Bounds.** With ``bounds`` no trial point is ever outside. The step first follows the projected
    gradient path P(x − t D⁻²g) to a point where the model has decreased enough; P is the closest
    point within the bounds. The entries at a bound there are fixed. The solver finds the step in
    the other ones, and a search along its projection reduces the model. This repeats while the step
    meets new bounds, or leaves old ones, up to ten times. All of it takes products with H alone.
    With no bound in reach the steps are those without bounds.

    Args:
      solver: ``"exact"``, ``"steihaug"``, or ``"auto"``, which takes ``"exact"`` for up to
        ``max_size`` parameters and ``"steihaug"`` for more.
      curvature: ``gx.hessian()``, ``gx.gauss_newton()``, or your own function of
        ``(value_fn, params)`` that returns a symmetric linear map; ``None`` for ``gx.hessian()``.
        A curvature that is not finite counts as zero.
      scaling: for "exact": ``"curvature"`` for D as above, ``"none"`` for D = I.
      initial_radius: the first Δ > 0, in units of θ. By default it is 0.2 ‖D⁻¹g‖ / ‖D⁻¹HD⁻¹‖ with
        "exact", and the distance to the model's minimum along −g with "steihaug". If that is zero
        or not finite, it is a tenth of the largest entry of θ, or 1 if θ = 0.
      max_radius: the largest Δ; ``None`` for no bound.
      decrease: η in [0, 1/4), the smallest ρ of an accepted step.
      noise: relative error of the objective; at least ten units of rounding are assumed.
      tol: for "steihaug", in [0, 1): CG stops at a residual of min(tol, √(‖g‖∞ / ‖g₀‖∞)) ‖g‖,
        where g₀ is the first gradient.
      maxiter: for "steihaug": largest number of products in an update. It is never more than twice
        the number of parameters.
      columns: for "exact": how many columns of H are evaluated at once. More is faster, and each
        takes the memory of a gradient.
      max_size: for "auto" and "exact": largest number of parameters n for the exact solver. Its
        state holds an n × n matrix, with rows sharded like the parameters. An accepted point takes
        n curvature products and O(n³) operations, and every device holds the full matrix meanwhile.
      bounds: a pair ``(low, high)``, each a pytree like the parameters or a prefix of it, or
        ``None`` in place of a number without a bound. With "exact" each set of fixed entries takes
        the eigenvalues of an n × n matrix. In :func:`minimize` pass
        ``lambda bounds: gx.trust_region(bounds=bounds)``.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``. The objective
      must be the same in every update: the full batch, not minibatches. Other keyword arguments of
      ``update`` reach the arguments of ``value_fn`` of the same name.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, the bounds do not fit the parameters, or there are more parameters than
        ``max_size`` with ``solver="exact"``.

    References:
      Lecture 7, "Newton's Method". Nocedal & Wright, *Numerical Optimization* (2006). Exact step:
      Moré & Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4:553 (1983), as
      in N&W eqs. 4.38 to 4.45. Differs: λ comes from the eigenvalues, up to rounding, instead of
      one Cholesky factor for each λ. D: N&W §4.5 and Moré, "The Levenberg-Marquardt algorithm"
      (1978). Differs: D uses the columns of H at x, not the largest so far. Steihaug: "The
      conjugate gradient method and trust regions in large scale optimization", SIAM J. Numer. Anal.
      20:626 (1983), as in N&W Algorithm 7.2. Noise: Sun & Nocedal, "A trust region method for noisy
      unconstrained optimization", Math. Program. 202:445 (2023). Differs: the gradients decide,
      while they add a term to both reductions. Bounds: Lin & Moré, "Newton's method for large
      bound-constrained optimization problems", SIAM J. Optim. 9:1100 (1999). Differs: the solver
      starts on each face from the fixed entries alone, so that it finds the step without bounds if
      none is in reach, and entries may leave a bound that they met in the same step.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    >>> gx.minimize(saddle, jnp.asarray([1.0, 0.0]), gx.trust_region(), tol=1e-3).value.round(4)
    Array(-1., dtype=float32)
    """

    def subproblem(params: tree.PyTree) -> Subproblem:
        size = tree.count(params)
        if solver == "steihaug" or (solver == "auto" and size > max_size):
            limits: Any = {"tol": tol, "maxiter": maxiter}
            radii: Any = {"initial_radius": initial_radius, "max_radius": max_radius}
            if bounds is None:
                return steihaug(**radii, **limits)
            return steihaug_within("trust_region(bounds=…)", **radii, **limits)
        solve = exact(
            initial_radius=initial_radius, scaling=scaling, columns=columns, max_size=max_size
        )
        return solve if bounds is None else solve._replace(step=exact_within)

    rules = Rules(decrease, noise, _POOR, max_radius)
    return region("trust_region", curvature or hessian(), subproblem, rules, bounds=bounds)
