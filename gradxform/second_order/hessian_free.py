"""Hessian-free optimisation: Newton-CG on the Gauss–Newton matrix, made for deep networks."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import protocol, tree
from gradxform.curvature import Curvature, Product, gauss_newton_of
from gradxform.derivatives import constant_size, forward_only
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
from gradxform.objective import Composed
from gradxform.preconditioners import Preconditioner, checked_inverse

_POOR, _GOOD, _FACTOR = 0.25, 0.75, 1.5  # of ρ, and what λ is multiplied or divided by
_SPACING = 1.3  # iterates ⌈1.3^j⌉ are kept
_ARMIJO, _SHRINK, _TRIALS = 1e-2, 0.8, 60  # of the line search
_MOST_ITERATIONS = 1000
_VALUE = 1 / 3  # gradients that a value alone costs
_IDLE = 10  # steps in a row without progress until it has stalled


@diagnostics
class HessianFreeInfo(NamedTuple):
    """What the updates did; the counters run over all updates."""

    curvature_products: jax.Array  #: products, whatever part of the batch they are of
    evaluations: jax.Array  #: values of ``value_fn``, beside the one handed to ``update``
    gradient_equivalents: jax.Array  #: the work of both, in gradients of ``value_fn``
    rejected: jax.Array  #: updates that found no lower value, and moved nothing
    non_finite: jax.Array  #: updates whose value or gradient was not finite, which moved nothing
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
    lowest: jax.Array  #: value
    smallest: jax.Array  #: largest gradient entry of a point that was progress
    idle: jax.Array  #: steps in a row that were not, in either
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
    :math:`k = \max(10, 0.1\, i)` iterations. Of the iterates :math:`\lceil 1.3^j \rceil`, kept on
    the way, the objective chooses: from the last one back as long as its value falls. Then the
    step shortens, by 0.8, until :math:`f(\theta + \alpha p) \le f(\theta) + 0.01 \alpha g^T p`. The
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
        def number(x: Scalar = 0.0) -> jax.Array:
            return jnp.array(scalar(x), copy=True)

        def count() -> jax.Array:
            return jnp.array(0, jnp.int32)

        first = 0.0 if damping is None else damping
        info = HessianFreeInfo(
            curvature_products=count(),
            evaluations=count(),
            gradient_equivalents=number(),
            rejected=count(),
            non_finite=count(),
            damping=number(first),
            ratio=number(),
            iterations=count(),
            step_length=number(),
            stalled=jnp.array(False),
        )
        return HessianFreeState(
            count=count(),
            damping=number(first),
            direction=tree.zeros_like(params),
            lowest=number(tree.largest()),
            smallest=number(tree.largest()),
            idle=count(),
            info=info,
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
        value = protocol.check_value("value", protocol.require("hessian_free", "value", value))
        value_fn = protocol.require("hessian_free", "value_fn", value_fn)
        value_fn = protocol.bind(value_fn, extra_args)
        protocol.check_unmasked("hessian_free", params)
        if tree.count(grads) == 0:
            return grads, state
        info = state.info
        finite = jnp.isfinite(value) & jnp.isfinite(tree.max_abs(grads))

        # all below is over the largest entry of the gradient, so that no unit overflows
        size = scalar(jnp.where(finite, constant_size(grads), 0))
        unit = tree.reciprocal(size)
        g = tree.scale(unit, jax.tree.map(tree.promote, grads))
        g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))

        part, share = value_fn, 1.0
        if curvature_batch_size is not None:
            part, share = _sub_batch(value_fn, curvature_batch_size, seed, state.count)
        undamped = curvature(part, params)
        lam, products = state.damping, jnp.array(0, jnp.int32)
        if damping is None:
            lam, products = jax.lax.cond(
                (lam == 0) & (size > 0),
                lambda: (_curvature_along(undamped, g), products + 1),
                lambda: (lam, products),
            )

        def product(v: tree.PyTree) -> tree.PyTree:
            return tree.map(lambda v, gv: gv + lam * v, v, undamped(v))

        inverse, made = checked_inverse("hessian_free", preconditioner, product, g, state.count)
        start = tree.scale(scalar(warm_start) * unit, state.direction)
        most = jnp.minimum(scalar(maxiter), _limit(g))
        cg = _conjugate_gradients(
            product, preconditioner and inverse, g, start, scalar(progress), most, iterates
        )
        products = products + made + cg.products

        def value_at(p: tree.PyTree) -> jax.Array:
            """f(θ + p), as the loop will see it."""
            trial = tree.map(lambda x, p: x + size * p, params, p)
            f = scalar(value_fn(trial))
            return jnp.where(jnp.isfinite(f), f, tree.largest())

        f0 = jnp.where(finite, scalar(value), 0)
        noise = 10 * jnp.finfo(value.dtype).eps * jnp.abs(f0)
        chosen, evaluations = _backtrack(value_at, cg, iterates)
        slope = size * (size * tree.vdot(g, chosen.p))
        alpha, low, more = _line_search(value_at, chosen, f0 + noise, slope)
        predicted = -size * (size * chosen.q)
        hidden = (jnp.abs(f0 - chosen.f) <= noise) & (predicted <= noise) & (chosen.q < 0)
        ratio = jnp.where(hidden, 0.5, tree.divide(f0 - chosen.f, predicted))
        moves = finite & (size > 0)
        accept = moves & low

        # -- Levenberg and Marquardt's rule
        factor = jnp.where(ratio > _GOOD, 1 / _FACTOR, jnp.where(ratio < _POOR, _FACTOR, 1))
        new = jnp.where(lam > 0, jnp.clip(factor * lam, *_range(lam)), 0)
        lam = jnp.where(moves, new, lam)

        better = finite & ((f0 < state.lowest) | (size < 0.9 * state.smallest))
        idle = jnp.where(better, 0, state.idle + accept.astype(jnp.int32))

        p = tree.scale(jnp.where(accept, alpha * size, 0), chosen.p)
        work = share * scalar(products) + _VALUE * scalar(evaluations + more)
        new_info = HessianFreeInfo(
            curvature_products=tree.add_count(info.curvature_products, products),
            evaluations=tree.add_count(info.evaluations, evaluations + more),
            gradient_equivalents=info.gradient_equivalents + work,
            rejected=tree.add_count(info.rejected, (moves & ~accept).astype(jnp.int32)),
            non_finite=tree.add_count(info.non_finite, (~finite).astype(jnp.int32)),
            damping=lam,
            ratio=jnp.where(moves, ratio, info.ratio),
            iterations=cg.iterations,
            step_length=jnp.where(accept, alpha, 0),
            stalled=idle >= _IDLE,
        )
        direction = tree.select(accept, tree.scale(size, cg.p), state.direction)
        new_state = HessianFreeState(
            count=tree.add_count(state.count, 1),
            damping=lam,
            direction=direction,
            lowest=jnp.where(finite, jnp.minimum(f0, state.lowest), state.lowest),
            smallest=jnp.where(better, jnp.minimum(size, state.smallest), state.smallest),
            idle=idle,
            info=new_info,
        )
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        return tree.cast_like(p, grads), new_state

    return protocol.transformation(init, update)


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


def _curvature_along(product: Product, g: tree.PyTree) -> jax.Array:
    """gᵀGg/gᵀg, the size of the curvature along the gradient."""
    ratio = scalar(tree.divide(jnp.abs(tree.vdot(g, product(g))), tree.vdot(g, g)))
    least, most = _range(ratio)
    return jnp.where((ratio > least) & (ratio < most), ratio, 1)


def _range(x: jax.Array) -> tuple[float, float]:
    """Between what λ stays, so that it times a vector neither overflows nor vanishes."""
    power = int(jnp.finfo(x.dtype).maxexp) - 28
    return 2.0**-power, 2.0**power


def _limit(g: tree.PyTree) -> int:
    return min(2 * sum(leaf.size for leaf in jax.tree.leaves(g)), _MOST_ITERATIONS)


# -- conjugate gradients


class _Cg(NamedTuple):
    p: tree.PyTree  # the solution so far, of (G + λI)p = −g
    r: tree.PyTree  # (G + λI)p + g
    d: tree.PyTree
    rz: jax.Array
    q: jax.Array  # the model at p
    history: jax.Array  # q of every iteration
    kept: tree.PyTree  # iterates, in a ring
    kept_q: jax.Array
    newest: jax.Array  # how many were kept
    iterations: jax.Array
    products: jax.Array
    done: jax.Array


def _conjugate_gradients(
    product: Product,
    approximate_inverse: Product | None,
    g: tree.PyTree,
    start: tree.PyTree,
    progress: jax.Array,
    maxiter: jax.Array,
    iterates: int,
) -> _Cg:
    """Preconditioned CG for the minimum of q, which falls in every iteration."""
    plain = approximate_inverse is None
    inverse = approximate_inverse or (lambda r: r)
    zeros = jax.tree.map(jnp.zeros_like, g)
    started = tree.max_abs(start) > 0
    curved = jax.lax.cond(started, lambda: product(start), lambda: zeros)
    # a start that does not lower the model is none
    q = tree.vdot(start, g) + 0.5 * tree.vdot(start, curved)
    warm = q < 0
    start, curved = (tree.select(warm, x, zeros) for x in (start, curved))
    r = tree.map(jnp.add, curved, g)
    z = inverse(r)
    limit = _limit(g)
    rounding = jnp.finfo(q.dtype).eps ** 2 * tree.vdot(g, inverse(g))
    keep = jnp.asarray(_kept_iterations(limit))
    zero = jnp.array(0, jnp.int32)
    cg = _Cg(
        p=start,
        r=r,
        d=jax.tree.map(jnp.negative, z),
        rz=tree.vdot(r, z),
        q=jnp.where(warm, q, 0),
        history=jnp.zeros(limit + 1, q.dtype).at[0].set(jnp.where(warm, q, 0)),
        kept=jax.tree.map(lambda x: jnp.stack([x] * iterates), start),
        kept_q=jnp.zeros(iterates, q.dtype),
        newest=zero,
        iterations=zero,
        products=started.astype(jnp.int32),
        done=jnp.array(False),
    )

    def body(cg: _Cg) -> _Cg:
        bd = product(cg.d)
        curvature = tree.vdot(cg.d, bd)
        old = tree.vdot(cg.r, cg.r) if plain else cg.rz
        broken = ~(curvature > 0)  # or not finite
        usable = jnp.isfinite(curvature) & (curvature != 0)
        step = jnp.where(usable, old / jnp.where(usable, jnp.abs(curvature), 1), 0)
        p = tree.map(lambda p, d: p + step * d, cg.p, cg.d)
        r = tree.map(lambda r, bd: r + step * bd, cg.r, bd)
        z = inverse(r)
        rz = tree.next_square(cg.r, step, bd, r) if plain else tree.vdot(r, z)
        q = cg.q - 0.5 * step * old

        i = cg.iterations + 1
        slot = cg.newest % iterates
        kept = jax.tree.map(
            lambda ring, x: ring.at[slot].set(jnp.where(keep[i], x, ring[slot])), cg.kept, p
        )
        k = jnp.maximum(10, i // 10)
        gained = q - cg.history[jnp.maximum(i - k, 0)]
        slow = (i > k) & (q < 0) & (gained > scalar(k) * progress * q)
        return _Cg(
            p=p,
            r=r,
            d=tree.map(lambda d, z: tree.divide(rz, old) * d - z, cg.d, z),
            rz=rz,
            q=q,
            history=cg.history.at[i].set(q),
            kept=kept,
            kept_q=cg.kept_q.at[slot].set(jnp.where(keep[i], q, cg.kept_q[slot])),
            newest=cg.newest + keep[i],
            iterations=i,
            products=cg.products + 1,
            done=broken | slow,
        )

    def unfinished(cg: _Cg) -> jax.Array:
        return ~cg.done & (scalar(cg.iterations) < maxiter) & (cg.rz > rounding)

    cg = tree.varying_like(cg, g)
    return forward_only("hessian_free", jax.lax.while_loop(unfinished, body, cg))


def _kept_iterations(limit: int) -> np.ndarray:
    """1 at every iteration ⌈1.3^j⌉ up to ``limit``, 0 at the others."""
    steps = range(math.ceil(math.log(limit + 1, _SPACING)))
    numbers = [math.ceil(_SPACING**j) for j in steps]
    return np.isin(np.arange(limit + 1), numbers).astype(np.int32)


# -- the choice of the step


class _Chosen(NamedTuple):
    p: tree.PyTree
    q: jax.Array  # the model there
    f: jax.Array  # the objective there, the largest number where it is not finite


def _backtrack(
    value_at: Callable[[tree.PyTree], jax.Array], cg: _Cg, iterates: int
) -> tuple[_Chosen, jax.Array]:
    """The last of CG's iterates, or an earlier one as long as the value falls on the way there."""

    def body(carry: tuple[_Chosen, jax.Array, jax.Array]) -> tuple[_Chosen, jax.Array, jax.Array]:
        best, back, _ = carry
        slot = (cg.newest - back) % iterates
        p = jax.tree.map(lambda ring: ring[slot], cg.kept)
        f = value_at(p)
        better = (f < best.f) | (best.f == tree.largest())
        earlier = _Chosen(p, cg.kept_q[slot], f)
        return tree.select(better, earlier, best), back + 1, better

    def unfinished(carry: tuple[_Chosen, jax.Array, jax.Array]) -> jax.Array:
        _, back, better = carry
        return better & (back <= jnp.minimum(cg.newest, iterates))

    # the newest that was kept may be the last itself
    newest = cg.kept_q[(cg.newest - 1) % iterates]
    first = jnp.where((cg.newest > 0) & (newest == cg.q), 2, 1)
    last = _Chosen(cg.p, cg.q, value_at(cg.p))
    best, back, _ = jax.lax.while_loop(
        unfinished, body, tree.varying_like((last, first, jnp.array(True)), cg.p)
    )
    return forward_only("hessian_free", best), 1 + back - first


_Trial: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # α, the value, the values taken


def _line_search(
    value_at: Callable[[tree.PyTree], jax.Array],
    chosen: _Chosen,
    bound: jax.Array,
    slope: jax.Array,
) -> _Trial:
    """Armijo's search: α, whether the value there is low enough, and the values taken."""
    trials = jnp.array(0, jnp.int32)

    def too_high(alpha: jax.Array, f: jax.Array) -> jax.Array:
        return ~(f <= bound + _ARMIJO * alpha * slope)

    def body(carry: _Trial) -> _Trial:
        alpha, _, trials = carry
        alpha = _SHRINK * alpha
        return alpha, value_at(tree.scale(alpha, chosen.p)), trials + 1

    def unfinished(carry: _Trial) -> jax.Array:
        alpha, f, trials = carry
        return too_high(alpha, f) & (trials < _TRIALS) & (slope < 0)

    one = jnp.ones_like(chosen.f)
    start = tree.varying_like((one, chosen.f, trials), chosen.p)
    alpha, f, trials = jax.lax.while_loop(unfinished, body, start)
    # α is a power of a constant
    return jax.lax.stop_gradient(alpha), ~too_high(alpha, f) & (slope < 0), trials
