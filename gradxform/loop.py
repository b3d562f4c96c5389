"""The loop of :func:`gradxform.minimize`, around any method."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal as Constant

from gradxform import tree
from gradxform.hyperparameters import scalar, shown
from gradxform.info import reported, total
from gradxform.kernels import max_abs
from gradxform.objective import Composed, bind
from gradxform.packed_loop import alternate
from gradxform.sharding import varying_like
from gradxform.solution import Solution, Status

_RUNNING = -1
_PATIENCE = 100  # evaluations in a row at rest after which the loop ends


class Point(NamedTuple):
    """A point that was evaluated."""

    params: tree.PyTree
    value: jax.Array
    grad_norm: jax.Array


class Extent(NamedTuple):
    """The scale of the problem: of the start, and of the first step that changed the value."""

    value: jax.Array
    params: jax.Array
    is_known: jax.Array  # whether there was such a step


class Loop(NamedTuple):
    """What one turn hands to the next."""

    params: tree.PyTree  # where to evaluate next
    state: optax.OptState
    value: jax.Array  # at the point evaluated last
    grad_norm: jax.Array  # there
    best: Point  # the point to return: the best one so far, or the last one
    start_value: jax.Array
    extent: Extent
    lowest: jax.Array  # lowest value so far
    advanced: jax.Array  # whether an update has led from there to ``params``
    is_waiting: jax.Array  # whether that update was zero
    at_rest: jax.Array  # evaluations in a row that found the point before again
    steps: jax.Array  # updates that led to the point evaluated last
    evaluations: jax.Array
    status: jax.Array


def run(
    fn: Callable[[tree.PyTree], Any],
    tx: optax.GradientTransformation,
    has_aux: bool,
    returned: Literal["best", "last"] | None,
    params: tree.PyTree,
    loop: Loop | None,
    tol: jax.Array,
    max_steps: jax.Array,
) -> Solution:
    """Updates until the loop has a status."""
    tx = optax.with_extra_args_support(tx)
    value_fn = bind(_value_alone(fn) if has_aux else fn, {}, "minimize: fn")
    if loop is None:
        loop = _first(params, tx.init(params))
    frozen = _frozen(tx, params, loop.state)
    is_frozen = jax.tree.unflatten(jax.tree.structure(params), frozen)
    penalised = _is_penalised(tx, params, loop.state)
    keep_last = penalised if returned is None else jnp.array(returned == "last")

    def look(loop: Loop) -> tuple[Loop, tuple[jax.Array, tree.PyTree]]:
        value, grads = jax.value_and_grad(value_fn)(loop.params)
        free = jax.tree.map(lambda g, frozen: jnp.where(frozen, 0, g), grads, is_frozen)
        grad_norm, size = map(scalar, max_abs(free, loop.params))
        here = Point(loop.params, scalar(value), grad_norm)
        finite = jnp.isfinite(here.value) & jnp.isfinite(here.grad_norm)
        first = loop.evaluations == 0
        steps = loop.steps + loop.advanced.astype(jnp.int32)
        # a method that counts such points has stepped back from them
        lost = ~finite & (first | (not reported(loop.state, "non_finite")))

        start_value = jnp.where(first, here.value, loop.start_value)
        is_low = finite & _is_low(here, loop, start_value)
        better = is_low & ((here.value < loop.lowest) | (here.grad_norm <= loop.best.grad_norm))
        best = tree.select(first | better | (keep_last & finite), here, loop.best)

        extent = _extent(here, size, loop)
        small = (here.grad_norm <= tol) & (is_low | keep_last) & ~penalised
        at_rest = _at_rest(here, loop, tol)
        ends = (
            (lost, Status.non_finite),
            (small, Status.converged),
            (penalised & (at_rest >= _PATIENCE), Status.converged),
            (at_rest >= _PATIENCE, Status.stalled),
            (finite & _is_unbounded(here, size, start_value, extent), Status.unbounded),
            (steps >= max_steps, Status.max_steps),
        )
        status = jnp.int32(_RUNNING)
        for holds, end in reversed(ends):  # the first that holds
            status = jnp.where(holds, jnp.int32(end), status)
        looked = loop._replace(
            value=here.value,
            grad_norm=here.grad_norm,
            best=best,
            start_value=start_value,
            extent=extent,
            lowest=jnp.where(finite, jnp.minimum(loop.lowest, here.value), loop.lowest),
            advanced=jnp.zeros_like(loop.advanced),
            at_rest=at_rest,
            steps=steps,
            evaluations=loop.evaluations + 1,
            status=status,
        )
        return looked, (value, grads)

    def move(loop: Loop, seen: tuple[jax.Array, tree.PyTree]) -> Loop:
        value, grads = seen
        updates, state = tx.update(
            grads, loop.state, loop.params, value=value, grad=grads, value_fn=value_fn
        )
        stalled = is_running(loop) & (total(state, "stalled") > 0)
        return loop._replace(
            params=optax.apply_updates(loop.params, updates),
            state=state,
            advanced=jnp.ones_like(loop.advanced),
            is_waiting=tree.max_abs(updates) == 0,
            # Optax's line searches report the evaluations of each update, not their sum
            evaluations=loop.evaluations + total(state, "num_linesearch_steps"),
            status=jnp.where(stalled, jnp.int32(Status.stalled), loop.status),
        )

    def is_running(loop: Loop) -> jax.Array:
        return loop.status == _RUNNING

    begun = loop._replace(status=jnp.full_like(loop.status, _RUNNING))
    begun = varying_like(begun, params)
    # a cheap update too many costs less than a branch in every turn
    loop = alternate(look, move, is_running, begun, branch=_is_dear(loop.state))
    return Solution(
        *loop.best,
        loop.steps,
        loop.evaluations + total(loop.state, "evaluations"),
        total(loop.state, "curvature_products"),
        loop.status,
        fn(loop.best.params)[1] if has_aux else None,
        tol,
        max_steps,
        loop,
    )


def _first(params: tree.PyTree, state: optax.OptState) -> Loop:
    zero = jnp.zeros((), jnp.int32)
    none, infinite = scalar(0), scalar(jnp.inf)
    return Loop(
        params=params,
        state=state,
        value=infinite,
        grad_norm=infinite,
        best=Point(params, infinite, infinite),
        start_value=infinite,
        extent=Extent(none, none, jnp.array(False)),
        lowest=infinite,
        advanced=jnp.array(False),
        is_waiting=jnp.array(False),
        at_rest=zero,
        steps=zero,
        evaluations=zero,
        status=zero,
    )


def _value_alone(fn: Callable[[tree.PyTree], Any]) -> Callable[[tree.PyTree], Any]:
    def value_fn(params: tree.PyTree) -> Any:
        result = fn(params)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ValueError(
                "minimize(has_aux=True): fn must return a pair, its value and anything else, got "
                f"{shown(result)}"
            )
        return result[0]

    return value_fn


# -- verdicts


def _is_low(here: Point, loop: Loop, start_value: jax.Array) -> jax.Array:
    """Whether no lower value was seen, apart from rounding."""
    noise = 4 * jnp.finfo(here.value.dtype).eps * jnp.abs(loop.lowest)
    return here.value <= jnp.minimum(loop.lowest + noise, start_value)


def _at_rest(here: Point, loop: Loop, tol: jax.Array) -> jax.Array:
    """How often in a row an update has led to the same value and gradient."""
    same = (here.value == loop.value) & (here.grad_norm == loop.grad_norm)
    # an update of zero where the gradient is not: the method waits, for more gradients or a rate
    waiting = loop.is_waiting & (here.grad_norm > tol)
    return jnp.where(waiting, loop.at_rest, jnp.where(same, loop.at_rest + 1, 0))


def _extent(here: Point, size: jax.Array, loop: Loop) -> Extent:
    start, first = loop.extent, loop.evaluations == 0
    value = jnp.abs(here.value)
    changed = ~first & ~start.is_known & (here.value != loop.value)
    stepped = Extent(
        jnp.maximum(start.value, jnp.abs(here.value - loop.value)),
        jnp.maximum(start.params, size),
        jnp.array(True),
    )
    begun = Extent(value, size, jnp.array(False))
    return tree.select(first, begun, tree.select(changed, stepped, start))


def _is_unbounded(
    here: Point, size: jax.Array, start_value: jax.Array, extent: Extent
) -> jax.Array:
    """Whether value and parameters have left the scale of the start by more than its digits.

    A minimum that far would not be resolved. Or the value is near the end of the numbers.
    """
    digits = jnp.finfo(here.value.dtype)
    far = size * digits.eps > extent.params
    deep = (start_value - here.value) * digits.eps > extent.value
    lost = here.value < -(float(digits.max) ** 0.75)
    return (extent.is_known & far & deep) | lost


# -- what the method is


def _is_dear(state: optax.OptState) -> bool:
    """Whether an update evaluates more than the value and gradient that it is handed."""
    work = ("evaluations", "curvature_products", "num_linesearch_steps")
    return any(reported(state, name) for name in work)


def _is_penalised(
    tx: optax.GradientTransformationExtraArgs, params: tree.PyTree, state: optax.OptState
) -> jax.Array:
    """Whether a method moves parameters of zero gradient, and otherwise where they are negative.

    Weight decay does, and an L1 penalty; noise does not. A search judges by values alone.
    """
    if reported(state, "stalled") or reported(state, "num_linesearch_steps"):
        return jnp.array(False)
    zeros = jax.tree.map(jnp.zeros_like, params)
    bowl = Composed(lambda p: 0.5 * tree.vdot(p, p), lambda p: p, {})

    def update_at(point: tree.PyTree) -> tree.PyTree:
        start = tx.init(point)
        return tx.update(zeros, start, point, value=bowl(point), grad=zeros, value_fn=bowl)[0]

    point = jax.tree.map(lambda p: jnp.abs(p) + 1, params)
    here, there = update_at(point), update_at(jax.tree.map(jnp.negative, point))
    rounding = [16 * jnp.finfo(p.dtype).eps for p in jax.tree.leaves(point)]
    leaves = zip(*map(jax.tree.leaves, (here, there, point)), rounding, strict=True)
    apart = [jnp.any(jnp.abs(a - b) > eps * p) for a, b, p, eps in leaves if jnp.size(p)]
    return jnp.any(jnp.stack(apart)) if apart else jnp.array(False)


def _frozen(
    tx: optax.GradientTransformationExtraArgs, params: tree.PyTree, state: optax.OptState
) -> list[bool]:
    """For each leaf, whether its update depends on nothing, as ``optax.set_to_zero`` makes it."""
    masks = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MaskedState))
    if not any(isinstance(x, optax.MaskedState) for x in masks):
        return [False] * len(jax.tree.leaves(params))
    bowl = Composed(lambda p: 0.5 * tree.vdot(p, p), lambda p: p, {})

    def update(grads: tree.PyTree, state: optax.OptState, params: tree.PyTree) -> tree.PyTree:
        return tx.update(grads, state, params, value=bowl(params), grad=grads, value_fn=bowl)[0]

    jaxpr = jax.make_jaxpr(update)(params, state, params).jaxpr
    moving = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Constant) and x in moving for x in equation.invars):
            moving.update(equation.outvars)
    return [isinstance(x, Constant) or x not in moving for x in jaxpr.outvars]
