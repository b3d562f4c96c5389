"""``minimize``: run any method to the end, in one compiled loop."""

import functools
import sys
from collections.abc import Callable
from typing import Any, Literal, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradxform import leaves, tree
from gradxform.hyperparameters import Int32, NonNegative, PositiveInt, checked, shown
from gradxform.leaves import check_floating
from gradxform.loop import run
from gradxform.programs import program
from gradxform.second_order.bfgs import bfgs
from gradxform.second_order.lbfgs import lbfgs
from gradxform.sharding import is_sharded
from gradxform.solution import Solution, Status

DENSE_LIMIT = 128  #: parameters up to which ``minimize`` takes ``bfgs`` rather than ``lbfgs``


@checked
def minimize(
    fn: Callable[[tree.PyTree], Any],
    params: tree.PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    tol: NonNegative = 1e-6,
    max_steps: Int32 = 10_000,
    has_aux: bool = False,
    returned: Literal["best", "last"] | None = None,
    resume: Solution | None = None,
    progress: Callable[[Solution], None] | None = None,
    progress_every: PositiveInt = 100,
) -> Solution:
    """Minimises ``fn`` from ``params`` by the updates of ``tx``.

    Each step evaluates value and gradient once at the parameters in the loop and hands both, and
    ``fn`` itself, to ``tx.update``. It returns the best of the points evaluated: never one worse
    than the start, never a NaN when a finite one was seen. The loop can be jitted and vmapped; a
    lane that has stopped keeps its result.

    Some links of a chain change what is minimised: weight decay, or an L1 penalty. ``fn`` does not
    know the penalty, so it can tell neither the best point nor the end. ``minimize`` notices such
    a link, since it moves parameters of zero gradient towards zero. Then it returns the last point,
    and the run has converged when the parameters no longer move. Methods that search by values
    (line searches, trust regions) are not looked at: put penalties into ``fn`` for them.

    A method that evaluates nothing itself makes one more update than ``steps`` says, which waits in
    ``loop`` for ``resume``: leaving it out would take a branch in every turn.

    Leaves that the method never moves (``optax.set_to_zero`` in a partition) do not count towards
    the gradient's size. While a method waits, as ``accumulate`` does or a learning rate of 0, the
    run goes on.

    Called from Python, the loop is compiled once for each ``fn``, shapes of ``params`` and method.
    Building ``tx`` again with the same numbers does not compile again. A change in what ``fn`` or
    ``tx`` reads does: a global name, a closure variable, an attribute of an object, a class or a
    module, the content of a list or an array. Where ``minimize`` cannot know what they read, it
    compiles at every call: files, clocks, random generators, ``globals()``, a module passed around
    as a value, objects written in C, more than some thousands of values. Libraries such as JAX,
    NumPy and Optax count as constant. NumPy arrays are compared entry by entry at every call; JAX
    arrays cannot change, so large ones cost nothing.

    Programs and data are freed together with ``fn``, and at most 64 programs are kept. A ``lambda``
    written inside a loop is a new ``fn`` each time, so define ``fn`` before the loop.

    Args:
      fn: the objective, of the parameters alone, to one real number.
      params: where to start: a pytree of floating-point arrays or Python floats.
      tx: the method, with its learning rate; ``None`` for ``bfgs()`` up to 128 parameters and
        ``lbfgs()`` beyond, leaf by leaf where ``params`` are seen to be sharded.
      tol: stop when the largest absolute entry of the gradient is at most this; positive.
      max_steps: the most updates.
      has_aux: ``fn`` returns a pair, its value and anything else; that of the best point is
        returned as ``aux``.
      returned: ``"best"`` or ``"last"`` of the points evaluated; ``None`` chooses as said above.
      resume: the solution of an earlier call with the same ``fn`` and ``tx``. The run continues
        where that one stopped: of ``params`` only the structure, shapes and dtypes are used, not
        the values. ``max_steps`` counts from the first start.
      progress: called outside the compiled loop with the solution so far, after every
        ``progress_every`` steps; for instance ``print`` or ``gx.progress_bar()``.
      progress_every: how many.

    Returns:
      A :class:`Solution`. ``evaluations`` includes those a method makes inside its update
      (``coordinate_descent``, Optax's line searches).

    Raises:
      TypeError: an argument is of the wrong type, or a parameter is not real floating point.
      ValueError: ``tol`` is not positive, ``max_steps`` is negative, ``fn`` does not return one
        real number, or ``resume`` comes from another method or from parameters of other shapes.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: (x["a"] - 3) ** 2 + 10 * (x["b"] + 1) ** 2
    >>> start = {"a": 0.0, "b": 0.0}
    >>> solution = gx.minimize(bowl, start, gx.nesterov(0.03), tol=1e-4)
    >>> {name: round(float(x), 3) for name, x in solution.params.items()}
    {'a': 3.0, 'b': -1.0}
    >>> gx.Status(int(solution.status)).name
    'converged'
    """
    if isinstance(max_steps, float) and max_steps != int(max_steps):
        raise ValueError(f"minimize(max_steps={max_steps!r}): must be a whole number")
    if isinstance(tol, float | int) and tol == 0:
        raise ValueError("minimize(tol=0): tol must be positive, for instance 1e-6")
    check_floating(params, "minimize: params")
    params = jax.tree.map(_strong, params)
    if tx is None:
        whole = not any(is_sharded(p) for p in jax.tree.leaves(params))
        tx = _usual(tree.count(params) <= DENSE_LIMIT, whole)
    if resume is not None:
        _check_resume(resume, tx, params)
    # JAX cannot look up a compiled loop by parameters whose nodes hold arrays
    found = _is_comparable(jax.tree.structure(params))
    solve = functools.partial(
        program(run, fn, tx, has_aux, returned)
        if found
        else functools.partial(run, fn, tx, has_aux, returned),
        params,
    )

    loop = None if resume is None else resume.loop
    bound, limit = _number(tol, jax.dtypes.canonicalize_dtype(float)), _number(max_steps, jnp.int32)
    if progress is None:
        return solve(loop, bound, limit)
    if any(isinstance(x, Tracer) for x in (*jax.tree.leaves(params), bound, limit)):
        raise ValueError(
            f"minimize(progress={progress!r}): leave it out under jax.jit and jax.vmap"
        )
    steps = 0 if loop is None else int(loop.steps)
    while True:
        steps = min(steps + progress_every, int(limit))
        solution = solve(loop, bound, np.int32(steps))._replace(max_steps=limit)
        progress(solution)
        if solution.status != Status.max_steps or solution.steps >= limit:
            return solution
        loop = solution.loop


@checked
def progress_bar(width: PositiveInt = 30, file: TextIO | None = None) -> Callable[[Solution], None]:
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


@functools.cache
def _usual(dense: bool, ravel: bool) -> optax.GradientTransformationExtraArgs:
    return bfgs(ravel=ravel) if dense else lbfgs(ravel=ravel)


def _strong(param: jax.typing.ArrayLike) -> jax.Array:
    """As an array of a dtype of its own, not one that gives way to others."""
    if isinstance(param, jax.Array) and not param.weak_type:
        return param
    return jnp.asarray(param, dtype=jnp.result_type(param))


def _number(value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> Any:
    """A number for a compiled program, which takes NumPy's faster than it would be converted."""
    return value.astype(dtype) if isinstance(value, jax.Array) else np.asarray(value, dtype)


def _check_resume(resume: Any, tx: optax.GradientTransformation, params: tree.PyTree) -> None:
    """Raises an error that says how ``resume`` is not from a call with this ``tx`` and start."""
    if not isinstance(resume, Solution):
        raise TypeError(f"minimize(resume={shown(resume)}): expected a Solution of minimize")
    if jnp.ndim(resume.status):
        raise ValueError(
            f"minimize(resume=…): it holds {jnp.size(resume.status)} solves of a jax.vmap: map "
            "minimize over them, or take one by jax.tree.map(lambda x: x[0], solution)"
        )
    state = jax.eval_shape(lambda: tx.init(params))
    for name, old, new in (
        ("params", resume.loop.params, params),
        ("tx", resume.loop.state, state),
    ):
        if (difference := leaves.difference(old, new)) is not None:
            raise ValueError(
                f"minimize(resume=…): it comes from other {name}: {difference}; give the tx of "
                "that call and a start of the same structure, shapes and dtypes"
            )


def _is_comparable(structure: Any) -> bool:
    """Whether JAX can look a compiled loop up by this tree: not where a node holds arrays."""
    data = structure.node_data()
    try:
        equal = data is None or bool(data[1] == data[1])
    except Exception:  # as many kinds as there are classes of nodes
        return False
    return equal and all(_is_comparable(child) for child in structure.children())
