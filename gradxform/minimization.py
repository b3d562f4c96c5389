"""``minimize``: runs any method until it converges, in one compiled loop."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import leaves, tree
from gradxform.arguments import split
from gradxform.bounds import Bounds, box, check_bounds
from gradxform.complex_leaves import to_complex, to_real
from gradxform.configuration import constant
from gradxform.endings import Limits
from gradxform.hyperparameters import Int32, Length, NonNegative, PositiveInt, checked, shown
from gradxform.implicit import is_transformed, with_derivative
from gradxform.leaves import check_floating, is_usual
from gradxform.loop import Given, Method, Options, check_method, method_of, run
from gradxform.programs import is_comparable, program
from gradxform.reporting import Reporter, says_stop
from gradxform.second_order.bfgs import bfgs
from gradxform.second_order.lbfgs import lbfgs
from gradxform.sharding import is_sharded
from gradxform.solution import Solution, Status
from gradxform.stopping import Progress

# unlike infinity it does not alarm JAX's debugging modes
_NO_BOUND = float(np.finfo(np.float32).max)
DENSE_LIMIT = 128  #: ``minimize`` takes ``bfgs`` for up to this many parameters, then ``lbfgs``


@checked
def minimize(
    fn: Callable[..., Any],
    params: tree.PyTree,
    tx: optax.GradientTransformation | Callable[[Any], Any] | None = None,
    *,
    args: tuple[Any, ...] | list[Any] | Mapping[str, Any] = (),
    bounds: Bounds | None = None,
    tol: NonNegative | None = None,
    stop: Callable[[Progress], Any] | None = None,
    max_steps: Int32 = 10_000,
    has_aux: bool = False,
    aux: Any = None,
    history: Length = 0,
    returned: Literal["best", "last"] | None = None,
    derivative: Literal["implicit", "implicit_always", "unrolled"] | None = "implicit",
    resume: Solution | None = None,
    progress: Callable[[Solution], Any] | None = None,
    progress_every: PositiveInt = 100,
) -> Solution:
    """Minimises ``fn``, starting from ``params``, with the method ``tx``.

    Each step evaluates the value and the gradient once and passes both, and ``fn`` itself, to
    ``tx.update``. The solution is the best point evaluated: it is never worse than the start, and
    never NaN if a finite value was seen. The loop works under ``jax.jit`` and ``jax.vmap``; a lane
    that has stopped keeps its result.

    **Penalties in the method.** Weight decay and an L1 penalty in ``tx`` change what is minimised.
    ``fn`` does not contain the penalty, so its values cannot tell the best point. ``minimize``
    detects such a method because it moves parameters of zero gradient towards zero. Then it returns
    the last point, and it stops when the parameters no longer change. It does not check methods
    that compare values (line searches, trust regions); put the penalty into ``fn`` for them.

    With :func:`gradxform.proximal` and :func:`gradxform.projected` it returns the last point too.
    It adds the subgradient that they have found to the gradient, so ``tol`` and ``grad_norm``
    belong to objective and penalty together.

    **Success.** ``solution.converged`` is True for three statuses. ``converged`` means that the
    gradient is small enough, or that the stop rule says so. ``at_precision`` means that rounding
    hides any further decrease, as often in float32 before the gradient falls below ``tol``.
    ``at_bound`` is either of them, with a parameter at one of its bounds.

    **Bounds.** ``fn`` is never evaluated outside ``bounds``. Where −g points out of a bound that
    holds a parameter, that gradient entry does not count in ``tol`` and ``grad_norm``.

    **Frozen and waiting parameters.** Leaves that the method never moves (``optax.set_to_zero`` in
    a partition) do not count in the size of the gradient. While a method waits (``accumulate``, or
    a learning rate of 0), the run continues. A method that evaluates nothing itself makes one more
    update than ``steps`` says. It is stored in ``loop`` for ``resume``; leaving it out would cost a
    branch in every step.

    **Derivatives.** ``params``, ``value`` and ``aux`` of the solution can be differentiated in
    ``args`` and in arrays that ``fn`` closes over, in forward and reverse mode, and twice. With
    ``derivative="implicit"`` the solution moves as the implicit function theorem says::

        H dx = −dg,    H the Hessian at the solution, dg the change of the gradient there

    The start and ``tx`` have no influence, and all else in the solution is a constant. MINRES
    solves the system from products with H, so ``fn`` cannot use ``jax.custom_vjp``. If H is
    singular, dx is the solution of least norm; eigenvalues below rounding count as zero. If H is
    indefinite, as at a saddle, the formula holds as it is. The derivative is NaN if the run has not
    converged, if ``tx`` contains a penalty, or if the linear system cannot be solved.

    **Complex parameters.** A complex parameter x + iy counts as two real ones, x and y, whatever
    the method. ``fn`` gets it as a complex number and returns a real one. ``Solution.params`` is
    complex like the start. ``minimize`` computes the gradient itself, so there is nothing to
    conjugate. Adam and its relatives scale x and y separately here; in your own loop they scale
    both by the size of the complex gradient, as in Optax.

    **Compilation.** Called from Python, the loop is compiled once for each ``fn``, method and shape
    of ``params``. A new ``tx`` with the same numbers does not compile again. A change in what
    ``fn`` or ``tx`` reads does: a global name, a closure variable, an attribute, the content of a
    list or a NumPy array. If ``minimize`` cannot see what they read, it compiles at every call:
    files, clocks, random generators, ``globals()``, a module passed as a value, objects written in
    C, or thousands of values. JAX, NumPy, Optax and other known libraries count as constant. NumPy
    arrays are compared at every call. JAX arrays cannot change, so large ones cost nothing.

    At most 64 programs are kept, and each is freed together with its ``fn``. A ``lambda`` inside a
    loop is a new ``fn`` each time, so define ``fn`` before the loop and pass data as ``args``. If
    ``fn`` is a pytree, such as a ``jax.tree_util.Partial``, an Equinox module or the result of
    :func:`gradxform.compose`, its arrays are data too: other arrays of the same shapes do not
    compile again.

    Args:
      fn: the objective: a function of the parameters, and of ``args``, that returns one real
        number.
      params: the start: a pytree of floating-point or complex arrays or Python numbers.
      tx: the method, with its learning rate. ``None`` takes ``bfgs()`` for up to 128 parameters and
        ``lbfgs()`` for more, or with bounds, with ``ravel=False`` if ``params`` are sharded. With
        bounds it is a function of them that makes the method, for instance
        ``lambda bounds: gx.trust_region(bounds=bounds)``.
      args: further arguments of ``fn``: a tuple for ``fn(params, *args)``, or a dictionary for
        ``fn(params, **args)`` and for the data of :func:`gradxform.compose`. Arrays and floats in
        it are inputs of the compiled loop: new ones of the same shapes and dtypes do not compile
        again. Other values, such as integers and strings, are compiled in.
      bounds: a pair ``(low, high)``, each a pytree like ``params`` or a prefix of it; ``None`` or
        ±inf in place of a number means no bound. Numbers and arrays in it are inputs of the
        compiled loop, like those of ``args``. A start outside is moved to the closest point inside.
      tol: stop when the largest absolute entry of the gradient is at most ``tol`` > 0. ``None``
        takes 1e-6, and less if value and gradient at the start are both below 1: then 1e-6 times
        the larger one.
      stop: a stop rule in place of ``tol``, such as ``gx.small_change(1e-8)`` or
        ``gx.small_gradient(rtol=1e-4) | gx.max_evaluations(500)``, or a function of the
        :class:`gradxform.Progress` that returns one boolean.
      max_steps: largest number of updates.
      has_aux: if True, ``fn`` returns a pair of its value and arrays. The second part at the best
        point is returned as ``aux``.
      aux: with ``has_aux``, the start of running statistics, such as those of batch normalisation.
        ``fn`` is then called as ``fn(params, aux, *args)``, with the second part that it returned
        at the last accepted point.
      history: number of accepted points of which value, gradient and evaluations are returned, the
        last ones; 0 for none. They are recorded on the device.
      returned: ``"best"`` or ``"last"``, the point to return; ``None`` chooses as described above.
      derivative: ``"implicit"`` as described above; ``"implicit_always"`` for the same formula also
        where the run has not converged; ``"unrolled"`` for the derivative of the steps, which are
        then at most ``max_steps``, a Python integer; ``None`` to forbid derivatives.
      resume: the solution of an earlier call with the same ``fn`` and ``tx``. The run continues
        where that call stopped. Only the structure, shapes and dtypes of ``params`` are used, not
        the values. ``max_steps`` counts from the first start.
      progress: a function of the solution so far, called every ``progress_every`` steps and at the
        end; for instance ``print`` or ``gx.progress_bar()``. If it returns True the run stops, and
        the solution so far is returned, with status ``stopped``. Under ``jax.jit`` and ``jax.vmap``
        it is called from inside the loop, once for all lanes, with arrays over the lanes.
      progress_every: steps between calls of ``progress``.

    Returns:
      A :class:`Solution`. Its ``evaluations`` include those that a method makes inside ``update``
      (``coordinate_descent``, Optax's line searches).

    Raises:
      TypeError: an argument is of the wrong type, ``fn`` does not take ``args``, a stop rule does
        not return one boolean, or a parameter is neither floating-point nor complex.
      ValueError: ``tol`` is not positive or is given together with ``stop``, ``max_steps`` is
        negative (or an array, with ``derivative="unrolled"``), ``fn`` does not return one real
        number, ``resume`` comes from another method or from parameters of other shapes, or a
        solution is differentiated that has ``derivative=None``.

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
        raise ValueError(f"minimize(max_steps={max_steps!r}): max_steps must be an integer")
    if aux is not None and not has_aux:
        raise ValueError(f"minimize(aux={shown(aux)}): pass has_aux=True too")
    params = _real_and_strong(params)
    given = Given(args, stop, bounds)
    method: Method = _default_method(params, bounds is not None) if tx is None else tx
    _check_bounds(method, bounds, params)
    if resume is not None:
        _check_resume(resume, method_of(method, given), params)
    limits = _limits(tol, stop, max_steps)
    fixed_fn, arrays_of_fn = split(fn, floats=False)
    fixed, arrays = split(given)
    arrays = [*arrays_of_fn, *arrays]
    running = () if aux is None else jax.tree.map(_strong, aux)
    reporter = Reporter(progress, progress_every) if progress and is_transformed() else None
    bound = _bound(max_steps) if derivative == "unrolled" else None
    options = _options(has_aux, aux is not None, returned, history, bound)
    if reporter is not None:
        options = options._replace(reporter=reporter)
    # JAX cannot find a compiled loop if a pytree node of the parameters holds arrays as metadata
    can_find = is_comparable(jax.tree.structure(params)) and reporter is None
    loop_of = program if can_find else functools.partial
    statics = (fixed_fn, method, options, fixed)
    run_loop = loop_of(run, *statics)
    solve = functools.partial(_solve, run_loop)
    if derivative != "unrolled":
        solve = functools.partial(with_derivative, derivative, solve, *statics)
    solve = functools.partial(solve, params, running, arrays)

    loop = None if resume is None else resume.loop
    if progress is None or reporter is not None:
        return solve(loop, limits)
    return _in_parts(solve, loop, limits, Reporter(progress, progress_every))


def _limits(tol: Any, stop: Any, max_steps: Any) -> Limits:
    """The numbers that end a run. Without ``tol`` it follows the scale of the problem."""
    if tol is not None and stop is not None:
        raise ValueError(
            f"minimize(tol={shown(tol)}): a stop rule takes the place of tol; pass "
            "stop=gx.small_gradient(tol) | …"
        )
    if isinstance(tol, float | int) and tol == 0:
        raise ValueError("minimize(tol=0): tol must be positive, for instance 1e-6")
    atol, rtol = (1e-6, 1e-6) if tol is None else (tol, _NO_BOUND)
    if stop is not None:
        atol = rtol = _NO_BOUND
    real = jax.dtypes.canonicalize_dtype(float)
    is_fixed = isinstance(atol, float) and isinstance(max_steps, int)
    return (_fixed_limits if is_fixed else _as_limits)(atol, rtol, max_steps, real)


def _as_limits(atol: Any, rtol: Any, max_steps: Any, real: np.dtype) -> Limits:
    return Limits(_number(atol, real), _number(rtol, real), _number(max_steps, np.int32))


_fixed_limits = functools.lru_cache(maxsize=64)(_as_limits)


def _in_parts(
    solve: Callable[[Any, Limits], Solution], loop: Any, limits: Limits, reporter: Reporter
) -> Solution:
    """The run in parts of equal length, between which the user is told of the progress."""
    steps = 0 if loop is None else int(loop.steps)
    last = int(limits.max_steps)
    while True:
        steps = min(steps + reporter.every, last)
        part = solve(loop, limits._replace(max_steps=np.int32(steps)))
        solution = part._replace(max_steps=limits.max_steps)
        said_stop = says_stop(reporter, solution)
        if solution.status != Status.max_steps or solution.steps >= last:
            return solution
        if said_stop:
            return solution._replace(status=jnp.int32(Status.stopped))
        loop = solution.loop


@checked
def progress_bar(width: PositiveInt = 30, file: TextIO | None = None) -> Callable[[Solution], None]:
    """A progress bar for :func:`minimize`: pass it as ``progress``.

    It shows the steps made, the value and the largest gradient entry in one line. Under
    ``jax.vmap`` it counts the solves that have ended.

    Args:
      width: width of the bar, in characters.
      file: the stream to write to; ``None`` for standard error.

    Returns:
      A function that takes a :class:`Solution` and redraws the line.

    >>> import sys, jax.numpy as jnp, gradxform as gx
    >>> bowl = lambda x: jnp.sum((x - 1) ** 2)
    >>> bar = gx.progress_bar(10, sys.stdout)
    >>> _ = gx.minimize(bowl, jnp.zeros(2), gx.sgd(0.5), progress=bar, max_steps=200)
    ██████████ 1/200 steps, value 0, gradient 0.0e+00, converged
    """

    def show(solution: Solution) -> None:
        out = sys.stderr if file is None else file
        status, most = np.asarray(solution.status), int(np.max(solution.max_steps))
        steps = int(np.max(solution.steps))
        is_over = (status != Status.max_steps) | (np.asarray(solution.steps) >= most)
        filled = width if is_over.all() else width * steps // most
        out.write(f"\r{'█' * filled:·<{width}} {steps}/{most} steps, ")
        if status.ndim:
            out.write(f"{is_over.sum()} of {is_over.size} solves ended")
        else:
            out.write(
                f"value {float(solution.value):.3g}, gradient {float(solution.grad_norm):.1e}"
            )
            out.write(f", {Status(int(status)).name}" if is_over else "")
        out.write("\n" if is_over.all() else "")
        out.flush()

    return show


def _solve(run: Callable[..., Solution], params: tree.PyTree, *numbers: Any) -> Solution:
    try:
        return run(params, *numbers)
    except TypeError as error:
        params = to_complex(params)
        is_list = isinstance(params, list | tuple)
        if is_list and all(jnp.ndim(p) == 0 for p in jax.tree.leaves(params)):
            raise TypeError(
                f"minimize: fn failed; it gets params as a {type(params).__name__} of "
                f"{len(params)} numbers: pass jnp.asarray(params) if it expects a vector"
            ) from error
        raise


@functools.cache
def _options(
    has_aux: bool,
    has_running: bool,
    returned: Literal["best", "last"] | None,
    history: int,
    bound: int | None,
) -> Options:
    """The same object for the same values, by which a program is found at a glance."""
    return constant(Options(has_aux, has_running, returned, history, bound, None))


def _default_method(params: tree.PyTree, has_bounds: bool) -> Method:
    sharded = any(is_sharded(p) for p in jax.tree.leaves(params))
    dense = tree.count(params) <= DENSE_LIMIT
    return _within_bounds(not sharded) if has_bounds else _without_bounds(dense, not sharded)


@functools.cache
def _without_bounds(dense: bool, ravel: bool) -> Method:
    return bfgs(ravel=ravel) if dense else lbfgs(ravel=ravel)


@functools.cache
def _within_bounds(ravel: bool) -> Method:
    return lambda bounds: lbfgs(ravel=ravel, bounds=bounds)


def _check_bounds(method: Method, bounds: Bounds | None, params: tree.PyTree) -> None:
    check_method("minimize", method, bounds)
    if bounds is not None:
        check_bounds("minimize", bounds)
        box("minimize", bounds, params)


def _real_and_strong(params: tree.PyTree) -> tree.PyTree:
    """The parameters as the loop gets them: real arrays that are not weakly typed."""
    if all([is_usual(p) and not p.weak_type for p in jax.tree.leaves(params)]):
        return params
    is_complex = check_floating(params, "minimize: params")
    params = jax.tree.map(_strong, params)
    return to_real(params) if is_complex else params


def _strong(param: jax.typing.ArrayLike) -> jax.Array:
    """``param`` as an array that is not weakly typed."""
    if isinstance(param, jax.Array) and not param.weak_type:
        return param
    return jnp.asarray(param, dtype=jnp.result_type(param))


def _number(value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> Any:
    """A number for a compiled program. A NumPy number is passed faster than a converted one."""
    return value.astype(dtype) if isinstance(value, jax.Array) else np.asarray(value, dtype)[()]


def _bound(max_steps: Any) -> int:
    """The largest number of steps of a loop that is differentiated step by step."""
    if isinstance(max_steps, jax.Array):
        raise ValueError(
            f'minimize(max_steps={shown(max_steps)}): derivative="unrolled" compiles a loop of '
            "this length: pass a Python integer"
        )
    return int(max_steps)


def _check_resume(resume: Any, tx: optax.GradientTransformation, params: tree.PyTree) -> None:
    """Raises an error if ``resume`` does not come from a call with this ``tx`` and such params."""
    if not isinstance(resume, Solution):
        raise TypeError(f"minimize(resume={shown(resume)}): expected a Solution from minimize")
    if jnp.ndim(resume.status):
        raise ValueError(
            f"minimize(resume=…): the solution holds {jnp.size(resume.status)} runs of a jax.vmap: "
            "map minimize over them, or take one by jax.tree.map(lambda x: x[0], solution)"
        )
    state = jax.eval_shape(lambda: tx.init(params))
    for name, old, new in (
        ("params", resume.loop.params, params),
        ("tx", resume.loop.state, state),
    ):
        if (difference := leaves.difference(old, new)) is not None:
            raise ValueError(
                f"minimize(resume=…): the solution comes from a call with other {name}: "
                f"{difference}; pass the tx of that call, and params of the same structure, shapes "
                "and dtypes"
            )
