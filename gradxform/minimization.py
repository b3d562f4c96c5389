"""``minimize``: run any method to the end, in one compiled loop."""

import dataclasses
import enum
import functools
import math
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import tree
from gradxform.hyperparameters import Scalar, check, scalar
from gradxform.protocol import check_value


class Status(enum.IntEnum):
    """Why :func:`minimize` stopped."""

    converged = 0  #: the largest absolute gradient entry is at most ``tol``
    max_steps = 1  #: ``max_steps`` updates were made
    stalled = 2  #: settled at a stationary point worse than the best point seen
    non_finite = 3  #: the value or the gradient became NaN or infinite


class Solution(NamedTuple):
    """What :func:`minimize` found, in arrays."""

    params: tree.PyTree  #: the best point seen
    value: jax.Array  #: the objective there
    grad_norm: jax.Array  #: the largest absolute entry of the gradient there
    steps: jax.Array  #: updates made
    evaluations: jax.Array  #: value-and-gradient evaluations
    curvature_products: jax.Array  #: Hessian-vector products
    status: jax.Array  #: a :class:`Status`


def minimize(
    fn: Callable[[tree.PyTree], jax.typing.ArrayLike],
    params: tree.PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    tol: Scalar = 1e-6,
    max_steps: int | jax.Array = 10_000,
) -> Solution:
    """Minimises ``fn`` from ``params`` by the updates of ``tx``.

    Each step evaluates value and gradient once at the parameters in the loop and hands both, and
    ``fn`` itself, to ``tx.update``. The best of the points evaluated is returned: never one worse
    than the start, never a NaN when a finite one was seen. The loop can be jitted and vmapped; a
    lane that has stopped keeps its result. Called from Python it is compiled once for each ``fn``,
    shapes of ``params`` and configuration of ``tx``: building an equally configured ``tx`` anew
    does not compile again.

    Args:
      fn: the objective, of the parameters alone, to one real number.
      params: where to start: a pytree of floating-point arrays or Python floats.
      tx: the method, with its learning rate; ``None`` for ``optax.lbfgs()``.
      tol: stop when the largest absolute entry of the gradient is at most this; positive.
      max_steps: the most updates.

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
    if isinstance(tol, float | int) and tol == 0:
        raise ValueError("minimize(tol=0): tol must be positive, for instance 1e-6")
    if tx is not None and not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"minimize(tx={tx!r}): expected a method, for instance gx.momentum(0.1)")
    tree.check_floating(params)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype=jnp.result_type(p)), params)
    arguments = (params, scalar(tol), jnp.asarray(max_steps, jnp.int32))
    tx = optax.lbfgs() if tx is None else tx
    key = _configuration(tx)
    if key is None or not isinstance(fn, Hashable):
        return _minimize(fn, _Method(key, tx), *arguments)
    return _compiled_minimize(fn, _Method(key, tx), *arguments)


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method that equals, as an argument of ``jax.jit``, every equally configured one."""

    key: Hashable
    tx: optax.GradientTransformation = dataclasses.field(compare=False)


class _Point(NamedTuple):
    params: tree.PyTree
    value: jax.Array
    grad_norm: jax.Array


class _Loop(NamedTuple):
    params: tree.PyTree  # where to evaluate next
    state: optax.OptState
    last: _Point
    best: _Point
    steps: jax.Array
    evaluations: jax.Array
    status: jax.Array


_RUNNING = -1


def _minimize(
    fn: Callable[[tree.PyTree], jax.typing.ArrayLike],
    method: _Method,
    params: tree.PyTree,
    tol: jax.Array,
    max_steps: jax.Array,
) -> Solution:
    tx = optax.with_extra_args_support(method.tx)

    def value_fn(params: tree.PyTree) -> jax.Array:
        return check_value("fn", fn(params))

    def body(loop: _Loop) -> _Loop:
        value, grads = jax.value_and_grad(value_fn)(loop.params)
        here = _Point(loop.params, scalar(value), scalar(tree.max_abs(grads)))
        finite = jnp.isfinite(here.value) & jnp.isfinite(here.grad_norm)
        first = loop.evaluations == 0

        # Values that differ by rounding alone count as equal, and the newer point is the better.
        noise = 4 * jnp.finfo(value.dtype).eps * jnp.abs(loop.best.value)
        best_so_far = finite & (here.value <= loop.best.value + noise)
        small = here.grad_norm <= tol
        at_rest = (here.value == loop.last.value) & (here.grad_norm == loop.last.grad_norm)
        better = finite & (
            (here.value <= loop.best.value)
            | (best_so_far & (here.grad_norm <= loop.best.grad_norm))
        )
        best = _select(first | better, here, loop.best)
        status = jnp.select(
            [~finite, small & best_so_far, small & at_rest, loop.steps >= max_steps],
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
        return _Loop(
            params,
            state,
            here,
            best,
            loop.steps + running.astype(jnp.int32),
            # Optax's line searches report the evaluations of each update, not their sum
            loop.evaluations + 1 + running * _counted(state, "num_linesearch_steps"),
            status,
        )

    zero = jnp.zeros((), jnp.int32)
    start = _Point(params, scalar(jnp.inf), scalar(jnp.inf))
    loop = _Loop(params, tx.init(params), start, start, zero, zero, zero + _RUNNING)
    loop = jax.lax.while_loop(lambda loop: loop.status == _RUNNING, body, loop)
    return Solution(
        loop.best.params,
        loop.best.value,
        loop.best.grad_norm,
        loop.steps,
        loop.evaluations + _counted(loop.state, "evaluations"),
        _counted(loop.state, "curvature_products"),
        loop.status,
    )


_compiled_minimize = jax.jit(_minimize, static_argnums=(0, 1))


def _select(condition: jax.Array, new: tree.PyTree, old: tree.PyTree) -> tree.PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _counted(state: optax.OptState, name: str) -> jax.Array:
    """The sum of the counters of this name that the states of a method keep in their ``info``."""
    found = [count for _, count in optax.tree.get_all_with_path(state, name)]
    return sum(found, start=jnp.zeros((), jnp.int32))


def _configuration(method: Any) -> Hashable | None:
    """A key that equally configured methods share; None for what cannot be recognised again.

    A method is a pair of closures: it is told by its code and by what the code closes over. A
    traced hyperparameter cannot be told, and whoever traces it compiles the loop.
    """

    def walk(value: Any, above: tuple[int, ...]) -> Hashable:
        if id(value) in above:
            return "recursive"
        above = (*above, id(value))

        def parts(*values: Any) -> tuple[Hashable, ...]:
            return tuple(walk(x, above) for x in values)

        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            defaults = (value.__defaults__, value.__kwdefaults__)
            return (value.__code__, id(value.__globals__), *parts(cells, *defaults))
        if isinstance(value, functools.partial):
            return parts("partial", value.func, value.args, value.keywords)
        if isinstance(value, tuple | list):
            return (type(value), *parts(*value))
        if isinstance(value, dict):
            return (dict, *parts(*value.keys()), *parts(*value.values()))
        if isinstance(value, np.ndarray | jax.Array):
            array = np.asarray(value)
            return (type(value), array.dtype, array.shape, array.tobytes())
        if isinstance(value, float):
            return value.hex()
        hash(value)
        return (type(value), value)

    try:
        return walk(method, ())
    except (jax.errors.TracerArrayConversionError, TypeError, ValueError):
        return None
