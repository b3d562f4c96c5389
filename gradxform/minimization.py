"""``minimize``: run any method to the end, in one compiled loop."""

import dataclasses
import enum
import functools
import math
import sys
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradxform import tree
from gradxform.configuration import configuration_key
from gradxform.hyperparameters import Scalar, check, scalar
from gradxform.protocol import bind
from gradxform.second_order.quasi_newton import bfgs, lbfgs

DENSE_LIMIT = 128  #: parameters up to which ``minimize`` takes ``bfgs`` rather than ``lbfgs``


class Status(enum.IntEnum):
    """Why :func:`minimize` stopped."""

    converged = 0  #: the largest absolute gradient entry is at most ``tol``
    max_steps = 1  #: ``max_steps`` updates were made
    stalled = 2  #: a search failed, or the updates no longer move the parameters
    non_finite = 3  #: the value or the gradient is NaN or infinite, and the method has no remedy


_IN_WORDS = {
    Status.converged: "converged: the gradient is small enough",
    Status.max_steps: "stopped at max_steps",
    Status.stalled: "stalled: no step descends any further",
    Status.non_finite: "stopped at a value or gradient that is not finite",
}


class _Point(NamedTuple):
    params: tree.PyTree
    value: jax.Array
    grad_norm: jax.Array


class _Loop(NamedTuple):
    params: tree.PyTree  # where to evaluate next
    state: optax.OptState
    value: jax.Array  # of the last point
    grad_norm: jax.Array
    best: _Point
    start_value: jax.Array
    lowest: jax.Array  # value seen
    at_rest: jax.Array  # evaluations in a row that were at one point
    steps: jax.Array
    evaluations: jax.Array
    status: jax.Array


class Solution(NamedTuple):
    """What :func:`minimize` found, in arrays. ``print`` shows a report."""

    params: tree.PyTree  #: the best point seen
    value: jax.Array  #: the objective there
    grad_norm: jax.Array  #: the largest absolute entry of the gradient there
    steps: jax.Array  #: updates made
    evaluations: jax.Array  #: value-and-gradient evaluations
    curvature_products: jax.Array  #: Hessian-vector products
    status: jax.Array  #: a :class:`Status`
    aux: tree.PyTree  #: what the objective returned beside its value there, with ``has_aux``
    tol: jax.Array  #: the bound of ``grad_norm``
    max_steps: jax.Array  #: the bound of ``steps``
    loop: Any  #: where the loop stood, for ``resume``

    def __str__(self) -> str:
        lanes = np.asarray(self.status)
        if lanes.ndim:
            counts = (f"{np.sum(lanes == s)} {s.name}" for s in Status if np.any(lanes == s))
            return f"{lanes.size} solves: {', '.join(counts)}"
        rows = (
            ("value", f"{float(self.value):.6g}", ""),
            ("gradient, largest entry", f"{float(self.grad_norm):.2e}", f"{float(self.tol):.2e}"),
            ("steps", f"{int(self.steps)}", f"{int(self.max_steps)}"),
            ("evaluations", f"{int(self.evaluations)}", ""),
            ("curvature products", f"{int(self.curvature_products)}", ""),
        )
        lines = [_IN_WORDS[Status(int(lanes))]]
        lines += [
            f"  {name:24}{value:>14}" + (f"   (at most {bound})" if bound else "")
            for name, value, bound in rows
        ]
        return "\n".join(lines)


def minimize(
    fn: Callable[[tree.PyTree], Any],
    params: tree.PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    tol: Scalar = 1e-6,
    max_steps: int | jax.Array = 10_000,
    has_aux: bool = False,
    resume: Solution | None = None,
    progress: Callable[[Solution], None] | None = None,
    progress_every: int = 100,
) -> Solution:
    """Minimises ``fn`` from ``params`` by the updates of ``tx``.

    Each step evaluates value and gradient once at the parameters in the loop and hands both, and
    ``fn`` itself, to ``tx.update``. The best of the points evaluated is returned: never one worse
    than the start, never a NaN when a finite one was seen. The loop can be jitted and vmapped; a
    lane that has stopped keeps its result. Called from Python it is compiled once for each ``fn``,
    shapes of ``params`` and configuration of ``tx``: building an equally configured ``tx`` anew
    does not compile again. What ``fn`` reads from outside its argument is read when it is compiled,
    as under ``jax.jit``.

    Args:
      fn: the objective, of the parameters alone, to one real number.
      params: where to start: a pytree of floating-point arrays or Python floats.
      tx: the method, with its learning rate; ``None`` for ``bfgs()`` up to 128 parameters and
        ``lbfgs()`` beyond, leaf by leaf where ``params`` are seen to be sharded.
      tol: stop when the largest absolute entry of the gradient is at most this; positive.
      max_steps: the most updates.
      has_aux: ``fn`` returns a pair, its value and anything else; that of the best point is
        returned as ``aux``.
      resume: the solution of an earlier call with the same ``fn`` and ``tx``, to go on from there;
        ``max_steps`` counts from the first start.
      progress: called outside the compiled loop with the solution so far, after every
        ``progress_every`` steps; for instance ``print`` or ``gx.progress_bar()``.
      progress_every: how many.

    Returns:
      A :class:`Solution`. ``evaluations`` includes those a method makes inside its update
      (``coordinate_descent``, Optax's line searches).

    Raises:
      TypeError: a parameter is not real floating point.
      ValueError: ``tol`` is not positive, ``max_steps`` is negative, or ``fn`` does not return one
        real number.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: (x["a"] - 3) ** 2 + 10 * (x["b"] + 1) ** 2
    >>> start = {"a": 0.0, "b": 0.0}
    >>> solution = gx.minimize(bowl, start, gx.nesterov(0.03), tol=1e-4)
    >>> {name: round(float(x), 3) for name, x in solution.params.items()}
    {'a': 3.0, 'b': -1.0}
    >>> gx.Status(int(solution.status)).name
    'converged'
    """
    check("minimize", tol=(tol, 0, math.inf), max_steps=(max_steps, 0, 2**31))
    check("minimize", progress_every=(progress_every, 1, math.inf))
    if isinstance(max_steps, float) and max_steps != int(max_steps):
        raise ValueError(f"minimize(max_steps={max_steps!r}): must be a whole number")
    if isinstance(tol, float | int) and tol == 0:
        raise ValueError("minimize(tol=0): tol must be positive, for instance 1e-6")
    if tx is not None and not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"minimize(tx={tx!r}): expected a method, for instance gx.momentum(0.1)")
    tree.check_floating(params)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype=jnp.result_type(p)), params)
    if tx is None:
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        ravel = not any(tree.is_sharded(p) for p in jax.tree.leaves(params))
        tx = bfgs(ravel=ravel) if size <= DENSE_LIMIT else lbfgs(ravel=ravel)
    key = configuration_key(tx)
    recognised = key is not None and _is_hashable(fn)
    run = _compiled_run if recognised else _run
    solve = functools.partial(run, fn, _Method(key, tx), has_aux, params)

    loop = None if resume is None else resume.loop
    bound, limit = scalar(tol), jnp.asarray(max_steps, jnp.int32)
    if progress is None:
        return solve(loop, bound, limit)
    if any(isinstance(x, Tracer) for x in (*jax.tree.leaves(params), bound, limit)):
        raise ValueError(
            f"minimize(progress={progress!r}): leave it out under jax.jit and jax.vmap"
        )
    steps = 0 if loop is None else int(loop.steps)
    while True:
        steps = min(steps + progress_every, int(limit))
        solution = solve(loop, bound, jnp.asarray(steps, jnp.int32))._replace(max_steps=limit)
        progress(solution)
        if solution.status != Status.max_steps or solution.steps >= limit:
            return solution
        loop = solution.loop


def progress_bar(width: int = 30, file: TextIO | None = None) -> Callable[[Solution], None]:
    """A bar of the steps made, for :func:`minimize`'s ``progress``.

    Args:
      width: of the bar, in characters.
      file: where the line is redrawn; ``None`` for the standard error stream.

    >>> import sys, jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: jnp.sum((x - 1) ** 2)
    >>> bar = gx.progress_bar(10, sys.stdout)
    >>> _ = gx.minimize(bowl, jnp.zeros(2), gx.sgd(0.5), progress=bar, max_steps=200)
    ██████████ 1/200 steps, value 0, gradient 0.0e+00, converged
    """

    def show(solution: Solution) -> None:
        out = sys.stderr if file is None else file
        steps, most = int(solution.steps), int(solution.max_steps)
        status = Status(int(solution.status))
        ended = status != Status.max_steps or steps >= most
        filled = width if ended else width * steps // most
        out.write(
            f"\r{'█' * filled:·<{width}} {steps}/{most} steps, value {float(solution.value):.3g}, "
            f"gradient {float(solution.grad_norm):.1e}"
        )
        out.write(f", {status.name}\n" if ended else "")
        out.flush()

    return show


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method that equals, as an argument of ``jax.jit``, every equally configured one."""

    key: Hashable
    tx: optax.GradientTransformation = dataclasses.field(compare=False)


_RUNNING = -1
_PATIENCE = 100  # evaluations at one point, and two more for each parameter, until it has stalled


def _is_hashable(fn: Any) -> bool:
    try:
        hash(fn)
    except TypeError:
        return False
    return True


def _run(
    fn: Callable[[tree.PyTree], Any],
    method: _Method,
    has_aux: bool,
    params: tree.PyTree,
    loop: _Loop | None,
    tol: jax.Array,
    max_steps: jax.Array,
) -> Solution:
    tx = optax.with_extra_args_support(method.tx)
    patience = _PATIENCE + 2 * sum(leaf.size for leaf in jax.tree.leaves(params))

    value_fn = bind((lambda params: fn(params)[0]) if has_aux else fn, {}, "fn")

    def body(loop: _Loop) -> _Loop:
        value, grads = jax.value_and_grad(value_fn)(loop.params)
        here = _Point(loop.params, scalar(value), scalar(tree.max_abs(grads)))
        finite = jnp.isfinite(here.value) & jnp.isfinite(here.grad_norm)
        first = loop.evaluations == 0
        # a method that counts such points in its state has stepped back from them
        lost = ~finite & (first | (not _reported(loop.state, "non_finite")))

        # of points whose values differ by rounding alone, the one with the smaller gradient is best
        start_value = jnp.where(first, here.value, loop.start_value)
        noise = 4 * jnp.finfo(value.dtype).eps * jnp.abs(loop.lowest)
        best_so_far = finite & (here.value <= jnp.minimum(loop.lowest + noise, start_value))
        better = best_so_far & (
            (here.value < loop.lowest) | (here.grad_norm <= loop.best.grad_norm)
        )
        best = tree.select(first | better, here, loop.best)

        small = here.grad_norm <= tol
        unmoved = (here.value == loop.value) & (here.grad_norm == loop.grad_norm)
        at_rest = jnp.where(unmoved, loop.at_rest + 1, 0)
        status = jnp.select(
            [lost, small & best_so_far, at_rest >= patience, loop.steps >= max_steps],
            [Status.non_finite, Status.converged, Status.stalled, Status.max_steps],
            _RUNNING,
        ).astype(jnp.int32)

        def step() -> tuple[tree.PyTree, optax.OptState]:
            updates, state = tx.update(
                grads, loop.state, loop.params, value=value, grad=grads, value_fn=value_fn
            )
            return optax.apply_updates(loop.params, updates), state

        running = status == _RUNNING
        params, state = jax.lax.cond(running, step, lambda: (loop.params, loop.state))
        stalled = running & (_total(state, "stalled") > 0)
        return _Loop(
            params,
            state,
            here.value,
            here.grad_norm,
            best,
            start_value,
            jnp.where(finite, jnp.minimum(loop.lowest, here.value), loop.lowest),
            at_rest,
            loop.steps + running.astype(jnp.int32),
            # Optax's line searches report the evaluations of each update, not their sum
            loop.evaluations
            + 1
            + running.astype(jnp.int32) * _total(state, "num_linesearch_steps"),
            jnp.where(stalled, Status.stalled, status).astype(jnp.int32),
        )

    if loop is None:
        zero = jnp.zeros((), jnp.int32)
        infinite = scalar(jnp.inf)
        loop = _Loop(
            params=params,
            state=tx.init(params),
            value=infinite,
            grad_norm=infinite,
            best=_Point(params, infinite, infinite),
            start_value=infinite,
            lowest=infinite,
            at_rest=zero,
            steps=zero,
            evaluations=zero,
            status=zero,
        )
    loop = loop._replace(status=jnp.full_like(loop.status, _RUNNING))
    start = tree.varying_like(loop, params)
    loop = jax.lax.while_loop(lambda loop: loop.status == _RUNNING, body, start)
    return Solution(
        *loop.best,
        loop.steps,
        loop.evaluations + _total(loop.state, "evaluations"),
        _total(loop.state, "curvature_products"),
        loop.status,
        fn(loop.best.params)[1] if has_aux else None,
        tol,
        max_steps,
        loop,
    )


_compiled_run = jax.jit(_run, static_argnums=(0, 1, 2))


def _reported(state: optax.OptState, name: str) -> list[jax.Array]:
    """The diagnostics of this name in the ``info`` of whatever methods the state belongs to."""
    return [x for _, x in optax.tree.get_all_with_path(state, name)]


def _total(state: optax.OptState, name: str) -> jax.Array:
    """The sum of the counters of this name."""
    counts = (jnp.asarray(x, jnp.int32) for x in _reported(state, name))
    return sum(counts, start=jnp.zeros((), jnp.int32))
