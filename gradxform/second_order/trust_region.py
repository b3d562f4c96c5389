r"""Trust region: a quadratic model of the objective, minimised where it is trusted.

Nocedal & Wright's Algorithm 4.1, for a model m of the objective f at x::

    p ← the minimum of m within ‖Dp‖ ≤ Δ
    ρ ← (f(x) − f(x + p)) / (m(0) − m(p))
    if ρ is poor:                        Δ ← a part of ‖Dp‖
    if ρ is good and ‖Dp‖ is near Δ:     Δ ← 2Δ
    if ρ ≥ η:                            x ← x + p

The loop holds x + p. An update sees f there, does all but the first line, and then finds the next p
within the new Δ. The modules of ``subproblems`` say how.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.curvature import Curvature, hessian
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import (
    BelowQuarter,
    Count,
    Fraction,
    Positive,
    Size,
    checked,
    scalar,
)
from gradxform.info import diagnostics
from gradxform.kernels import in_one_kernel, quotients, vdots
from gradxform.leaves import map_unmasked
from gradxform.objective import bind, check_value
from gradxform.progress import PATIENCE, Progress, no_progress, progress_after
from gradxform.second_order.subproblems import Point, Prepared, Step, Subproblem, rough_radius
from gradxform.second_order.subproblems.exact import Scaling, exact
from gradxform.second_order.subproblems.steihaug import steihaug

Solver = Literal["auto", "exact", "steihaug"]

# along a curved valley the reduction per step is largest at a ratio of 2/3, between these two
_POOR, _GOOD = 0.5, 0.75
_GROWTH, _BOUNDARY = 2.0, 0.9  # a step within a tenth of the boundary counts as on it
_SHRINK = (0.1, 0.5)  # bounds of the factor by which a poor step is shortened


@diagnostics
class TrustRegionInfo(NamedTuple):
    """What the method did; the counters run over all updates."""

    accepted: jax.Array  #: points accepted, the start included
    rejected: jax.Array  #: trial points rejected
    non_finite: jax.Array  #: updates whose value, gradient or curvature was NaN or infinite
    negative_curvature: jax.Array  #: points accepted where the model curves downwards somewhere
    curvature_products: jax.Array  #: products; a dense matrix of n columns counts n
    value: jax.Array  #: f(x), at the accepted point
    grad_norm: jax.Array  #: largest absolute entry of ∇f(x)
    radius: jax.Array  #: Δ within which the trial point in the loop was chosen
    ratio: jax.Array  #: ρ of the last trial, actual over predicted reduction
    stalled: jax.Array  #: the radius is too small to move the parameters, or nothing improves


class TrustRegionState(NamedTuple):
    """State of :func:`trust_region`. The loop holds the trial point x + p."""

    params: tree.PyTree  #: x, the accepted point, in at least float32
    grad: tree.PyTree  #: ∇f(x), in at least float32
    value: jax.Array  #: f(x)
    length: jax.Array  #: ‖Dp‖
    predicted: jax.Array  #: the reduction m(0) − m(p) of the model
    radius: jax.Array  #: Δ
    rough_radius: jax.Array  #: from the size of the first parameters
    begin: jax.Array  #: whether the point in the loop is accepted as it is
    progress: Progress  #: of the accepted points
    model: Any  #: what the solver keeps: an EigenModel, or the largest entry of the first gradient
    info: TrustRegionInfo


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
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method within a radius: it needs no line search and leaves saddles.

    The step p from the accepted point x minimises the model

    .. math::
        m(p) = f(x) + g^T p + \tfrac12 p^T H p \quad\text{within}\quad \|D p\| \le \Delta

    and the next update compares the reduction that came true with the one predicted,

    .. math::
        \rho = \frac{f(x) - f(x + p)}{m(0) - m(p)}

    The step is taken when :math:`\rho \ge \eta`. Below 1/2, Δ becomes the part of ‖Dp‖, from a
    tenth to a half, where the parabola through the two values and the slope has its minimum; above
    3/4 and at the boundary, Δ doubles. A trial that is NaN or infinite is rejected. Where rounding
    hides the difference of the values, :math:`-\tfrac12 (g + g_+)^T p` from the two gradients takes
    its place.

    **The parameters in the loop are the trial point**, so each update costs the one value and
    gradient that a training loop takes anyway, beside the curvature;
    :func:`gradxform.eval_params` gives x.

    ``"exact"`` solves for p by one eigendecomposition, of :math:`D^{-1} H D^{-1}`:
    :math:`p = -(H + \lambda D^2)^{-1} g` with λ ≥ 0 from the secular equation :math:`1 / \|D p\| =
    1 / \Delta`. Where g has no part along the most negative curvature (the *hard case*, an exact
    saddle for one) p goes along it to the boundary; negative curvature within rounding counts as
    none. The decomposition serves all trials from the same x, so a rejected one costs no curvature.
    The diagonal D lets parameters of little curvature go further:

    .. math::
        D_{ii} = \sqrt{\|H e_i\| / \max_j \|H e_j\|}

    ``"steihaug"`` takes products with H alone, and D = I: conjugate gradients that stop at the
    boundary, or go to it along a direction of negative curvature; a rejected trial repeats them up
    to the smaller radius. Directions that no gradient has a part in, it does not see: the ridge to
    a saddle is one.

    Args:
      solver: "exact"; "steihaug"; "auto" for "exact" with up to ``max_size`` parameters and
        "steihaug" with more.
      curvature: of ``(value_fn, params)`` to a symmetric map, such as ``gx.gauss_newton()``;
        ``None`` for ``gx.hessian()``. One that is not finite somewhere counts as zero there.
      scaling: of "exact": "curvature" for D as above, "none" for D = I, a ball.
      initial_radius: the first Δ > 0, in units of θ. ``None`` for ``0.2 ‖D⁻¹g‖ / ‖D⁻¹HD⁻¹‖`` with
        "exact" and the model's minimum along the gradient with "steihaug"; a tenth of ‖θ‖, or 1 at
        θ = 0, where these are not finite or zero.
      max_radius: largest Δ; ``None`` for no bound.
      decrease: η in [0, 1/4), the part of the predicted reduction that is enough.
      noise: relative error of the objective; at least ten units of rounding are taken.
      tol: of "steihaug": conjugate gradients end when the residual is less than
        :math:`\min(tol, \sqrt{\|g\|_\infty / \|g_0\|_\infty})\, \|g\|`, with g₀ the first gradient.
      maxiter: of "steihaug": most products of an update; never more than twice the parameters.
      columns: of "exact": how many columns of H are evaluated at once: more is faster and takes the
        memory of as many gradients.
      max_size: of "auto" and "exact": most parameters n that are solved for exactly. The state
        then keeps an n × n matrix, its rows sharded like the parameters; an accepted point takes n
        curvature products and O(n³) operations, these and the matrix on every device.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``, of one fixed
      objective: the full batch, not minibatches; keyword arguments named like arguments of
      ``value_fn`` are handed on to it.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``solver="exact"``
        and there are more parameters than ``max_size``, or ``update`` misses an argument.

    References:
      Lecture 7, "Newton's Method". Moré & Sorensen, "Computing a trust region step", SIAM J. Sci.
      Stat. Comput. 4:553 (1983), as Nocedal & Wright, *Numerical Optimization* (2006), eqs. 4.38
      to 4.45; differs: λ comes from the eigenvalues, to rounding, in place of a Cholesky factor
      for every λ. D: N&W §4.5 and Moré, "The Levenberg-Marquardt algorithm" (1978); differs: from
      the columns of H at x alone, in place of the largest so far. Steihaug, "The conjugate gradient
      method and trust regions in large scale optimization", SIAM J. Numer. Anal. 20:626 (1983), as
      N&W Algorithm 7.2. Sun & Nocedal, "A trust region method for noisy unconstrained
      optimization", Math. Program. 202:445 (2023), on ρ under noise; differs: gradients decide,
      where they add a term to both reductions.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
    >>> gx.minimize(saddle, jnp.asarray([1.0, 0.0]), gx.trust_region(), tol=1e-3).value.round(4)
    Array(-1., dtype=float32)
    """

    def subproblem(size: int) -> Subproblem:
        if solver == "steihaug" or (solver == "auto" and size > max_size):
            return steihaug(
                initial_radius=initial_radius, max_radius=max_radius, tol=tol, maxiter=maxiter
            )
        return exact(
            initial_radius=initial_radius, scaling=scaling, columns=columns, max_size=max_size
        )

    def init(params: tree.PyTree) -> TrustRegionState:
        return TrustRegionState(
            params=tree.copy(params),
            grad=tree.zeros_like(params),
            value=_number(),
            length=_number(),
            predicted=_number(),
            radius=_number(),
            rough_radius=jnp.array(rough_radius(params), copy=True),
            begin=jnp.array(True),
            progress=no_progress(),
            model=subproblem(tree.count(params)).init(params),
            info=_no_info(),
        )

    def update(
        grads: tree.PyTree,
        state: TrustRegionState,
        params: tree.PyTree = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[..., jax.typing.ArrayLike] | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, TrustRegionState]:
        params = protocol.require_params("trust_region", params, grads)
        value = check_value("value", protocol.require("trust_region", "value", value))
        value_fn = bind(protocol.require("trust_region", "value_fn", value_fn), extra_args)
        protocol.check_unmasked("trust_region", params)
        if tree.count(grads) == 0:
            return grads, state
        solve = subproblem(tree.count(grads))

        # whether the trial point is accepted
        trial = _Trial(params, grads, value, scalar(tree.max_abs(grads)))
        verdict = _verdict(state, trial, scalar(decrease), scalar(noise))
        accept, radius = verdict.accept, verdict.radius
        x = tree.select(accept, jax.tree.map(tree.promote, params), state.params)
        g = tree.select(accept, jax.tree.map(tree.promote, grads), state.grad)
        fx = jnp.where(accept, scalar(value), state.value)
        progress = progress_after(state.progress, accept, fx, trial.largest)

        # the model there, and how far it is trusted
        linearise = functools.partial(curvature or hessian(), value_fn, tree.cast_like(x, params))
        point = Point(
            params=x,
            grad=g,
            linearise=linearise,
            is_new=accept,
            is_first=accept & state.begin,
            grad_size=trial.largest,
            rough_radius=state.rough_radius,
        )
        prepared = solve.prepare(point, state.model)
        radius = jnp.where(state.begin, prepared.radius, radius)
        if max_radius is not None:
            radius = jnp.minimum(radius, scalar(max_radius))

        # the next trial point
        step = solve.step(point, prepared.model, radius)
        waiting = state.begin & ~accept  # the first value is not finite: stay
        p = tree.scale(jnp.where(waiting, 0, 1), step.p)
        stuck = ~waiting & _rests(x, p, params)
        new_state = TrustRegionState(
            params=x,
            grad=g,
            value=fx,
            length=step.length,
            predicted=step.predicted,
            radius=step.radius,
            rough_radius=state.rough_radius,
            begin=waiting | stuck,
            progress=progress,
            model=prepared.model,
            info=_reported(state.info, trial, verdict, prepared, step)._replace(
                radius=step.radius, stalled=stuck | (progress.idle >= PATIENCE)
            ),
        )
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        return tree.map(lambda _, x, p, q: (x + p) - q, grads, x, p, params), new_state

    return protocol.transformation(init, update)


@eval_params.register
def _(state: TrustRegionState, params: tree.PyTree) -> tree.PyTree:
    return map_unmasked(lambda _, x: x, params, state.params)


def _number() -> jax.Array:
    return jnp.array(scalar(0), copy=True)


def _no_info() -> TrustRegionInfo:
    counts = (jnp.array(0, jnp.int32) for _ in range(5))
    return TrustRegionInfo(*counts, *(_number() for _ in range(4)), stalled=jnp.array(False))


# -- the trial point and the radius


class _Trial(NamedTuple):
    """The point in the loop."""

    params: tree.PyTree
    grad: tree.PyTree
    value: jax.Array
    largest: jax.Array  # entry of the gradient


class _Verdict(NamedTuple):
    """Of the trial point."""

    accept: jax.Array
    finite: jax.Array
    ratio: jax.Array  # ρ; 1 where a search begins
    radius: jax.Array  # Δ of the next step


def _verdict(
    state: TrustRegionState, trial: _Trial, decrease: jax.Array, noise: jax.Array
) -> _Verdict:
    finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.largest)
    p = tree.map(lambda x, q: q - x, state.params, trial.params)
    slope, slope_there = vdots((state.grad, p), (trial.grad, p))
    actual = state.value - scalar(trial.value)
    # the trapezoidal rule is exact for quadratics, and resolves what values of this size cannot
    relative = jnp.maximum(noise, 10 * jnp.finfo(trial.value.dtype).eps)
    rounding = relative * jnp.abs(state.value)
    hidden = (jnp.abs(actual) <= rounding) & (state.predicted <= rounding)
    actual = jnp.where(hidden, -0.5 * (slope + slope_there), actual)
    # the parabola through the two values and the slope gives the part of a step that was too long
    bend = 2 * (scalar(trial.value) - state.value - slope)
    ratio, part = quotients((actual, state.predicted), (-slope, bend))
    ratio = jnp.where(state.predicted > 0, ratio, jnp.sign(actual))
    ratio = jnp.where(state.begin, 1, ratio)
    accept = finite & (state.begin | (ratio >= decrease))
    part = jnp.clip(jnp.where(bend == 0, _SHRINK[1], part), *_SHRINK)
    part = jnp.where(finite, part, _SHRINK[0])
    poor = ~accept | ~(ratio >= _POOR)
    grow = (ratio >= _GOOD) & (state.length >= _BOUNDARY * state.radius)
    kept = jnp.where(grow, _GROWTH, 1) * state.radius
    radius = jnp.where(poor, part * state.length, kept)
    return in_one_kernel(_Verdict(accept, finite, ratio, radius))


def _rests(x: tree.PyTree, p: tree.PyTree, params: tree.PyTree) -> jax.Array:
    """Whether x + p is x in the dtypes of the parameters."""
    moved, x = (tree.cast_like(y, params) for y in (tree.map(jnp.add, x, p), x))
    return jnp.all(
        jnp.stack([jnp.all(a == b) for a, b in zip(*map(jax.tree.leaves, (moved, x)), strict=True)])
    )


def _reported(
    info: TrustRegionInfo, trial: _Trial, verdict: _Verdict, prepared: Prepared, step: Step
) -> TrustRegionInfo:
    accept, finite = verdict.accept, verdict.finite & prepared.finite & step.finite
    return TrustRegionInfo(
        accepted=tree.add_count(info.accepted, accept.astype(jnp.int32)),
        rejected=tree.add_count(info.rejected, (~accept).astype(jnp.int32)),
        non_finite=tree.add_count(info.non_finite, (~finite).astype(jnp.int32)),
        negative_curvature=tree.add_count(
            info.negative_curvature, (accept & step.negative).astype(jnp.int32)
        ),
        curvature_products=tree.add_count(
            info.curvature_products, prepared.products + step.products
        ),
        value=jnp.where(accept, scalar(trial.value), info.value),
        grad_norm=jnp.where(accept, trial.largest, info.grad_norm),
        radius=info.radius,
        ratio=verdict.ratio,
        stalled=info.stalled,
    )
