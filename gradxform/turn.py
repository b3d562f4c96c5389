"""One turn of the loop of :func:`gradxform.minimize`: evaluate, stop or update, for any method."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.bounds import Box, landed, projected_gradient
from gradxform.complex_leaves import to_complex
from gradxform.endings import (
    PATIENCE,
    RUNNING,
    Extent,
    Limits,
    extent_after,
    hidden_change,
    is_low,
    is_unbounded,
)
from gradxform.evaluation import eval_params
from gradxform.history import Recorder, moved_on, written
from gradxform.hyperparameters import scalar
from gradxform.info import reported, total
from gradxform.kernels import max_abs
from gradxform.solution import Status
from gradxform.stopping import Progress, Test, ends
from gradxform.wrappers.projection import dual_change, has_stepped, subgradient_of


class Point(NamedTuple):
    """A point that was evaluated."""

    params: tree.PyTree
    value: jax.Array
    grad_norm: jax.Array  # largest absolute entry of the gradient, without frozen leaves
    aux: tree.PyTree  # the second part of the objective's result; () without one


class Step(NamedTuple):
    """The last step between accepted points, for stop rules."""

    value: jax.Array  # the value it led to
    value_change: jax.Array
    params_change: jax.Array  # largest absolute entry


class Loop(NamedTuple):
    """The state of the loop between two turns."""

    params: tree.PyTree  # the next point to evaluate
    state: optax.OptState  # state of the method
    value: jax.Array  # value at the last evaluated point
    grad_norm: jax.Array  # largest absolute gradient entry at the last evaluated point
    best: Point  # the point to return: the best so far, or the last
    first_value: jax.Array  # value at the start
    first_grad_norm: jax.Array  # largest absolute gradient entry at the start
    extent: Extent  # scale of the problem
    lowest: jax.Array  # lowest value so far
    running: tree.PyTree  # running statistics that the objective gets; () without them
    step: Step | tuple[()]  # the last step, if a stop rule may ask for it
    recorder: Recorder | tuple[()]  # the history, if it is asked for
    advanced: jax.Array  # whether an update was made since the last evaluation
    is_waiting: jax.Array  # whether the last update was zero
    at_rest: jax.Array  # evaluations in a row with unchanged value and gradient
    steps: jax.Array  # updates before the last evaluation
    evaluations: jax.Array  # evaluations of value and gradient
    status: jax.Array  # a ``Status``, or ``RUNNING``


class Objective(NamedTuple):
    """The objective; ``running`` are the statistics that it gets, () without them."""

    evaluate: Callable[[tree.PyTree, tree.PyTree], tuple[jax.Array, tree.PyTree]]
    """(params, running) → (value, aux)"""
    value_fn: Callable[[tree.PyTree], Callable[[tree.PyTree], jax.Array]]
    """running → the function of the parameters that the method gets"""


class Problem(NamedTuple):
    """What a turn of the loop needs and does not change."""

    objective: Objective
    tx: optax.GradientTransformationExtraArgs
    stop: Test | None
    limits: Limits
    box: Box | None  # the bounds of the method
    is_frozen: tree.PyTree  # of booleans
    penalised: jax.Array  # whether the method contains a penalty
    keep_last: jax.Array  # whether the last point is returned instead of the best


class Seen(NamedTuple):
    """What an evaluation found."""

    value: jax.Array
    grads: tree.PyTree
    aux: tree.PyTree


def look(problem: Problem, loop: Loop) -> tuple[Loop, Seen]:
    """Evaluates the objective, and ends the run if it is over."""
    evaluate = jax.value_and_grad(problem.objective.evaluate, has_aux=True)
    (value, aux), grads = evaluate(loop.params, loop.running)
    free = grads
    if problem.box is not None:
        free = projected_gradient(problem.box, loop.params, free)
    if (subgradient := subgradient_of(loop.state, loop.params)) is not None:
        free = tree.map(jnp.add, subgradient, free)  # in at least float32
    free = jax.tree.map(lambda g, frozen: jnp.where(frozen, 0, g), free, problem.is_frozen)
    grad_norm, size = map(scalar, max_abs(free, loop.params))
    point = Point(loop.params, scalar(value), grad_norm, aux)
    finite = jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)
    first = loop.evaluations == 0
    looked = loop._replace(
        value=point.value,
        grad_norm=point.grad_norm,
        first_value=jnp.where(first, point.value, loop.first_value),
        first_grad_norm=jnp.where(first, point.grad_norm, loop.first_grad_norm),
        extent=extent_after(loop.extent, first, point.value, loop.value, size),
        lowest=jnp.where(finite, jnp.minimum(loop.lowest, point.value), loop.lowest),
        advanced=jnp.zeros_like(loop.advanced),
        steps=loop.steps + loop.advanced.astype(jnp.int32),
        evaluations=loop.evaluations + 1,
    )
    low = finite & is_low(point.value, loop.lowest, looked.first_value)
    better = low & ((point.value < loop.lowest) | (point.grad_norm <= loop.best.grad_norm))
    is_returned = first | better | (problem.keep_last & finite)
    looked = looked._replace(
        best=tree.select(is_returned, point, loop.best),
        at_rest=_at_rest(problem, loop, looked),
        recorder=_recorded(looked, is_returned),
    )
    looked = looked._replace(status=_status(problem, looked, size, low, loop.lowest - point.value))
    return looked, Seen(value, grads, aux)


def move(problem: Problem, loop: Loop, seen: Seen) -> Loop:
    """Updates the parameters."""
    updates, state = problem.tx.update(
        seen.grads,
        loop.state,
        loop.params,
        value=seen.value,
        grad=seen.grads,
        value_fn=problem.objective.value_fn(loop.running),
    )
    params = optax.apply_updates(loop.params, updates)
    if problem.box is not None:
        params = landed(problem.box, loop.params, updates)
    is_waiting = (tree.max_abs(updates) == 0) & ~has_stepped(state)
    accepts = _accepts(loop.state, state)
    stalled = (loop.status == RUNNING) & (total(state, "stalled") > 0)
    has_running = bool(jax.tree.leaves(loop.running))
    running = tree.select(accepts, seen.aux, loop.running) if has_running else ()
    recorder = loop.recorder
    return loop._replace(
        params=params,
        state=state,
        running=running,
        step=_step(loop, params, state, accepts & ~is_waiting),
        recorder=moved_on(recorder, accepts) if isinstance(recorder, Recorder) else (),
        advanced=jnp.ones_like(loop.advanced),
        is_waiting=is_waiting,
        # Optax's line searches report evaluations per update, not in total
        evaluations=loop.evaluations + total(state, "num_linesearch_steps"),
        status=jnp.where(stalled, jnp.int32(Status.stalled), loop.status),
    )


def _accepts(before: optax.OptState, after: optax.OptState) -> jax.Array:
    """Whether an update has accepted the point that it got; a method without trial points does."""
    if not reported(after, "accepted"):
        return jnp.array(True)
    return total(after, "accepted") > total(before, "accepted")


def _step(loop: Loop, params: tree.PyTree, state: optax.OptState, accepts: jax.Array) -> Any:
    """The last step after an update that has accepted the point, or not."""
    old = loop.step
    if not isinstance(old, Step):
        return ()
    before, after = eval_params(loop.state, loop.params), eval_params(state, params)
    moved = scalar(tree.max_abs(jax.tree.map(jnp.subtract, after, before)))
    moved = jnp.maximum(moved, dual_change(loop.state, state))
    is_first = ~jnp.isfinite(old.value)
    none = scalar(jnp.inf)
    new = Step(
        loop.value,
        jnp.where(is_first, none, jnp.abs(loop.value - jnp.where(is_first, 0, old.value))),
        jnp.where(is_first & (moved == 0), none, moved),
    )
    return tree.select(accepts, new, old)


def _recorded(looked: Loop, is_returned: jax.Array) -> Any:
    if not isinstance(looked.recorder, Recorder):
        return ()
    evaluations = looked.evaluations + total(looked.state, "evaluations")
    return written(looked.recorder, looked.value, looked.grad_norm, evaluations, is_returned)


# -- how a run ends


def _status(
    problem: Problem, loop: Loop, size: jax.Array, low: jax.Array, decrease: jax.Array
) -> jax.Array:
    """The status after the evaluation of a point of which ``low`` says whether it is the lowest."""
    finite = jnp.isfinite(loop.value) & jnp.isfinite(loop.grad_norm)
    # a method that counts non-finite points steps back from them
    is_lost = ~finite & ((loop.evaluations == 1) | (not reported(loop.state, "non_finite")))
    converged, stopped = _verdict(problem, loop, size, low, decrease)
    is_at_rest = loop.at_rest >= PATIENCE
    endings = (
        (is_lost, jnp.int32(Status.non_finite)),
        (converged, jnp.int32(Status.converged)),
        (problem.penalised & is_at_rest, jnp.int32(Status.converged)),
        (stopped, jnp.int32(Status.stopped)),
        (is_at_rest, jnp.int32(Status.stalled)),
        (
            finite & is_unbounded(loop.value, size, loop.first_value, loop.extent),
            jnp.int32(Status.unbounded),
        ),
        (loop.steps >= problem.limits.max_steps, jnp.int32(Status.max_steps)),
    )
    status = jnp.int32(RUNNING)
    for holds, end in reversed(endings):  # the first one that holds wins
        status = jnp.where(holds, end, status)
    return status


def _verdict(
    problem: Problem, loop: Loop, size: jax.Array, low: jax.Array, decrease: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the run has converged, and whether a rule stops it for another reason."""
    counts = low | problem.keep_last
    is_penalised = problem.penalised
    if subgradient_of(loop.state, loop.params) is not None:
        # the gradient contains the penalty as soon as an update has found its subgradient
        counts &= loop.steps > 0
        is_penalised = jnp.array(False)
    if problem.stop is None:
        tol = problem.limits.tol(loop.first_value, loop.first_grad_norm)
        return (loop.grad_norm <= tol) & counts & ~is_penalised, jnp.array(False)
    assert isinstance(loop.step, Step)
    end = ends(
        problem.stop,
        Progress(
            params=to_complex(loop.params),
            value=loop.value,
            grad_norm=loop.grad_norm,
            first_value=loop.first_value,
            first_grad_norm=loop.first_grad_norm,
            value_change=loop.step.value_change,
            params_change=loop.step.params_change,
            params_size=size,
            decrease=decrease,
            expected=_least(reported(loop.state, "expected")),
            relative_step=_least(reported(loop.state, "relative_step")),
            steps=loop.steps,
            evaluations=loop.evaluations + total(loop.state, "evaluations"),
        ),
    )
    # a rule may hold at a point that only rounding has lifted above the best one
    counts |= jnp.isfinite(decrease) & (decrease >= -hidden_change(loop.value))
    is_flat = loop.grad_norm == 0
    return (end.succeeds | is_flat) & counts, end.stops & ~end.succeeds


def _least(reports: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.minimum, reports, scalar(jnp.inf))


def _at_rest(problem: Problem, loop: Loop, looked: Loop) -> jax.Array:
    """How many times in a row an update has not changed value and gradient."""
    same = (looked.value == loop.value) & (looked.grad_norm == loop.grad_norm)
    # A zero update with a nonzero gradient: the method waits for more gradients or for a rate.
    tol = problem.limits.tol(looked.first_value, looked.first_grad_norm)
    waiting = loop.is_waiting & (looked.grad_norm > tol)
    return jnp.where(waiting, loop.at_rest, jnp.where(same, loop.at_rest + 1, 0))
