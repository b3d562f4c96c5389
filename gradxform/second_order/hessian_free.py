"""Hessian-free optimisation: Newton-CG with the Gauss–Newton matrix, made for deep networks.

Martens's Algorithm 2, for an objective f at θ with the curvature G and the damping λ::

    p ← the minimum of q(p) = gᵀp + ½ pᵀ(G + λI)p by conjugate gradients, from a part of the last p
    p ← the iterate of conjugate gradients with the lowest f (searched backwards from the last)
    ρ ← (f(θ + p) − f(θ)) / q(p);    λ ← 3/2 λ if ρ < 1/4;    λ ← 2/3 λ if ρ > 3/4
    α ← 1;    while f(θ + αp) > f(θ) + 0.01 α gᵀp:  α ← 0.8 α
    θ ← θ + αp

The module ``martens`` contains the loops.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.curvature import Curvature, Product, gauss_newton_of
from gradxform.derivatives import constant_size
from gradxform.hyperparameters import (
    Count,
    Fraction,
    NonNegative,
    Scalar,
    Seed,
    Size,
    checked,
    scalar,
)
from gradxform.improvement import PATIENCE, Improvement, improvement_after, no_improvement
from gradxform.info import diagnostics
from gradxform.objective import Composed, bind, check_value
from gradxform.preconditioners import Preconditioner, Request, checked_inverse, first_memory
from gradxform.second_order.martens import Candidate, choose_iterate, minimise_model, shorten

_POOR, _GOOD, _FACTOR = 0.25, 0.75, 1.5  # limits of ρ, and the factor that λ changes by
_VALUE = 1 / 3  # cost of a value, in gradients


@diagnostics
class HessianFreeInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    curvature_products: jax.Array  #: products with the curvature, of the batch or of a sub-batch
    evaluations: jax.Array  #: evaluations of ``value_fn`` inside ``update``
    gradient_equivalents: jax.Array  #: cost of both, in gradients of ``value_fn``
    rejected: jax.Array  #: updates that found no lower value; θ stayed
    non_finite: jax.Array  #: updates skipped because value or gradient was NaN or infinite
    value: jax.Array  #: f(θ) at the point of the last update
    grad_norm: jax.Array  #: largest absolute entry of the gradient at that point
    damping: jax.Array  #: λ for the next update
    ratio: jax.Array  #: ρ in the last update: actual over predicted reduction
    iterations: jax.Array  #: CG iterations in the last update
    step_length: jax.Array  #: α in the last update; 0 if θ stayed
    expected: jax.Array  #: reduction of f predicted in the last update
    stalled: jax.Array  #: whether ten points in a row brought no progress on a fixed objective


class HessianFreeState(NamedTuple):
    """State of :func:`hessian_free`."""

    count: jax.Array  #: updates made so far
    damping: jax.Array  #: λ; 0 until it is estimated
    direction: tree.PyTree  #: the last solution of CG, in at least float32
    preconditioner: tree.PyTree  #: memory of the preconditioner; () if it has none
    improvement: Improvement  #: the best over the points that an update moved from
    info: HessianFreeInfo


@checked
def hessian_free(
    *,
    curvature: Curvature | None = None,
    curvature_batch_size: Size | None = None,
    damping: NonNegative | None = None,
    progress: NonNegative = 5e-4,
    maxiter: Count = 250,
    warm_start: Fraction = 0.95,
    preconditioner: Preconditioner | None = None,
    iterates: Size = 5,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    """Martens's Hessian-free optimisation: damped Gauss–Newton steps for deep networks.

    Conjugate gradients (CG) minimise a quadratic model of the objective f, with the Gauss–Newton
    matrix G and the damping λ::

        q(p) = gᵀp + ½ pᵀ(G + λI)p

    CG starts from a part of its last solution. It stops after iteration i if q(p) < 0 and q changed
    by less than the part k ε of itself over the last k = max(10, i/10) iterations. The method
    stores the iterates number 1, 2, 3, 4, 5, 7, … (⌈1.3^j⌉). It goes back from the last one as long
    as f falls, and takes the best as p. Then it multiplies the step by 0.8 until
    f(θ + αp) ≤ f(θ) + 0.01 α gᵀp. The damping follows Levenberg and Marquardt::

        ρ = (f(θ + p) − f(θ)) / q(p)
        λ ← 3/2 λ if ρ < 1/4,   λ ← 2/3 λ if ρ > 3/4

    In every update the value falls or the parameters stay. A rise by rounding is ignored: up to ten
    units in the last place of the value's dtype. In bfloat16 that is 8 %, so compute the loss in
    float32. If value or gradient is NaN or infinite, the update is zero. If the curvature is
    negative along a direction, CG uses its absolute value and stops. (The Gauss–Newton matrix of a
    convex loss has no negative curvature.)

    An update costs the gradient it receives, one curvature product per CG iteration, and mostly two
    or three evaluations of ``value_fn``. The state counts them. Noisy minibatches mislead the
    method: use batches as large as possible. The curvature may use a smaller part of each batch.

    Args:
      curvature: ``gx.hessian()``, ``gx.gauss_newton()``, or your own function of
        ``(value_fn, params)`` that returns a symmetric linear map; ``None`` for
        ``gx.gauss_newton()``.
      curvature_batch_size: number of examples for the curvature, drawn at random in each update;
        ``None`` for all. With a number, ``value_fn`` must come from :func:`gradxform.compose`, with
        its data given there or to ``update`` by keyword.
      damping: the first λ ≥ 0, in units of the curvature; ``None`` for the curvature along the
        first gradient, gᵀGg / gᵀg. λ = 0 stays 0.
      progress: ε ≥ 0 in the stopping rule of CG.
      maxiter: largest number of CG iterations in an update. It is never more than 1000, nor twice
        the number of parameters.
      warm_start: in [0, 1): CG starts from this multiple of its last solution.
      preconditioner: see :func:`gradxform.newton_cg`. ``gx.hutchinson_diagonal(power=0.75)`` is
        the closest to Martens's.
      iterates: number of CG iterates stored, the newest ones. Each has the size of the parameters.
      seed: seed for drawing the examples of the curvature.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``; they and the
      gradient must belong to the same batch. Other keyword arguments of ``update`` reach the
      arguments of ``value_fn`` of the same name.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, ``value_fn`` does not come from :func:`gradxform.compose` although the curvature
        or the sub-batch needs it, or there are fewer examples than ``curvature_batch_size``.

    References:
      Martens, "Deep learning via Hessian-free optimization", ICML 2010. Martens & Sutskever,
      "Training deep and recurrent networks with Hessian-free optimization" (2012). Differs: the
      first λ is relative to the curvature. The preconditioner's diagonal is that of the
      Gauss–Newton matrix, estimated from random products, not from squared gradients of single
      examples. Near the minimum, values that differ only by rounding count as equal.

    >>> import jax, jax.numpy as jnp, gradxform as gx
    >>> x = jnp.linspace(-1.0, 1.0, 32)
    >>> model = lambda p, x: p["a"] * jnp.tanh(p["b"] * x)
    >>> loss = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    >>> value_fn = gx.compose(loss, model, x=x, y=2 * jnp.tanh(3 * x))
    >>> start = {"a": jnp.asarray(0.5), "b": jnp.asarray(0.5)}
    >>> solution = gx.minimize(value_fn, start, gx.hessian_free(), tol=1e-4)
    >>> {name: round(float(x), 2) for name, x in solution.params.items()}
    {'a': 2.0, 'b': 3.0}
    """
    curvature = curvature or gauss_newton_of("hessian_free")

    def init(params: tree.PyTree) -> HessianFreeState:
        first = 0.0 if damping is None else damping
        return HessianFreeState(
            count=jnp.array(0, jnp.int32),
            damping=_number(first),
            direction=tree.zeros_like(params),
            preconditioner=first_memory(preconditioner, params),
            improvement=no_improvement(),
            info=_no_info(first),
        )

    def update(
        grads: tree.PyTree,
        state: HessianFreeState,
        params: tree.PyTree | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, HessianFreeState]:
        params = protocol.require_params("hessian_free", params, grads)
        value = check_value("value", protocol.require("hessian_free", "value", value))
        value_fn = bind(protocol.require("hessian_free", "value_fn", value_fn), extra_args)
        protocol.check_unmasked("hessian_free", params)
        if tree.count(grads) == 0:
            return grads, state
        origin, g = _origin(value, grads)

        # the minimum of the damped model
        part, share = value_fn, 1.0
        if curvature_batch_size is not None:
            part, share = _sub_batch(value_fn, curvature_batch_size, seed, state.count)
        undamped = curvature(part, params)
        lam, products = state.damping, jnp.array(0, jnp.int32)
        if damping is None:
            lam, products = _first_damping(undamped, g, origin, lam, products)
        product = lambda v: tree.map(lambda v, gv: gv + lam * v, v, undamped(v))
        request = Request(product, g, state.count, lam, params, value_fn)
        inverse, made, memory = checked_inverse(
            "hessian_free", preconditioner, request, state.preconditioner
        )
        start = tree.scale(scalar(warm_start) * tree.reciprocal(origin.size), state.direction)
        path = minimise_model(
            product, preconditioner and inverse, g, start, progress, maxiter, iterates
        )

        # the step along the best iterate
        def value_at(p: tree.PyTree) -> jax.Array:
            """f(θ + p) at the parameters as the loop rounds them."""
            f = scalar(value_fn(tree.map(lambda x, p: x + origin.size * p, params, p)))
            return jnp.where(jnp.isfinite(f), f, tree.largest())

        chosen, evaluations = choose_iterate(value_at, path)
        slope = origin.size * (origin.size * tree.vdot(g, chosen.p))
        alpha, low, more = shorten(value_at, chosen, origin.value + origin.noise, slope)
        accept = origin.moves & low
        ratio = _ratio(origin, chosen)
        next_lam = jnp.where(origin.moves, _next_damping(lam, ratio), lam)
        improvement = improvement_after(state.improvement, accept, origin.value, origin.size)
        work = _Work(products + made + path.products, evaluations + more, share)
        info = _reported(state.info, origin, work, accept)._replace(
            damping=next_lam,
            ratio=jnp.where(origin.moves, ratio, state.info.ratio),
            iterations=path.iterations,
            step_length=jnp.where(accept, alpha, 0),
            expected=_predicted(origin, chosen),
            stalled=improvement.idle >= PATIENCE,
        )
        direction = tree.select(accept, tree.scale(origin.size, path.at.x), state.direction)
        count = tree.add_count(state.count, 1)
        new_state = HessianFreeState(count, next_lam, direction, memory, improvement, info)
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        p = tree.scale(jnp.where(accept, alpha * origin.size, 0), chosen.p)
        return tree.cast_like(p, grads), new_state

    return protocol.transformation(init, update)


def _number(x: Scalar = 0.0) -> jax.Array:
    return jnp.array(scalar(x), copy=True)


def _no_info(damping: Scalar) -> HessianFreeInfo:
    def count() -> jax.Array:
        return jnp.array(0, jnp.int32)

    return HessianFreeInfo(
        curvature_products=count(),
        evaluations=count(),
        gradient_equivalents=_number(),
        rejected=count(),
        non_finite=count(),
        value=_number(),
        grad_norm=_number(),
        damping=_number(damping),
        ratio=_number(),
        iterations=count(),
        step_length=_number(),
        expected=_number(),
        stalled=jnp.array(False),
    )


class _Origin(NamedTuple):
    """The point at which the update starts."""

    value: jax.Array  # f(θ); 0 if it or the gradient is not finite
    noise: jax.Array  # rounding error of the value
    size: jax.Array  # largest absolute entry of the gradient; constant under differentiation
    finite: jax.Array  # whether value and gradient are finite
    moves: jax.Array  # whether the gradient is finite and not 0


def _origin(value: jax.Array, grads: tree.PyTree) -> tuple[_Origin, tree.PyTree]:
    """The point, and its gradient divided by its largest entry, so that nothing overflows."""
    largest = constant_size(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(largest)
    size = scalar(jnp.where(finite, largest, 0))
    g = tree.scale(tree.reciprocal(size), jax.tree.map(tree.promote, grads))
    g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))
    f = jnp.where(finite, scalar(value), 0)
    noise = 10 * jnp.finfo(value.dtype).eps * jnp.abs(f)
    return _Origin(f, noise, size, finite, finite & (size > 0)), g


class _Work(NamedTuple):
    """The work of an update."""

    products: jax.Array  # products with the curvature
    evaluations: jax.Array  # evaluations of ``value_fn``
    share: float  # the part of the examples that the curvature uses


def _reported(
    info: HessianFreeInfo, origin: _Origin, work: _Work, accept: jax.Array
) -> HessianFreeInfo:
    """``info`` after one more update."""
    gradients = work.share * scalar(work.products) + _VALUE * scalar(work.evaluations)
    rejected = (origin.moves & ~accept).astype(jnp.int32)
    return info._replace(
        curvature_products=tree.add_count(info.curvature_products, work.products),
        evaluations=tree.add_count(info.evaluations, work.evaluations),
        gradient_equivalents=info.gradient_equivalents + gradients,
        rejected=tree.add_count(info.rejected, rejected),
        non_finite=tree.add_count(info.non_finite, (~origin.finite).astype(jnp.int32)),
        value=jnp.where(origin.finite, origin.value, info.value),
        grad_norm=jnp.where(origin.finite, origin.size, info.grad_norm),
    )


def _sub_batch(
    value_fn: Callable[..., Any], size: int, seed: Scalar, count: jax.Array
) -> tuple[Composed, float]:
    """``value_fn`` on some of its examples, drawn at random, and which part of all they are."""
    if not isinstance(value_fn, Composed):
        raise ValueError(
            f"hessian_free(curvature_batch_size={size}): to draw examples, value_fn must come from "
            "gx.compose: pass value_fn=gx.compose(loss, model, x=x, y=y) to update"
        )
    key = jax.random.fold_in(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), count)
    return value_fn.sample(size, key), size / value_fn.examples


# -- the damping


def _first_damping(
    product: Product, g: tree.PyTree, origin: _Origin, lam: jax.Array, products: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """λ, estimated if it is 0 and the gradient is not, and the products made so far."""
    return jax.lax.cond(
        (lam == 0) & (origin.size > 0),
        lambda: (_curvature_along(product, g), products + 1),
        lambda: (lam, products),
    )


def _curvature_along(product: Product, g: tree.PyTree) -> jax.Array:
    """gᵀGg/gᵀg, the curvature along the gradient."""
    ratio = scalar(tree.divide(jnp.abs(tree.vdot(g, product(g))), tree.vdot(g, g)))
    least, most = _range(ratio)
    return jnp.where((ratio > least) & (ratio < most), ratio, 1)


def _range(x: jax.Array) -> tuple[float, float]:
    """The range of λ in which λ times a vector neither overflows nor underflows."""
    power = int(jnp.finfo(x.dtype).maxexp) - 28
    return 2.0**-power, 2.0**power


def _ratio(origin: _Origin, chosen: Candidate) -> jax.Array:
    """ρ, or 0.5 (λ stays) if rounding hides the change of the value."""
    predicted = _predicted(origin, chosen)
    gained = origin.value - chosen.f
    hidden = (jnp.abs(gained) <= origin.noise) & (predicted <= origin.noise) & (chosen.q < 0)
    return jnp.where(hidden, 0.5, tree.divide(gained, predicted))


def _predicted(origin: _Origin, chosen: Candidate) -> jax.Array:
    return -origin.size * (origin.size * chosen.q)


def _next_damping(lam: jax.Array, ratio: jax.Array) -> jax.Array:
    """Levenberg and Marquardt's rule."""
    factor = jnp.where(ratio > _GOOD, 1 / _FACTOR, jnp.where(ratio < _POOR, _FACTOR, 1))
    return jnp.where(lam > 0, jnp.clip(factor * lam, *_range(lam)), 0)
