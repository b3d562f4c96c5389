r"""Hessian-free optimisation: Newton-CG on the Gauss–Newton matrix, made for deep networks.

Martens's Algorithm 2, of an objective f at θ with the curvature G and the damping λ::

    p ← the minimum of q(p) = gᵀp + ½ pᵀ(G + λI)p by conjugate gradients, from a part of the last p
    of the iterates of conjugate gradients, take the one that f prefers
    ρ ← (f(θ + p) − f(θ)) / q(p);    λ ← 3/2 λ if ρ < 1/4;    λ ← 2/3 λ if ρ > 3/4
    α ← 1;    while f(θ + αp) > f(θ) + 0.01 α gᵀp:  α ← 0.8 α
    θ ← θ + αp

The module ``martens`` has the loops of it.
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
from gradxform.info import diagnostics
from gradxform.objective import Composed, bind, check_value
from gradxform.preconditioners import Preconditioner, checked_inverse
from gradxform.progress import PATIENCE, Progress, no_progress, progress_after
from gradxform.second_order.martens import Candidate, choose_iterate, minimise_model, shorten

_POOR, _GOOD, _FACTOR = 0.25, 0.75, 1.5  # of ρ, and what λ is multiplied or divided by
_VALUE = 1 / 3  # gradients that a value alone costs


@diagnostics
class HessianFreeInfo(NamedTuple):
    """What the updates did; the counters run over all updates."""

    curvature_products: jax.Array  #: products, whatever part of the batch they are of
    evaluations: jax.Array  #: values of ``value_fn``, beside the one handed to ``update``
    gradient_equivalents: jax.Array  #: the work of both, in gradients of ``value_fn``
    rejected: jax.Array  #: updates that found no lower value, and moved nothing
    non_finite: jax.Array  #: updates whose value or gradient was not finite, which moved nothing
    value: jax.Array  #: f(θ) where the last update was made
    grad_norm: jax.Array  #: largest absolute entry of the gradient there
    damping: jax.Array  #: λ that the next update begins with
    ratio: jax.Array  #: ρ of the last update, actual over predicted reduction
    iterations: jax.Array  #: of CG in the last update
    step_length: jax.Array  #: α that the line search of the last update ended with
    stalled: jax.Array  #: of a fixed objective: its rounding hides what a step gains


class HessianFreeState(NamedTuple):
    """State of :func:`hessian_free`."""

    count: jax.Array  #: updates made so far
    damping: jax.Array  #: λ; 0 until it is estimated
    direction: tree.PyTree  #: where the last CG ended, in at least float32
    progress: Progress  #: of the points that an update moved from
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
    r"""Martens's Hessian-free optimisation.

    Conjugate gradients minimise a quadratic model of the objective, with the Gauss–Newton matrix G
    and damping λ,

    .. math::
        q(p) = g^T p + \tfrac12 p^T (G + \lambda I)\, p

    from a part of the last solution, and stop after iteration i when the model is negative and has
    progressed by less than :math:`k \epsilon` of itself over the last
    :math:`k = \max(10, 0.1\, i)` iterations. CG keeps its iterates of number
    :math:`\lceil 1.3^j \rceil`. From the last of them the method goes back to earlier ones as long
    as the objective falls, and takes the best. Then the step shortens, by 0.8, until
    :math:`f(\theta + \alpha p) \le f(\theta) + 0.01 \alpha g^T p`. The
    damping follows Levenberg and Marquardt:

    .. math::
        \rho = \frac{f(\theta + p) - f(\theta)}{q(p)}, \qquad
        \lambda \leftarrow \tfrac32 \lambda \text{ if } \rho < \tfrac14, \quad
        \lambda \leftarrow \tfrac23 \lambda \text{ if } \rho > \tfrac34

    The value falls in every update, or the parameters stay; a rise of rounding, ten units in the
    last place of its dtype, counts as none, and in bfloat16 that is 8 %: keep the loss in float32.
    Of a value or a gradient that is not finite nothing moves. Along a direction of negative
    curvature, which a curvature other than Gauss–Newton's may have, CG takes the absolute curvature
    and ends.

    An update costs the gradient handed to it, a product an iteration, and, as the method needs
    values at points of its own choice, mostly two or three evaluations of ``value_fn``: all are
    counted in the state. Data noise misleads it: give it batches as large as they can be, and let
    the curvature, which needs less of them, be of a part.

    Args:
      curvature: of ``(value_fn, params)`` to a symmetric map; ``None`` for ``gx.gauss_newton()``.
      curvature_batch_size: how many examples, drawn anew in each update, the curvature is
        evaluated on; ``None`` for all. Else ``value_fn`` must have its data from
        :func:`gradxform.compose`, or by keyword through ``update``.
      damping: the first λ ≥ 0, in units of the curvature; ``None`` for the curvature along the
        first gradient, :math:`g^T G g / g^T g`. λ = 0 stays.
      progress: ε ≥ 0.
      maxiter: most iterations of CG in an update; never more than twice the parameters, nor 1000.
      warm_start: in [0, 1): what multiple of the last solution CG begins from.
      preconditioner: ``gx.hutchinson_diagonal(power=0.75)`` is nearest to Martens's; see
        :func:`gradxform.newton_cg`.
      iterates: how many of the iterates are kept, the newest, each of the size of the parameters.
      seed: of the examples drawn.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``, all three and the
      gradient of one batch; keyword arguments named like arguments of ``value_fn`` are handed on to
      it.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, ``value_fn`` does not come from :func:`gradxform.compose` though the curvature or
        the sub-batch needs it, or it has fewer examples than ``curvature_batch_size``.

    References:
      Martens, "Deep learning via Hessian-free optimization", ICML 2010. Martens & Sutskever,
      "Training deep and recurrent networks with Hessian-free optimization" (2012). Differs: the
      first λ is relative to the curvature; the diagonal that preconditions is Gauss–Newton's, from
      random products, in place of the squared gradients' of single examples; near the minimum,
      values that differ by rounding alone count as equal.

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
            progress=no_progress(),
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
        value_fn = protocol.require("hessian_free", "value_fn", value_fn)
        value_fn = bind(value_fn, extra_args)
        protocol.check_unmasked("hessian_free", params)
        if tree.count(grads) == 0:
            return grads, state
        here, g = _here(value, grads)

        # the minimum of the damped model
        part, share = value_fn, 1.0
        if curvature_batch_size is not None:
            part, share = _sub_batch(value_fn, curvature_batch_size, seed, state.count)
        undamped = curvature(part, params)
        lam, products = state.damping, jnp.array(0, jnp.int32)
        if damping is None:
            lam, products = _first_damping(undamped, g, here, lam, products)
        product = lambda v: tree.map(lambda v, gv: gv + lam * v, v, undamped(v))
        inverse, made = checked_inverse("hessian_free", preconditioner, product, g, state.count)
        start = tree.scale(scalar(warm_start) * tree.reciprocal(here.size), state.direction)
        path = minimise_model(
            product, preconditioner and inverse, g, start, progress, maxiter, iterates
        )

        # the step, along the iterate that the objective chooses
        def value_at(p: tree.PyTree) -> jax.Array:
            """f(θ + p), as the loop will see it."""
            f = scalar(value_fn(tree.map(lambda x, p: x + here.size * p, params, p)))
            return jnp.where(jnp.isfinite(f), f, tree.largest())

        chosen, evaluations = choose_iterate(value_at, path)
        slope = here.size * (here.size * tree.vdot(g, chosen.p))
        alpha, low, more = shorten(value_at, chosen, here.value + here.noise, slope)
        accept = here.moves & low
        ratio = _ratio(here, chosen)
        next_lam = jnp.where(here.moves, _next_damping(lam, ratio), lam)
        points = progress_after(state.progress, accept, here.value, here.size)
        work = _Work(products + made + path.products, evaluations + more, share)
        info = _reported(state.info, here, work, accept)._replace(
            damping=next_lam,
            ratio=jnp.where(here.moves, ratio, state.info.ratio),
            iterations=path.iterations,
            step_length=jnp.where(accept, alpha, 0),
            stalled=points.idle >= PATIENCE,
        )
        direction = tree.select(accept, tree.scale(here.size, path.at.x), state.direction)
        count = tree.add_count(state.count, 1)
        new_state = HessianFreeState(count, next_lam, direction, points, info)
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        p = tree.scale(jnp.where(accept, alpha * here.size, 0), chosen.p)
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
        stalled=jnp.array(False),
    )


class _Here(NamedTuple):
    """The point of the update."""

    value: jax.Array  # 0 where it or the gradient is not finite
    noise: jax.Array  # by how much rounding may change it
    size: jax.Array  # largest entry of the gradient, a constant for derivatives
    finite: jax.Array
    moves: jax.Array  # whether there is a gradient to follow


def _here(value: jax.Array, grads: tree.PyTree) -> tuple[_Here, tree.PyTree]:
    """The point, and its gradient over its largest entry, so that no unit overflows."""
    largest = constant_size(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(largest)
    size = scalar(jnp.where(finite, largest, 0))
    g = tree.scale(tree.reciprocal(size), jax.tree.map(tree.promote, grads))
    g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))
    f = jnp.where(finite, scalar(value), 0)
    noise = 10 * jnp.finfo(value.dtype).eps * jnp.abs(f)
    return _Here(f, noise, size, finite, finite & (size > 0)), g


class _Work(NamedTuple):
    """What an update took."""

    products: jax.Array
    evaluations: jax.Array
    share: float  # the part of the examples that a product is of


def _reported(
    info: HessianFreeInfo, here: _Here, work: _Work, accept: jax.Array
) -> HessianFreeInfo:
    """``info`` with the counts of one more update, and the point it was made at."""
    gradients = work.share * scalar(work.products) + _VALUE * scalar(work.evaluations)
    rejected = (here.moves & ~accept).astype(jnp.int32)
    return info._replace(
        curvature_products=tree.add_count(info.curvature_products, work.products),
        evaluations=tree.add_count(info.evaluations, work.evaluations),
        gradient_equivalents=info.gradient_equivalents + gradients,
        rejected=tree.add_count(info.rejected, rejected),
        non_finite=tree.add_count(info.non_finite, (~here.finite).astype(jnp.int32)),
        value=jnp.where(here.finite, here.value, info.value),
        grad_norm=jnp.where(here.finite, here.size, info.grad_norm),
    )


def _sub_batch(
    value_fn: Callable[..., Any], size: int, seed: Scalar, count: jax.Array
) -> tuple[Composed, float]:
    """``value_fn`` of some of its examples, and what part of them these are."""
    if not isinstance(value_fn, Composed):
        raise ValueError(
            f"hessian_free(curvature_batch_size={size}): value_fn must know its data to draw from "
            "them: give value_fn=gx.compose(loss, model, x=x, y=y), or the data to update"
        )
    key = jax.random.fold_in(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), count)
    return value_fn.sample(size, key), size / value_fn.examples


# -- the damping


def _first_damping(
    product: Product, g: tree.PyTree, here: _Here, lam: jax.Array, products: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """λ, estimated where it is 0 and there is a gradient, and the products made so far."""
    return jax.lax.cond(
        (lam == 0) & (here.size > 0),
        lambda: (_curvature_along(product, g), products + 1),
        lambda: (lam, products),
    )


def _curvature_along(product: Product, g: tree.PyTree) -> jax.Array:
    """gᵀGg/gᵀg, the size of the curvature along the gradient."""
    ratio = scalar(tree.divide(jnp.abs(tree.vdot(g, product(g))), tree.vdot(g, g)))
    least, most = _range(ratio)
    return jnp.where((ratio > least) & (ratio < most), ratio, 1)


def _range(x: jax.Array) -> tuple[float, float]:
    """Between what λ stays, so that it times a vector neither overflows nor vanishes."""
    power = int(jnp.finfo(x.dtype).maxexp) - 28
    return 2.0**-power, 2.0**power


def _ratio(here: _Here, chosen: Candidate) -> jax.Array:
    """ρ; in the middle where rounding hides what the step gains."""
    predicted = -here.size * (here.size * chosen.q)
    gained = here.value - chosen.f
    hidden = (jnp.abs(gained) <= here.noise) & (predicted <= here.noise) & (chosen.q < 0)
    return jnp.where(hidden, 0.5, tree.divide(gained, predicted))


def _next_damping(lam: jax.Array, ratio: jax.Array) -> jax.Array:
    """Levenberg and Marquardt's rule."""
    factor = jnp.where(ratio > _GOOD, 1 / _FACTOR, jnp.where(ratio < _POOR, _FACTOR, 1))
    return jnp.where(lam > 0, jnp.clip(factor * lam, *_range(lam)), 0)
