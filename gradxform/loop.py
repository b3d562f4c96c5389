"""The loop of :func:`gradxform.minimize`: evaluate, stop or update, for any method."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal as Constant

from gradxform import tree
from gradxform.arguments import joined, with_arguments
from gradxform.hyperparameters import scalar, shown
from gradxform.info import reported, total
from gradxform.kernels import max_abs
from gradxform.objective import Composed, bind
from gradxform.packed_loop import alternate
from gradxform.sharding import varying_like
from gradxform.solution import Solution, Status

_RUNNING = -1
_PATIENCE = 100  # the loop ends after this many evaluations in a row without any change


class Point(NamedTuple):
    """A point that was evaluated."""

    params: tree.PyTree
    value: jax.Array
    grad_norm: jax.Array  # largest absolute entry of the gradient, without frozen leaves


class Extent(NamedTuple):
    """The scale of the problem, from the start and the first step that changed the value."""

    value: jax.Array  # scale of the value
    params: jax.Array  # scale of the parameters
    is_known: jax.Array  # whether a step has changed the value


class Loop(NamedTuple):
    """The state of the loop between two turns."""

    params: tree.PyTree  # the next point to evaluate
    state: optax.OptState  # state of the method
    value: jax.Array  # value at the last evaluated point
    grad_norm: jax.Array  # largest absolute gradient entry at the last evaluated point
    best: Point  # the point to return: the best so far, or the last
    start_value: jax.Array  # value at the start
    extent: Extent  # scale of the problem
    lowest: jax.Array  # lowest value so far
    advanced: jax.Array  # whether an update was made since the last evaluation
    is_waiting: jax.Array  # whether the last update was zero
    at_rest: jax.Array  # evaluations in a row with unchanged value and gradient
    steps: jax.Array  # updates before the last evaluation
    evaluations: jax.Array  # evaluations of value and gradient
    status: jax.Array  # a ``Status``, or ``_RUNNING``


def run(
    fn: Callable[[tree.PyTree], Any],
    tx: optax.GradientTransformation,
    has_aux: bool,
    returned: Literal["best", "last"] | None,
    fixed: Any,
    params: tree.PyTree,
    arrays: list[Any],
    loop: Loop | None,
    tol: jax.Array,
    max_steps: jax.Array,
) -> Solution:
    """Runs the loop until it has a status other than ``_RUNNING``.

    ``fixed`` and ``arrays`` are the arguments of ``fn``, see :mod:`gradxform.arguments`.
    """
    fn = with_arguments(fn, joined(fixed, arrays), "minimize")
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
        point = Point(loop.params, scalar(value), grad_norm)
        finite = jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)
        first = loop.evaluations == 0
        steps = loop.steps + loop.advanced.astype(jnp.int32)
        # a method that counts non-finite points steps back from them
        is_lost = ~finite & (first | (not reported(loop.state, "non_finite")))

        start_value = jnp.where(first, point.value, loop.start_value)
        is_low = finite & _is_low(point, loop, start_value)
        better = is_low & ((point.value < loop.lowest) | (point.grad_norm <= loop.best.grad_norm))
        best = tree.select(first | better | (keep_last & finite), point, loop.best)

        extent = _extent(point, size, loop)
        small = (point.grad_norm <= tol) & (is_low | keep_last) & ~penalised
        at_rest = _at_rest(point, loop, tol)
        ends = (
            (is_lost, Status.non_finite),
            (small, Status.converged),
            (penalised & (at_rest >= _PATIENCE), Status.converged),
            (at_rest >= _PATIENCE, Status.stalled),
            (finite & _is_unbounded(point, size, start_value, extent), Status.unbounded),
            (steps >= max_steps, Status.max_steps),
        )
        status = jnp.int32(_RUNNING)
        for holds, end in reversed(ends):  # the first one that holds wins
            status = jnp.where(holds, jnp.int32(end), status)
        looked = loop._replace(
            value=point.value,
            grad_norm=point.grad_norm,
            best=best,
            start_value=start_value,
            extent=extent,
            lowest=jnp.where(finite, jnp.minimum(loop.lowest, point.value), loop.lowest),
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
            # Optax's line searches report evaluations per update, not in total
            evaluations=loop.evaluations + total(state, "num_linesearch_steps"),
            status=jnp.where(stalled, jnp.int32(Status.stalled), loop.status),
        )

    def is_running(loop: Loop) -> jax.Array:
        return loop.status == _RUNNING

    status = _first_status(loop, tol, max_steps)
    start = varying_like(loop._replace(status=status.astype(loop.status.dtype)), params)
    # for a cheap method one more update costs less than a branch in every turn
    loop = alternate(look, move, is_running, start, branch=_is_costly(loop.state))
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


def _first_status(loop: Loop, tol: jax.Array, max_steps: jax.Array) -> jax.Array:
    """Running, or where a solve is resumed that these limits end already, how it ended."""
    low = loop.best.grad_norm <= tol
    is_low = (loop.status == Status.converged) & low
    ended = (loop.evaluations > 0) & (is_low | (loop.steps >= max_steps))
    changed = (loop.status == Status.converged) & ~low
    end = jnp.where(changed, jnp.int32(Status.max_steps), loop.status)
    return jnp.where(ended, end, jnp.int32(_RUNNING))


def _value_alone(fn: Callable[[tree.PyTree], Any]) -> Callable[[tree.PyTree], Any]:
    def value_fn(params: tree.PyTree) -> Any:
        result = fn(params)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ValueError(
                "minimize(has_aux=True): fn must return a pair of its value and anything else, got "
                f"{shown(result)}"
            )
        return result[0]

    return value_fn


# -- when to stop


def _is_low(point: Point, loop: Loop, start_value: jax.Array) -> jax.Array:
    """Whether the value is the lowest so far, up to rounding."""
    noise = 4 * jnp.finfo(point.value.dtype).eps * jnp.abs(loop.lowest)
    return point.value <= jnp.minimum(loop.lowest + noise, start_value)


def _at_rest(point: Point, loop: Loop, tol: jax.Array) -> jax.Array:
    """How many times in a row an update has not changed value and gradient."""
    same = (point.value == loop.value) & (point.grad_norm == loop.grad_norm)
    # A zero update with a nonzero gradient: the method waits for more gradients or for a rate.
    waiting = loop.is_waiting & (point.grad_norm > tol)
    return jnp.where(waiting, loop.at_rest, jnp.where(same, loop.at_rest + 1, 0))


def _extent(point: Point, size: jax.Array, loop: Loop) -> Extent:
    """The scale of the problem after one more evaluation."""
    old, first = loop.extent, loop.evaluations == 0
    value = jnp.abs(point.value)
    changed = ~first & ~old.is_known & (point.value != loop.value)
    stepped = Extent(
        jnp.maximum(old.value, jnp.abs(point.value - loop.value)),
        jnp.maximum(old.params, size),
        jnp.array(True),
    )
    initial = Extent(value, size, jnp.array(False))
    return tree.select(first, initial, tree.select(changed, stepped, old))


def _is_unbounded(
    point: Point, size: jax.Array, start_value: jax.Array, extent: Extent
) -> jax.Array:
    """Whether the value falls without bound.

    It does if both value and parameters exceed the scale of the start so far that rounding hides
    the start, or if the value is close to the largest negative number.
    """
    digits = jnp.finfo(point.value.dtype)
    far = size * digits.eps > extent.params
    deep = (start_value - point.value) * digits.eps > extent.value
    enormous = point.value < -(float(digits.max) ** 0.75)
    return (extent.is_known & far & deep) | enormous


# -- properties of the method


def _is_costly(state: optax.OptState) -> bool:
    """Whether an update makes evaluations or curvature products of its own."""
    work = ("evaluations", "curvature_products", "num_linesearch_steps")
    return any(reported(state, name) for name in work)


def _is_penalised(
    tx: optax.GradientTransformationExtraArgs, params: tree.PyTree, state: optax.OptState
) -> jax.Array:
    """Whether the method contains a penalty, such as weight decay or L1.

    A penalty moves parameters of zero gradient, and differently for positive and negative ones.
    Noise moves both alike. Methods that search by values are not checked.
    """
    if reported(state, "stalled") or reported(state, "num_linesearch_steps"):
        return jnp.array(False)
    zeros = jax.tree.map(jnp.zeros_like, params)
    bowl = Composed(lambda p: 0.5 * tree.vdot(p, p), lambda p: p, {})

    def update_at(point: tree.PyTree) -> tree.PyTree:
        start = tx.init(point)
        return tx.update(zeros, start, point, value=bowl(point), grad=zeros, value_fn=bowl)[0]

    point = jax.tree.map(lambda p: jnp.abs(p) + 1, params)
    positive, negative = update_at(point), update_at(jax.tree.map(jnp.negative, point))
    rounding = [16 * jnp.finfo(p.dtype).eps for p in jax.tree.leaves(point)]
    leaves = zip(*map(jax.tree.leaves, (positive, negative, point)), rounding, strict=True)
    apart = [jnp.any(jnp.abs(a - b) > eps * p) for a, b, p, eps in leaves if jnp.size(p)]
    return jnp.any(jnp.stack(apart)) if apart else jnp.array(False)


def _frozen(
    tx: optax.GradientTransformationExtraArgs, params: tree.PyTree, state: optax.OptState
) -> list[bool]:
    """For each leaf, whether its update is a constant, as with ``optax.set_to_zero``."""
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
