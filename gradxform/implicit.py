"""The derivative of the solution of ``minimize`` in the arguments of the objective.

At a minimum x(θ) of f(x, θ) the gradient g(x, θ) in x is zero, also for slightly different
arguments θ. So the solution moves by (Blondel et al., "Efficient and modular implicit
differentiation", arXiv 2105.15183)

    H dx = −dg,    H the Hessian of f in x, dg the change of g with θ for constant x,

and its value by the change of f with θ for constant x. Parameters at a bound move with the bound,
and the system has only the other ones. The steps that led there do not matter, nor
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
from gradxform.bounds import Box, box_of, sides
from gradxform.complex_leaves import has_parts, of_real, to_complex, to_real
from gradxform.loop import Given, Method, Options, method_of, objective
from gradxform.minres import least_norm
from gradxform.programs import is_comparable, program
from gradxform.solution import Solution
from gradxform.traits import frozen_leaves, is_penalised

_Rule: TypeAlias = Literal["implicit", "implicit_always"] | None


class _Values(NamedTuple):
    """What depends on the inputs."""

    value: jax.Array  # of the objective
    aux: tree.PyTree  # second part of what the objective returns
    box: Box | None  # the bounds


# (inputs, running, leaves of the parameters) → the values there
_Evaluate: TypeAlias = Callable[[list[Any], tree.PyTree, list[jax.Array]], _Values]


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
    is_frozen: list[jax.Array]  # whether each leaf of the parameters stays where it is
    side: list[jax.Array]  # −1, 0 or 1 for each entry, as of ``sides``; [] without bounds


def with_derivative(
    rule: _Rule,
    run: Callable[..., Solution],
    fn: Callable[..., Any],
    tx: Method,
    options: Options,
    given: Given,
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
    # without bounds the derivative does not need the method
    statics = (fn, None if box_of(solution.loop.state, params) is None else tx, options, given)
    structure = jax.tree.structure(params)
    evaluate = functools.partial(_evaluate, *statics)
    if tracers:
        evaluate, inputs = _of_inputs(*_opened(evaluate, arrays, running, params), arrays)
        change_for = _of_leaves(evaluate, rule, structure)
    elif is_comparable(structure):
        inputs, change_for = arrays, _found_again(statics, rule, structure)
    else:
        inputs, change_for = arrays, _of_leaves(evaluate, rule, structure)
    _, given_here = joined((fn, given), arrays)
    known = _known(solution, method_of(tx, given_here), rule)
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
    box = box_of(state, params)
    known = _Known(
        running=solution.loop.running,
        is_minimum=jnp.array(True) if rule == "implicit_always" else is_minimum,
        is_frozen=[jnp.array(x) for x in frozen_leaves(tx, params, state)],
        side=[] if box is None else jax.tree.leaves(sides(box, params)),
    )
    return _constant(known)


def is_transformed() -> bool:
    """Whether JAX is differentiating, batching or compiling the code that calls this."""
    return get_opaque_trace_state() != _plain_state()


@functools.cache
def _plain_state() -> Any:
    with eval_context():
        return get_opaque_trace_state()


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
    tx: Method | None,
    options: Options,
    given: Given,
    arrays: list[Any],
    running: tree.PyTree,
    params: tree.PyTree,
) -> _Values:
    fn, given = joined((fn, given), arrays)
    fn = of_real(fn) if has_parts(params) else fn
    value, aux = objective(fn, given.args, options).evaluate(params, running)
    if tx is None:
        return _Values(value, aux, None)
    constant = jax.lax.stop_gradient(params)
    return _Values(value, aux, box_of(method_of(tx, given).init(constant), constant))


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
    tx: Method | None,
    options: Options,
    given: Given,
    rule: _Rule,
    is_moved: tuple[bool, ...],
    known: _Known,
    params: tree.PyTree,
    *arrays: Any,
) -> _Found:
    leaves, structure = jax.tree.flatten(params)
    evaluate = functools.partial(_evaluate, fn, tx, options, given)
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

    def at(params: list[jax.Array], moved: list[Any]) -> _Values:
        given = iter(moved)
        values = [next(given) if m else x for x, m in zip(inputs, is_moved, strict=True)]
        return evaluate(values, known.running, params)

    def slope(params: list[jax.Array], moved: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
        return jax.value_and_grad(lambda params: at(params, moved).value)(params)

    def aux(params: list[jax.Array], moved: list[Any]) -> list[jax.Array]:
        leaves = map(jnp.asarray, jax.tree.leaves(at(params, moved).aux))
        return [x if _is_real(x) else jnp.zeros(x.shape) for x in leaves]

    moved = [x for x, m in zip(inputs, is_moved, strict=True) if m]
    (_, grad), (d_value, d_grad) = jax.jvp(functools.partial(slope, params), (moved,), (moves,))
    _, product = jax.linearize(lambda params: slope(params, moved)[1], params)
    is_free = [~x for x in known.is_frozen]
    d_bound = None
    if known.side:
        _, d_box = jax.jvp(lambda moved: at(params, moved).box, (moved,), (moves,))
        d_bound = [_of_side(*x) for x in zip(known.side, *map(jax.tree.leaves, d_box), strict=True)]
        d_grad = jax.tree.map(jnp.add, d_grad, product(d_bound))
        is_free = [free & (side == 0) for free, side in zip(is_free, known.side, strict=True)]
    d_params = _movement(product, d_grad, params, is_free)
    if d_bound is not None:
        d_params = jax.tree.map(jnp.add, d_params, d_bound)
    d_params = _unless(known.is_minimum, d_params)
    if rule == "implicit_always":
        d_value = d_value + tree.vdot(grad, d_params)
    elif d_bound is not None:  # the gradient is zero in the other directions
        d_value = d_value + tree.vdot(grad, d_bound)
    d_value = _unless(known.is_minimum, d_value)
    _, d_aux = jax.jvp(aux, (params, moved), (d_params, moves))
    return _Found(d_params, d_value, d_aux)


def _of_side(side: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """How an entry at a bound moves with it."""
    return jnp.where(side < 0, low, jnp.where(side > 0, high, 0))


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
