"""Kronecker-factored Gauss–Newton steps: K-FAC without knowledge of the layers.

An update at θ, with the gradient g, the Gauss–Newton matrix F and the damping λ::

    every 2nd update:    V = Jᵀ H^½ ε                          ε random signs
                         L ← β L + (1 − β) V Vᵀ
                         R ← β R + (1 − β) Vᵀ V
    every 20th update:   L⁻¹, R⁻¹ of the damped factors
                         Δ = L⁻¹ G R⁻¹                         leaf by leaf
                         (α, μ) = the minimum of the quadratic model of f
                                  along −Δ and the last step δ
                         δ ← −αΔ + μδ
                         θ ← θ + δ
    every 5th update:    λ by the actual over the predicted reduction

The module ``random_passes`` makes V, ``kronecker_factors`` holds L and R, and ``quadratic_model``
finds (α, μ).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import protocol, tree
from gradxform.hyperparameters import (
    Count,
    Fraction,
    LearningRate,
    NonNegative,
    Scalar,
    Seed,
    Size,
    checked,
    rate,
    scalar,
)
from gradxform.improvement import PATIENCE, Improvement, improvement_after, no_improvement
from gradxform.info import diagnostics
from gradxform.second_order import kronecker_factors as kf
from gradxform.second_order import quadratic_model as quadratic
from gradxform.second_order import random_passes as passes
from gradxform.second_order.joined_leaves import joined
from gradxform.second_order.kronecker_batch import (
    Batch,
    after,
    batch_of,
    counted,
    no_counts,
    number,
)
from gradxform.second_order.kronecker_factors import Estimate, Options
from gradxform.sharding import varying_like

_POOR, _GOOD, _FACTOR = 0.25, 0.75, 0.9  # limits of ρ, and what λ changes by for each update
_VALUE = 1 / 3  # cost of a value, in gradients


@diagnostics
class KroneckerInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    curvature_products: jax.Array  #: products with the curvature, of sub-batches
    evaluations: jax.Array  #: evaluations of ``value_fn`` inside ``update``
    gradient_equivalents: jax.Array  #: cost of both, in gradients of ``value_fn``
    inversions: jax.Array  #: updates that inverted the factors
    fallbacks: jax.Array  #: updates without a step, because it was not finite
    non_finite: jax.Array  #: updates with a NaN or infinite value or gradient: the last step undone
    indefinite: jax.Array  #: updates in which the loss was not convex in the outputs
    damping: jax.Array  #: λ, in units of the curvature
    ratio: jax.Array  #: ρ, when it was last measured: actual over predicted reduction
    rate: jax.Array  #: α in the last update
    momentum: jax.Array  #: μ in the last update
    expected: jax.Array  #: reduction of f that the model predicts for the last step
    stalled: jax.Array  #: whether ten points in a row brought no progress on a fixed objective


class KroneckerState(NamedTuple):
    """State of :func:`kronecker`."""

    count: jax.Array  #: updates made so far
    turn: jax.Array  #: the same, but begins again where ``count`` has reached its largest value
    damping: jax.Array  #: λ, relative to ``unit``
    unit: jax.Array  #: curvature along the first gradient that has any; 0 before
    is_sum: jax.Array  #: whether the objective is a sum over the examples, not a mean
    estimate: Estimate  #: the factors and their inverses
    step: tree.PyTree  #: δ, the last step, in at least float32
    taken_back: jax.Array  #: whether that took the step before it back
    memory: quadratic.Memory  #: curvature in earlier sub-batches
    improvement: Improvement  #: the best over the points that an update moved from
    info: KroneckerInfo


@checked
def kronecker(
    damping: NonNegative = 0.02,
    min_damping: NonNegative = 2e-5,
    *,
    learning_rate: LearningRate | None = None,
    momentum: NonNegative | None = None,
    factor_batch_size: Size | None = None,
    model_batch_size: Size | None = None,
    factor_every: Count = 2,
    inverse_every: Count = 20,
    adapt_every: Count = 5,
    decay: Fraction = 0.98,
    max_dim: Size = 4096,
    lanczos: Size = 4,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    """Kronecker-factored Gauss–Newton steps for nets (K-FAC), with no rate to tune.

    For a parameter that is a matrix, with the gradient G, the method approximates its block of the
    Gauss–Newton matrix by a Kronecker product, whose inverse is cheap::

        L ≈ E[V Vᵀ],  R ≈ E[Vᵀ V]       V = Jᵀ H^½ ε, a backward pass of random signs ε
        Δ = (L/τ + π√λ I)⁻¹ G (R/τ + √λ/π I)⁻¹       τ² = tr L,  π² = columns/rows

    J is the Jacobian of the model and H the Hessian of the loss in the outputs. L and R are running
    means. The entries of vectors, such as biases, are divided by E[V²] + λ. A parameter with more
    axes is cut into the matrix with the least sum of sides. One with three axes is a stack of
    matrices if their factors take less memory. So the method knows no layers, and shared weights,
    embeddings, convolutions and attention need no preparation.

    The step is the minimum of the quadratic model of the objective along two directions, Δ and the
    last step δ₋ (Martens & Grosse, section 7)::

        δ = −αΔ + μδ₋,    (α, μ) minimise  gᵀδ + ½ δᵀ (F + λI) δ,    θ ← θ + δ

    F is the exact Gauss–Newton matrix on a part of the batch. Its curvature along Δ counts at least
    as much as in the mean of earlier updates, and |μ| is at most 1: a small part may lack the
    examples that curve the objective. The damping follows Levenberg and Marquardt. Every
    k = ``adapt_every`` updates::

        ρ = (f(θ + δ) − f(θ)) / (gᵀδ + ½ δᵀFδ)
        λ ← 0.9^k λ if ρ > 3/4,   λ ← 0.9^−k λ if ρ < 1/4

    Use large batches: with few examples the step follows their noise. 1,000 are good, 256 are
    enough for a small net. With fewer, let the steps shrink in the last quarter of a training
    (``optax.scale_by_schedule``), or average the path (:func:`gradxform.polyak_average`). On top of
    the gradient, an update costs about one gradient of a large batch or less, plus the inverses.
    The state holds about seven times the parameters.

    If value or gradient is NaN or infinite, the update takes the last step back and counts it. If
    the loss is not convex in the outputs, its negative curvature counts as zero, and
    ``info.indefinite`` counts the updates that saw it.

    Args:
      damping: the first λ ≥ 0, relative to the curvature along the first gradient, gᵀFg / gᵀg.
      min_damping: the smallest λ, in the same unit. A larger one is safer with small batches.
      learning_rate: α, a number, an array or a schedule of the update count; ``None`` for the
        minimum of the model.
      momentum: μ ≥ 0; ``None`` for the minimum of the model.
      factor_batch_size: number of examples for V, spread evenly over the batch; ``None`` for one in
        16, but at least 640 outputs of the model (64 examples of ten classes, for instance) and 8
        examples, and at most 64 examples or a sixteenth. The number is rounded up to a divisor of
        the batch, if there is one below its double. The loss may be a mean or a sum over the
        examples.
      model_batch_size: number of examples for F; ``None`` for one in 16, but at least 2,560 outputs
        and 8 examples, and at most 256 examples or a sixteenth. In a batch of fewer than 512, half
        of it or 128 takes the place of 256. The number is rounded in the same way.
      factor_every: updates from one V to the next. The first ten updates each make one.
      inverse_every: updates from one inverse to the next; early ones make more.
      adapt_every: k, updates from one change of λ to the next.
      decay: in [0, 1): the largest part of the old L and R in the running means.
      max_dim: of a side of more entries, such as the words of an embedding, only the diagonal is
        kept.
      lanczos: number of products with H for H^½ ε. One is exact for squared errors.
      seed: seed of the random signs.

    Returns:
      The transformation. ``update`` needs ``params``, ``value`` and ``value_fn``, which must come
      from :func:`gradxform.compose`; they and the gradient must belong to the same batch. Other
      keyword arguments of ``update`` reach the arguments of ``value_fn`` of the same name.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` misses an
        argument, ``value_fn`` does not come from :func:`gradxform.compose`, or the batch has fewer
        examples than asked for.

    References:
      Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
      ICML 2015. Morwani et al., "A new perspective on Shampoo's preconditioner" (2024), for
      L ⊗ R / tr L. Differs: the factors come from random backward passes, not from the inputs and
      outputs of layers.

    >>> import jax, jax.numpy as jnp, gradxform as gx
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> x = jax.random.normal(keys[0], (512, 4))
    >>> model = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["out"]
    >>> loss = lambda outputs, y: jnp.mean((outputs - y) ** 2)
    >>> objective = gx.compose(loss, model, x=x, y=jnp.sin(x[:, :1]) * x[:, 1:2])
    >>> start = {"hidden": jax.random.normal(keys[1], (4, 32)) / 2, "out": jnp.zeros((32, 1))}
    >>> ours = gx.minimize(objective, start, gx.kronecker(), max_steps=100)
    >>> adam = gx.minimize(objective, start, gx.adam(0.01), max_steps=100)
    >>> float(ours.value) < 0.75 * float(adam.value)
    True
    """
    options = Options(factor_every, inverse_every, decay, max_dim, lanczos, seed)

    def init(params: tree.PyTree) -> KroneckerState:
        return KroneckerState(
            count=jnp.array(0, jnp.int32),
            turn=jnp.array(0, jnp.int32),
            damping=number(damping),
            unit=number(),
            is_sum=jnp.array(False),
            estimate=kf.first_estimate(options, params),
            step=tree.zeros_like(params),
            taken_back=jnp.array(False),
            memory=quadratic.first_memory(),
            improvement=no_improvement(),
            info=_no_info(),
        )

    def update(
        grads: tree.PyTree,
        state: KroneckerState,
        params: tree.PyTree | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, KroneckerState]:
        batch = batch_of("kronecker", grads, params, value, value_fn, extra_args)
        if tree.count(grads) == 0:
            return grads, state
        for_factors = batch.for_factors(factor_batch_size)
        for_model = batch.for_model(model_batch_size)
        at = passes.linearised(for_model, batch.params)
        is_new = state.unit == 0
        is_sum = jnp.where(is_new, passes.is_sum(at, for_model, batch.value), state.is_sum)
        at = passes.scaled(at, for_model, is_sum)
        unit = kf.when(is_new, lambda: passes.curvature_along(at, batch.g), state.unit)
        unit = jnp.where(batch.finite, unit, state.unit)
        lam = state.damping * passes.or_one(unit)

        # the direction, and the step along it and the last step
        is_same = for_factors.times == for_model.times
        linearised = (lambda: at) if is_same else batch.linearised(for_factors, is_sum)
        made = kf.refreshed(options, state.estimate, batch.params, linearised, state.turn, lam)
        delta = kf.divided(batch.g, made.estimate, lam)
        moves = varying_like((delta, state.step), batch.params)
        model = quadratic.model_along(at, batch.g, *moves)
        alpha = None if learning_rate is None else -rate(learning_rate, state.count)
        chosen = _chosen(state, batch, made, delta, model, (lam, alpha, momentum))

        due = kf.is_due(after(state.turn), adapt_every)
        ratio = kf.when(due, lambda: _ratio(batch, chosen.step, chosen.change), state.info.ratio)
        is_taken_back = ~batch.finite & (state.count > 0)
        judged = jnp.where(is_taken_back, 0, ratio)
        next_damping = _next_damping(state.damping, judged, adapt_every, min_damping)
        is_judged = (due & chosen.usable) | is_taken_back
        next_damping = jnp.where(is_judged, next_damping, state.damping)

        improvement = improvement_after(
            state.improvement, batch.finite, batch.value, tree.max_abs(joined(batch.g))
        )
        gradients = made.probes / for_factors.times + 1 / for_model.times + _VALUE * scalar(due)
        info = counted(state.info, batch, made, chosen.usable, gradients)._replace(
            curvature_products=tree.add_count(state.info.curvature_products, 2 + made.probes),
            evaluations=tree.add_count(state.info.evaluations, due.astype(jnp.int32)),
            damping=next_damping * passes.or_one(unit),
            ratio=ratio,
            rate=-chosen.alpha,
            momentum=chosen.mu,
            expected=jnp.where(chosen.usable, -chosen.change, 0),
            stalled=improvement.idle >= PATIENCE,
        )
        new_state = KroneckerState(
            *(tree.add_count(state.count, 1), after(state.turn), next_damping, unit, is_sum),
            *(made.estimate, chosen.step, ~batch.finite, chosen.memory, improvement, info),
        )
        return tree.cast_like(chosen.step, grads), tree.cast_floating_like(new_state, state)

    return protocol.transformation(init, update)


def _no_info() -> KroneckerInfo:
    return KroneckerInfo(
        **no_counts(),
        evaluations=jnp.array(0, jnp.int32),
        ratio=number(),
        rate=number(),
        momentum=number(),
        expected=number(),
        stalled=jnp.array(False),
    )


class _Chosen(NamedTuple):
    """A step αΔ + μδ₋."""

    step: tree.PyTree
    alpha: jax.Array
    mu: jax.Array
    change: jax.Array  #: of the objective by the step, as the model predicts it
    usable: jax.Array  #: whether everything is finite; else the step is 0, or takes the last back
    memory: quadratic.Memory


def _chosen(
    state: KroneckerState,
    batch: Batch,
    made: kf.Refreshed,
    delta: tree.PyTree,
    model: quadratic.Model,
    given: tuple[jax.Array, Scalar | None, Scalar | None],
) -> _Chosen:
    """The minimum of the model; ``given`` are λ, and α and μ unless they come from the model.

    If value or gradient is not finite, the step takes the last one back.
    """
    model = quadratic.without_second(model, state.taken_back)
    model, relative = quadratic.averaged(model, state.memory)
    alpha, mu = quadratic.minimum(model, *given)
    change = quadratic.predicted(model, alpha, mu)
    usable = batch.finite & made.finite & jnp.isfinite(change)
    alpha, mu = (jnp.where(usable, x, 0) for x in (alpha, mu))
    weight = jnp.where(state.taken_back, 0, jnp.where(batch.finite, mu, -1))
    step = tree.map(lambda d, s: alpha * jnp.where(usable, d, 0) + weight * s, delta, state.step)
    memory = quadratic.Memory(
        jnp.where(usable, relative, state.memory.relative),
        jnp.where(usable, quadratic.curvature_of_step(model, alpha, mu), 0),
    )
    step = jax.lax.optimization_barrier(step)  # else it is computed again where it is used
    return _Chosen(step, alpha, mu, change, usable, memory)


def _ratio(batch: Batch, step: tree.PyTree, change: jax.Array) -> jax.Array:
    """ρ: the change of f by the step over the predicted one; 0 if it is not finite."""
    f = scalar(batch.value_fn(tree.map(jnp.add, batch.params, step)))
    ratio = tree.divide(f - batch.value, change)
    return jnp.where(jnp.isfinite(ratio), ratio, 0)


def _next_damping(lam: jax.Array, ratio: jax.Array, every: Scalar, least: Scalar) -> jax.Array:
    """Levenberg and Marquardt's rule."""
    factor = scalar(_FACTOR) ** scalar(every)
    factor = jnp.where(ratio > _GOOD, factor, jnp.where(ratio < _POOR, 1 / factor, 1))
    return jnp.maximum(factor * lam, scalar(least))
