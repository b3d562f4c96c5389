"""The derivative of the solution of ``minimize`` in the arguments of the objective.

At a minimum x(θ) of f(x, θ) the gradient g(x, θ) in x is zero, also for slightly different
arguments θ. So the solution moves by (Blondel et al., "Efficient and modular implicit
differentiation", arXiv 2105.15183)

    H dx = −dg,    H the Hessian of f in x, dg the change of g with θ for constant x,

and its value by the change of f with θ for constant x. The steps that led there do not matter, nor
does the start. :mod:`gradxform.minres` solves the system from products with H.

JAX differentiates nothing of the solve: all its inputs are constants, and a function that returns
the solution unchanged has the derivative above. An objective may also close over arrays that are
differentiated. Under a transformation of JAX they are tracers, and these become arguments.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer, eval_context
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, get_opaque_trace_state, jaxpr_as_fun

from gradxform import tree
from gradxform.arguments import joined
from gradxform.complex_leaves import has_parts, of_real, to_complex, to_real
from gradxform.loop import Options, objective
from gradxform.minres import least_norm
from gradxform.programs import is_comparable, program
from gradxform.solution import Solution
from gradxform.stopping import Test
from gradxform.traits import frozen_leaves, is_penalised

_Rule: TypeAlias = Literal["implicit", "implicit_always"] | None
# (inputs, running, leaves of the parameters) → value and second part of the objective
_Evaluate: TypeAlias = Callable[
    [list[Any], tree.PyTree, list[jax.Array]], tuple[jax.Array, tree.PyTree]
]


class _Found(NamedTuple):
    """The parts of a solution that have a derivative. Pytrees without ``==`` would not pass JAX."""

    params: list[jax.Array]  # the leaves, real ones
    value: jax.Array
    aux: list[jax.Array]  # the leaves


# which inputs move → a function like ``_change``, from ``known`` on
_ChangeFor: TypeAlias = Callable[[tuple[bool, ...]], Callable[..., _Found]]


class _Known(NamedTuple):
    """What else the derivative depends on."""

    running: tree.PyTree  # running statistics that the objective gets; constants
    is_minimum: jax.Array  # whether the gradient is zero, up to ``tol``
    is_free: list[jax.Array]  # whether each leaf of the parameters moves, or each of its entries


def with_derivative(
    rule: _Rule,
    run: Callable[..., Solution],
    fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    options: Options,
    stop: Test | None,
    args: Any,
    params: tree.PyTree,
    running: tree.PyTree,
    arrays: list[Any],
    *limits: Any,
) -> Solution:
    """``run(params, running, arrays, *limits)``, with the derivative of this module.

    The arguments after ``run`` are those of :func:`gradxform.loop.run`, where complex parameters
    are real ones.
    """
    if not is_transformed():
        return run(params, running, arrays, *limits)
    opened, tracers = _opened(run, params, running, arrays, *limits)
    constant = _constant((params, running, arrays, *limits))
    solution = opened(_constant(tracers), *constant) if tracers else run(*constant)
    statics, structure = (fn, options, stop, args), jax.tree.structure(params)
    evaluate = functools.partial(_evaluate, *statics)
    if tracers:
        evaluate, inputs = _of_inputs(*_opened(evaluate, arrays, running, params), arrays)
        change_for = _of_leaves(evaluate, rule, structure)
    elif is_comparable(structure):
        inputs, change_for = arrays, _found_again(statics, rule, structure)
    else:
        inputs, change_for = arrays, _of_leaves(evaluate, rule, structure)
    known = _known(solution, optax.with_extra_args_support(tx), rule)
    aux, aux_structure = jax.tree.flatten(solution.aux)
    found = _Found(jax.tree.leaves(to_real(solution.params)), solution.value, aux)
    point = _attached(rule, change_for, inputs, known, found)
    return solution._replace(
        params=to_complex(structure.unflatten(point.params)),
        value=point.value,
        aux=aux_structure.unflatten(point.aux),
    )


# Functions of their own, because what they return must not keep tracers alive.


def _of_inputs(
    opened: Callable[..., Any], tracers: list[Any], arrays: list[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    count = len(tracers)
    evaluate = lambda inputs, *at: opened(inputs[:count], inputs[count:], *at)
    return evaluate, [*tracers, *arrays]


def _of_leaves(evaluate: Callable[..., Any], rule: _Rule, structure: Any) -> _ChangeFor:
    at = lambda inputs, running, leaves: evaluate(inputs, running, structure.unflatten(leaves))
    return lambda is_moved: jax.jit(functools.partial(_change, at, rule, is_moved))


def _found_again(statics: tuple[Any, ...], rule: _Rule, structure: Any) -> _ChangeFor:
    """As a program that the next call finds."""

    def change_for(is_moved: tuple[bool, ...]) -> Callable[..., _Found]:
        compiled = program(_change_of, *statics, rule, is_moved)
        return lambda known, leaves, *rest: compiled(known, structure.unflatten(leaves), *rest)

    return change_for


def _known(solution: Solution, tx: optax.GradientTransformationExtraArgs, rule: _Rule) -> _Known:
    params, state = to_real(solution.params), solution.loop.state
    # with a penalty in the method the gradient of the objective is not zero
    is_minimum = solution.converged & ~is_penalised(tx, params, state)
    known = _Known(
        running=solution.loop.running,
        is_minimum=jnp.array(True) if rule == "implicit_always" else is_minimum,
        is_free=[jnp.array(not x) for x in frozen_leaves(tx, params, state)],
    )
    return _constant(known)


def is_transformed() -> bool:
    """Whether JAX is differentiating, batching or compiling the code that calls this."""
    with eval_context():
        plain = get_opaque_trace_state()
    return get_opaque_trace_state() != plain


def _opened(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``function(tracers, *arguments)`` for ``function(*arguments)``, and the tracers it reads."""
    leaves, structure = jax.tree.flatten(examples)
    results = []

    def of_leaves(*leaves: Any) -> list[Any]:
        found, of_found = jax.tree.flatten(function(*structure.unflatten(leaves)))
        results.append(of_found)
        return found

    closed = jax.make_jaxpr(of_leaves)(*leaves)
    jaxpr = closed.jaxpr
    tracers = [x for x in closed.consts if isinstance(x, Tracer)]
    # the result must not keep tracers alive
    constants = [None if isinstance(x, Tracer) else x for x in closed.consts]

    def opened(tracers: list[Any], *arguments: Any) -> Any:
        given = iter(tracers)
        values = [next(given) if x is None else x for x in constants]
        found = jaxpr_as_fun(ClosedJaxpr(jaxpr, values))(*jax.tree.leaves(arguments))
        return results[0].unflatten(found)

    return opened, tracers


def _constant(values: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x, values)


def _evaluate(
    fn: Callable[..., Any],
    options: Options,
    stop: Test | None,
    args: Any,
    arrays: list[Any],
    running: tree.PyTree,
    params: tree.PyTree,
) -> tuple[jax.Array, tree.PyTree]:
    fn, args, _ = joined((fn, args, stop), arrays)
    fn = of_real(fn) if has_parts(params) else fn
    return objective(fn, args, options).evaluate(params, running)


def _attached(
    rule: _Rule,
    change_for: _ChangeFor,
    inputs: list[Any],
    known: _Known,
    found: _Found,
) -> _Found:
    """``found``, with its derivative in ``inputs``."""

    @jax.custom_jvp
    def attached(inputs: list[Any], known: _Known, found: _Found) -> _Found:
        return found

    @functools.partial(attached.defjvp, symbolic_zeros=True)
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[_Found, _Found]:
        if rule is None:
            raise ValueError(
                "minimize(derivative=None): what fn reads is being differentiated: leave "
                "derivative out, or pass that through jax.lax.stop_gradient first"
            )
        inputs, known, _ = primals
        point = attached(*primals)  # so that second derivatives know how it moves
        is_moved = tuple(not isinstance(x, SymbolicZero) for x in tangents[0])
        moves = [x for x, moved in zip(tangents[0], is_moved, strict=True) if moved]
        change = change_for(is_moved)(known, point.params, inputs, moves)
        return point, jax.tree.map(_as_change, change, point)

    return attached(inputs, known, found)


def _change_of(
    fn: Callable[..., Any],
    options: Options,
    stop: Test | None,
    args: Any,
    rule: _Rule,
    is_moved: tuple[bool, ...],
    known: _Known,
    params: tree.PyTree,
    *arrays: Any,
) -> _Found:
    leaves, structure = jax.tree.flatten(params)
    evaluate = functools.partial(_evaluate, fn, options, stop, args)
    at = lambda inputs, running, x: evaluate(inputs, running, structure.unflatten(x))
    return _change(at, rule, is_moved, known, leaves, *arrays)


def _change(
    evaluate: _Evaluate,
    rule: _Rule,
    is_moved: tuple[bool, ...],
    known: _Known,
    params: list[jax.Array],
    inputs: list[Any],
    moves: list[Any],
) -> _Found:
    """How params, value and aux change when some of ``inputs`` move."""

    def at(params: list[jax.Array], moved: list[Any]) -> tuple[jax.Array, tree.PyTree]:
        given = iter(moved)
        values = [next(given) if m else x for x, m in zip(inputs, is_moved, strict=True)]
        return evaluate(values, known.running, params)

    def slope(params: list[jax.Array], moved: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
        return jax.value_and_grad(lambda params: at(params, moved)[0])(params)

    def aux(params: list[jax.Array], moved: list[Any]) -> list[jax.Array]:
        leaves = map(jnp.asarray, jax.tree.leaves(at(params, moved)[1]))
        return [x if _is_real(x) else jnp.zeros(x.shape) for x in leaves]

    moved = [x for x, m in zip(inputs, is_moved, strict=True) if m]
    (_, grad), (d_value, d_grad) = jax.jvp(functools.partial(slope, params), (moved,), (moves,))
    _, product = jax.linearize(lambda params: slope(params, moved)[1], params)
    d_params = _unless(known.is_minimum, _movement(product, d_grad, params, known.is_free))
    if rule == "implicit_always":
        d_value = d_value + tree.vdot(grad, d_params)
    d_value = _unless(known.is_minimum, d_value)
    _, d_aux = jax.jvp(aux, (params, moved), (d_params, moves))
    return _Found(d_params, d_value, d_aux)


def _movement(
    product: Callable[[list[jax.Array]], list[jax.Array]],
    d_grad: list[jax.Array],
    params: list[jax.Array],
    is_free: list[jax.Array],
) -> list[jax.Array]:
    """The dx of H dx = −dg among the free parameters."""

    def free(x: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.map(lambda x, free: jnp.where(free, x, 0), x, is_free)

    def matrix(x: list[jax.Array]) -> list[jax.Array]:
        return free(jax.tree.map(tree.promote, product(tree.cast_like(free(x), params))))

    precision = max((float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params)), default=0.0)
    change = jax.lax.custom_linear_solve(
        matrix,
        free(jax.tree.map(tree.promote, d_grad)),
        lambda matrix, b: least_norm(matrix, b, precision),
        symmetric=True,
    )
    return jax.tree.map(lambda x, p: -x.astype(p.dtype), change, params)


def _unless(is_minimum: jax.Array, change: tree.PyTree) -> tree.PyTree:
    """``change`` if ``is_minimum``, otherwise NaN, in reverse mode too. Zeros stay zeros."""

    def checked(_: Any, change: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(lambda x: jnp.where(is_minimum | (x == 0), x, jnp.nan), change)

    return jax.lax.custom_linear_solve(lambda x: x, change, checked, symmetric=True)


def _as_change(change: jax.Array, of: jax.Array) -> Any:
    """``change`` in the type that JAX expects of the change of a value."""
    return change.astype(of.dtype) if _is_real(of) else np.zeros(of.shape, jax.dtypes.float0)


def _is_real(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
