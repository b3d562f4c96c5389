"""The loop of :func:`gradxform.minimize`, for any method."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from gradxform import leaves, tree
from gradxform.arguments import joined, with_arguments
from gradxform.bounds import Bounds, Box, box_of, project, sides
from gradxform.complex_leaves import has_parts, of_real, to_complex
from gradxform.endings import RUNNING, Extent, Limits, is_at_precision
from gradxform.history import Recorder, in_order, new_recorder
from gradxform.hyperparameters import scalar, shown
from gradxform.info import total
from gradxform.objective import bind, check_value
from gradxform.packed_loop import alternate
from gradxform.reporting import Reporter, ask, tell
from gradxform.sharding import varying_like
from gradxform.solution import Solution, Status
from gradxform.stopping import Test
from gradxform.traits import frozen_leaves, is_costly, is_penalised
from gradxform.turn import Loop, Objective, Point, Problem, Seen, Step, look, move
from gradxform.unrolled import alternate_at_most

# a method, or with bounds a function that makes one from them
Method: TypeAlias = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


class Given(NamedTuple):
    """What the user gave beside the objective; its arrays are apart."""

    args: Any
    stop: Test | None
    bounds: Bounds | None  # for the method, which is then a function of them


class Options(NamedTuple):
    """What is compiled into the loop."""

    has_aux: bool
    has_running: bool  # whether the objective gets its own last ``aux``
    returned: Literal["best", "last"] | None
    history: int  # number of points to record
    bound: int | None  # largest number of updates of a loop that reverse mode can go through
    reporter: Reporter | None  # whom to call from inside the loop


def run(
    fn: Callable[..., Any],
    tx: Method,
    options: Options,
    given: Given,
    params: tree.PyTree,
    running: tree.PyTree,
    arrays: list[Any],
    loop: Loop | None,
    limits: Limits,
) -> Solution:
    """Runs the loop until it has a status other than ``RUNNING``.

    ``arrays`` are those of ``fn`` and ``given``, see :mod:`gradxform.arguments`. Complex parameters
    arrive as real ones, see :mod:`gradxform.complex_leaves`.
    """
    fn, given = joined((fn, given), arrays)
    fn = of_real(fn) if has_parts(params) else fn
    tx = method_of(tx, given)
    state = tx.init(params) if loop is None else loop.state
    box = box_of(state, params)
    if box is not None and loop is None:
        params = project(box, params)
        state = tx.init(params)
    penalised = is_penalised(tx, params, state)
    problem = Problem(
        objective=objective(fn, given.args, options),
        tx=tx,
        stop=given.stop,
        limits=limits,
        box=box,
        is_frozen=jax.tree.unflatten(jax.tree.structure(params), frozen_leaves(tx, params, state)),
        penalised=penalised,
        keep_last=penalised if options.returned is None else jnp.array(options.returned == "last"),
    )
    if loop is None:
        loop = _first(problem, state, params, running, options)
    else:
        loop = _continued(problem, loop, options)
    status = _first_status(problem, loop)
    start = varying_like(loop._replace(status=status.astype(loop.status.dtype)), params)
    parts = (
        lambda loop: _reported(options.reporter, problem, loop, *look(problem, loop)),
        lambda loop, seen: move(problem, loop, seen),
        lambda loop: loop.status == RUNNING,
    )
    if options.bound is None:
        # for a cheap method one more update costs less than a branch in every turn
        loop = alternate(*parts, start, branch=is_costly(loop.state))
    else:
        loop = alternate_at_most(options.bound + 1, *parts, start)
    solution = _solution(loop, limits, box)
    if options.reporter is not None:
        tell(options.reporter, solution._replace(history=None, loop=None))
    return solution._replace(aux=loop.best.aux if options.has_aux else None)


def check_method(caller: str, tx: Any, bounds: Bounds | None) -> None:
    """Raises an error if ``tx`` is a method although there are bounds, or else is none."""
    is_method = hasattr(tx, "update")
    if bounds is None and not is_method:
        raise TypeError(
            f"{caller}(tx={shown(tx)}): expected a method, for instance gx.momentum(0.1); a "
            "function that makes one needs bounds=…"
        )
    if bounds is not None and is_method:
        raise ValueError(
            f"{caller}(bounds={shown(bounds)}): the method must know the bounds too: leave tx out, "
            "or pass a function that makes it, tx=lambda bounds: gx.trust_region(bounds=bounds)"
        )


def method_of(tx: Method, given: Given) -> optax.GradientTransformationExtraArgs:
    """The method, within the bounds if there are any."""
    made: Any = tx if given.bounds is None else cast(Any, tx)(given.bounds)
    return optax.with_extra_args_support(made)


def _solution(loop: Loop, limits: Limits, box: Box | None) -> Solution:
    return Solution(
        params=to_complex(loop.best.params),
        value=loop.best.value,
        grad_norm=loop.best.grad_norm,
        steps=loop.steps,
        evaluations=loop.evaluations + total(loop.state, "evaluations"),
        curvature_products=total(loop.state, "curvature_products"),
        status=_reason(loop, box),
        aux=None,
        tol=limits.tol(loop.first_value, loop.first_grad_norm),
        max_steps=limits.max_steps,
        history=in_order(loop.recorder) if isinstance(loop.recorder, Recorder) else None,
        loop=loop,
    )


def _reported(
    reporter: Reporter | None, problem: Problem, before: Loop, looked: Loop, seen: Seen
) -> tuple[Loop, Seen]:
    """Tells the user of the progress, who may stop the run."""
    if reporter is None:
        return looked, seen
    is_running = before.status == RUNNING  # in a batch the lanes that have ended go on in vain
    current = tree.select(is_running, looked, before)
    status = jnp.where(current.status == RUNNING, jnp.int32(Status.max_steps), current.status)
    solution = _solution(current._replace(status=status), problem.limits, problem.box)
    is_due = is_running & (looked.status == RUNNING) & (looked.steps % reporter.every == 0)
    due = is_due & (looked.steps > 0)
    stops = ask(reporter, due, solution._replace(history=None, loop=None))
    end = jnp.where(stops, jnp.int32(Status.stopped), looked.status)
    return looked._replace(status=jnp.where(looked.status == RUNNING, end, looked.status)), seen


def objective(fn: Callable[..., Any], args: Any, options: Options) -> Objective:
    """The objective as the loop evaluates it."""
    if not options.has_aux:
        value_fn = bind(with_arguments("minimize", fn, args), {}, "minimize: fn")
        return Objective(lambda params, running: (value_fn(params), ()), lambda running: value_fn)

    def evaluate(params: tree.PyTree, running: tree.PyTree) -> tuple[jax.Array, tree.PyTree]:
        before = (running,) if options.has_running else ()
        result = with_arguments("minimize", fn, args, before)(params)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ValueError(
                "minimize(has_aux=True): fn must return a pair of its value and anything else, got "
                f"{shown(result)}"
            )
        return check_value("minimize: fn", result[0]), jax.tree.map(jnp.asarray, result[1])

    return Objective(evaluate, lambda running: lambda params: evaluate(params, running)[0])


def _first(
    problem: Problem,
    state: optax.OptState,
    params: tree.PyTree,
    running: tree.PyTree,
    options: Options,
) -> Loop:
    """The state of the loop before the start is evaluated."""
    zero = jnp.zeros((), jnp.int32)
    none, infinite = scalar(0), scalar(jnp.inf)
    aux = _aux(problem, params, running, options)
    if options.has_running and (difference := leaves.difference(running, aux)) is not None:
        raise ValueError(
            f"minimize(aux=…): fn must return statistics like those that it gets: {difference}"
        )
    return Loop(
        params=params,
        state=state,
        value=infinite,
        grad_norm=infinite,
        best=Point(params, infinite, infinite, jax.tree.map(_zeros, aux)),
        first_value=infinite,
        first_grad_norm=infinite,
        extent=Extent(none, none, jnp.array(False)),
        lowest=infinite,
        running=running,
        step=_no_step(problem),
        recorder=_new_recorder(options),
        advanced=jnp.array(False),
        is_waiting=jnp.array(False),
        at_rest=zero,
        steps=zero,
        evaluations=zero,
        status=zero,
    )


def _aux(problem: Problem, params: tree.PyTree, running: tree.PyTree, options: Options) -> Any:
    """The shapes of the second part of the objective's result; () without one."""
    if not options.has_aux:  # not traced once more
        return ()
    return jax.eval_shape(problem.objective.evaluate, params, running)[1]


def _zeros(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def _continued(problem: Problem, loop: Loop, options: Options) -> Loop:
    """The state of the loop of an earlier call, with what this call asks for beside it."""
    if bool(jax.tree.leaves(loop.running)) != options.has_running:
        said = "without" if options.has_running else "with"
        raise ValueError(f"minimize(resume=…): the solution comes from a call {said} aux")
    aux = _aux(problem, loop.params, loop.running, options)
    if (difference := leaves.difference(loop.best.aux, aux)) is not None:
        raise ValueError(
            "minimize(resume=…): the second part of what fn returns differs from that of the "
            f"earlier call: {difference}; pass the same has_aux, and args of the same shapes"
        )
    step, recorder = loop.step, loop.recorder
    if problem.stop is None or not isinstance(step, Step):
        step = _no_step(problem)
    if not isinstance(recorder, Recorder) or recorder.rows.shape[0] != options.history:
        recorder = _new_recorder(options)
    return loop._replace(step=step, recorder=recorder)


def _no_step(problem: Problem) -> Step | tuple[()]:
    return () if problem.stop is None else Step(*(scalar(jnp.inf) for _ in range(3)))


def _new_recorder(options: Options) -> Recorder | tuple[()]:
    return new_recorder(options.history) if options.history else ()


def _first_status(problem: Problem, loop: Loop) -> jax.Array:
    """Running, or where a solve is resumed that these limits end already, how it ended."""
    tol = problem.limits.tol(loop.first_value, loop.first_grad_norm)
    low = (loop.best.grad_norm <= tol) & (problem.stop is None)
    is_over = (loop.status == Status.converged) & low
    ended = (loop.evaluations > 0) & (is_over | (loop.steps >= problem.limits.max_steps))
    changed = (loop.status == Status.converged) & ~low
    end = jnp.where(changed, jnp.int32(Status.max_steps), loop.status)
    return jnp.where(ended, end, jnp.int32(RUNNING))


def _reason(loop: Loop, box: Box | None) -> jax.Array:
    """Why the run ended. What only the end needs to know is not computed in every turn."""
    is_hidden = is_at_precision(
        loop.state,
        max(tree.spacings((loop.value, loop.params))),
        loop.best.value,
        loop.best.grad_norm,
        loop.first_grad_norm,
        scalar(tree.max_abs(loop.best.params)),
    )
    is_success = (loop.status == Status.stalled) & is_hidden
    status = jnp.where(is_success, jnp.int32(Status.at_precision), loop.status)
    if box is None:
        return status
    is_success |= status == Status.converged
    is_at_bound = tree.max_abs(sides(box, loop.best.params)) > 0
    return jnp.where(is_at_bound & is_success, jnp.int32(Status.at_bound), status)
