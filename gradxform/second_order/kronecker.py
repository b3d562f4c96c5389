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

The module ``kronecker_factors`` holds V, L and R; ``quadratic_model`` holds (α, μ).
"""

import math
from collections.abc import Callable
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
from gradxform.info import diagnostics
from gradxform.objective import Composed, bind, check_value
from gradxform.second_order import kronecker_factors as factors
from gradxform.second_order import quadratic_model as quadratic
from gradxform.second_order.kronecker_factors import Estimate, Layout, Options, Part

_POOR, _GOOD, _FACTOR = 0.25, 0.75, 0.9  # limits of ρ, and what λ changes by for each update
_ENOUGH = 256  # examples: with fewer, ten outputs each say too little about the curvature
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


class KroneckerState(NamedTuple):
    """State of :func:`kronecker`."""

    count: jax.Array  #: updates made so far
    damping: jax.Array  #: λ; 0 until it is estimated
    unit: jax.Array  #: curvature along the first gradient
    estimate: Estimate  #: the factors and their inverses
    step: tree.PyTree  #: δ, the last step, in at least float32
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
    """TODO."""
    options = Options(factor_every, inverse_every, decay, max_dim, lanczos, seed)

    def init(params: tree.PyTree) -> KroneckerState:
        return KroneckerState(
            count=jnp.array(0, jnp.int32),
            damping=_number(damping),
            unit=_number(),
            estimate=factors.first_estimate(options, params),
            step=tree.zeros_like(params),
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
        batch = _batch("kronecker", grads, params, value, value_fn, extra_args)
        if tree.count(grads) == 0:
            return grads, state
        count = factors.of_all_lanes(state.count)
        for_factors = batch.part("factor_batch_size", factor_batch_size)
        for_model = batch.part("model_batch_size", model_batch_size)
        at = factors.linearised(for_model, batch.params, batch.value)
        unit = jax.lax.cond(
            state.count == 0, lambda: _curvature_along(at, batch.g), lambda: state.unit
        )
        lam = state.damping * unit

        # the direction
        made = factors.refreshed(
            options, state.estimate, batch.params, batch.probe(for_factors), count, lam
        )
        delta = factors.divided(batch.g, made.estimate, lam)

        # the step along it and the last step
        directions = jax.tree.map(jnp.negative, delta), state.step
        model = quadratic.model_along(at, batch.g, *directions)
        alpha = None if learning_rate is None else rate(learning_rate, state.count)
        alpha, mu = quadratic.minimum(model, lam, alpha, momentum)
        change = quadratic.predicted(model, alpha, mu)
        usable = batch.finite & jnp.isfinite(change)
        alpha, mu = jnp.where(usable, alpha, 0), jnp.where(usable, mu, 0)
        step = tree.map(lambda d, s: alpha * d + mu * s, *directions)

        # the damping
        due = factors.is_due(count + 1, adapt_every)
        ratio = jax.lax.cond(
            due, lambda: _ratio(batch, step, change), lambda: state.info.ratio
        )
        relative = jnp.where(
            due & usable,
            _next_damping(state.damping, ratio, adapt_every, min_damping),
            state.damping,
        )
        back = tree.map(lambda d, s: jnp.where(batch.finite, d, -s), step, state.step)
        info = KroneckerInfo(
            curvature_products=tree.add_count(state.info.curvature_products, 2 + made.probes),
            evaluations=tree.add_count(state.info.evaluations, due.astype(jnp.int32)),
            gradient_equivalents=state.info.gradient_equivalents
            + scalar(made.probes) / for_factors.times
            + 1 / for_model.times
            + _VALUE * scalar(due),
            inversions=tree.add_count(state.info.inversions, made.inversions),
            fallbacks=tree.add_count(state.info.fallbacks, (batch.finite & ~usable).astype(jnp.int32)),
            non_finite=tree.add_count(state.info.non_finite, (~batch.finite).astype(jnp.int32)),
            indefinite=tree.add_count(state.info.indefinite, (~made.convex).astype(jnp.int32)),
            damping=relative * unit,
            ratio=ratio,
            rate=alpha,
            momentum=mu,
            expected=-change,
        )
        new_state = KroneckerState(
            tree.add_count(state.count, 1), relative, unit, made.estimate, step, info
        )
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        return tree.cast_like(back, grads), new_state

    return protocol.transformation(init, update)


def _number(x: Scalar = 0.0) -> jax.Array:
    return jnp.array(scalar(x), copy=True)


def _no_info() -> KroneckerInfo:
    kinds = KroneckerInfo.__annotations__
    counts = ("curvature_products", "evaluations", "inversions", "fallbacks", "non_finite")
    count = lambda: jnp.array(0, jnp.int32)
    return KroneckerInfo(
        **{name: count() if name in (*counts, "indefinite") else _number() for name in kinds}
    )


class _Batch(NamedTuple):
    """What an update gets."""

    method: str
    params: tree.PyTree
    value: jax.Array
    value_fn: Composed
    g: tree.PyTree  # the gradient in at least float32; zero if it or the value is not finite
    finite: jax.Array  # whether value and gradient are

    def part(self, argument: str, size: int | None) -> Part:
        """Examples evenly spread over the batch: ``size`` of them, or the default number."""
        return _part(self.method, argument, self.value_fn, size)

    def probe(self, part: Part) -> Callable[[jax.Array, int], factors.Probe]:
        return lambda key, lanczos: factors.probe(part, self.params, self.value, key, lanczos)


def _batch(
    method: str,
    grads: tree.PyTree,
    params: tree.PyTree | None,
    value: jax.typing.ArrayLike | None,
    value_fn: Any,
    extra_args: Any,
) -> _Batch:
    params = protocol.require_params(method, params, grads)
    value = scalar(check_value("value", protocol.require(method, "value", value)))
    value_fn = bind(protocol.require(method, "value_fn", value_fn), extra_args)
    protocol.check_unmasked(method, params)
    if not isinstance(value_fn, Composed):
        raise ValueError(
            f"{method} needs to know which part of value_fn is the loss and which is the model: "
            "pass value_fn=gx.compose(loss, model), where loss(model(params)) is the value"
        )
    g = jax.tree.map(tree.promote, grads)
    finite = jnp.isfinite(value) & jnp.isfinite(tree.max_abs(g))
    g = tree.select(finite, g, jax.tree.map(jnp.zeros_like, g))
    params = jax.tree.map(tree.promote, params)
    return _Batch(method, params, jnp.where(finite, value, 0), value_fn, g, finite)


def _part(method: str, argument: str, value_fn: Composed, size: int | None) -> Part:
    if size is None and not value_fn.has_examples:
        return Part(value_fn, 1)
    n = value_fn.examples
    if size is None:
        size = min(n, max(n // 4, _ENOUGH))
        size = max(size // value_fn.chunks, 1) * value_fn.chunks
    if size > n or size % value_fn.chunks:
        raise ValueError(
            f"{method}({argument}={size}): the data have {n} examples in {value_fn.chunks} "
            f"chunks: give at most {n}"
            + (f", and a multiple of {value_fn.chunks}" if value_fn.chunks > 1 else "")
        )
    return Part(value_fn.spread(size), n // size)


def _curvature_along(at: factors.Linear, g: tree.PyTree) -> jax.Array:
    """gᵀFg / gᵀg, or 1 if it is 0."""
    pushed = at.push(g)
    ratio = tree.divide(at.scale * tree.vdot(pushed, at.bend(pushed)), tree.vdot(g, g))
    return jnp.where((ratio > 0) & jnp.isfinite(ratio), scalar(ratio), 1)


def _ratio(batch: _Batch, step: tree.PyTree, change: jax.Array) -> jax.Array:
    """ρ: the change of f by the step over the predicted one; 0 if it is not finite."""
    f = scalar(batch.value_fn(tree.map(jnp.add, batch.params, step)))
    ratio = tree.divide(f - batch.value, change)
    return jnp.where(jnp.isfinite(ratio), ratio, 0)


def _next_damping(lam: jax.Array, ratio: jax.Array, every: Scalar, least: Scalar) -> jax.Array:
    """Levenberg and Marquardt's rule."""
    factor = scalar(_FACTOR) ** scalar(every)
    factor = jnp.where(ratio > _GOOD, factor, jnp.where(ratio < _POOR, 1 / factor, 1))
    return jnp.maximum(factor * lam, scalar(least))
