"""The step of Levenberg–Marquardt for so many parameters that no n × n matrix fits.

With m residuals, few enough for an m × m matrix, the step lies in the span of the gradients of the
residuals. With J Jᵀ = U Λ Uᵀ the minimum within ‖p‖ ≤ Δ is::

    p = −Jᵀ U (Λ + λ)⁻¹ Uᵀ r,    λ ≥ 0 the least for which ‖p‖ ≤ Δ

If the residuals are many too, or with bounds, Steihaug's conjugate gradients find p from products
with JᵀJ.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.derivatives import eigh
from gradxform.hyperparameters import Scalar, scalar
from gradxform.second_order.newton import dense
from gradxform.second_order.subproblems import (
    Full,
    Point,
    Prepared,
    Step,
    Subproblem,
    usable_radius,
)
from gradxform.second_order.subproblems.bounded_steihaug import steihaug_within
from gradxform.second_order.subproblems.exact import step_along
from gradxform.second_order.subproblems.faces import meets_bound
from gradxform.second_order.subproblems.steihaug import Sizes, steihaug
from gradxform.squares import Residuals

_CALLER = "levenberg_marquardt(bounds=…)"
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def large(
    *,
    initial_radius: Scalar | None,
    max_radius: Scalar | None,
    tol: Scalar,
    maxiter: Scalar,
    columns: int,
    max_size: int,
    bounded: bool,
) -> Subproblem:
    """The step, with the arguments of ``levenberg_marquardt``."""
    solver = functools.partial(steihaug_within, _CALLER) if bounded else steihaug
    by_products = solver(
        initial_radius=initial_radius, max_radius=max_radius, tol=tol, maxiter=maxiter
    )

    def step(point: Point, sizes: Sizes, radius: jax.Array) -> Step:
        linear = point.linearise()
        product: Any = linear
        if isinstance(linear, Residuals):
            if linear.r.size <= max_size and not bounded:
                return _of_few(linear, point, radius, columns)
            product = lambda v: linear.pull(linear.push(v))
        found = by_products.step(point._replace(linearise=lambda: product), sizes, radius)
        return found._replace(full=_unless_cut(found, point))

    def prepare(point: Point, sizes: Sizes) -> Prepared:
        return by_products.prepare(point, sizes)

    return Subproblem(by_products.init, prepare, step)


def _unless_cut(step: Step, point: Point) -> Full:
    """The step itself if neither the radius nor a bound cut it, otherwise the largest numbers."""
    x = tree.sqrt(tree.vdot(point.params, point.params))
    is_known = (step.length < 0.9 * step.radius) & (x > 0)
    if point.box:
        is_known &= ~meets_bound(point, step.p)
    numbers = step.predicted, tree.divide(step.length, x)
    return Full(*(jnp.where(is_known, scalar(n), tree.largest()) for n in numbers))


def _of_few(linear: Residuals, point: Point, radius: jax.Array, columns: int) -> Step:
    """The step from the m × m matrix. If ``radius`` is 0, it is found from the parameters."""
    jacobian = dense(linear.pull, linear.r, columns)  # m × n
    unit, size = tree.max_abs(jacobian), tree.max_abs(linear.r)
    is_finite = jnp.isfinite(unit) & jnp.isfinite(size)
    jacobian = jnp.where(is_finite, jacobian * tree.reciprocal(unit), 0)
    r = jnp.where(is_finite, linear.r * tree.reciprocal(size), 0)
    values, axes = eigh(_dot(jacobian, jacobian.T))
    # rounding of the matrix leaves nothing of smaller ones
    floor = len(values) * jnp.finfo(values.dtype).eps * values[-1]
    values = jnp.where(values > floor, values, 0)
    roots = tree.sqrt(values)
    slopes = roots * _dot(axes.T, r)
    # in units in which the largest entries of J and r are 1
    per_unit = tree.divide(size, unit)
    x = tree.sqrt(tree.vdot(point.params, point.params)).astype(values.dtype)
    toward = per_unit * tree.divide(tree.norm(slopes), values[-1])
    first = usable_radius(usable_radius(x, toward), point.rough_radius.astype(values.dtype))
    radius = jnp.where(radius > 0, radius.astype(values.dtype), first)
    found = step_along(slopes, values, (size * unit, unit * unit), radius)
    weights = _dot(axes, tree.divide(found.p, roots))
    _, unravel = tree.ravel(point.grad)
    p = unravel(_dot(weights, jacobian).astype(point.grad_size.dtype))
    full = tree.divide(slopes, values)
    length = per_unit * tree.norm(full)
    relative = jnp.where(x > 0, tree.divide(length, x), tree.largest(values.dtype))
    return found._replace(
        p=tree.cast_like(p, point.grad),
        products=jnp.int32(2 * len(r)),
        finite=is_finite,
        full=Full(
            predicted=0.5 * size * (size * jnp.sum(slopes * full)),
            relative=jnp.where(length > 0, relative, 0),
        ),
    )
