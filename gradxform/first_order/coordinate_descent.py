"""Coordinate descent: minimise over one variable, then over the next."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import protocol, tree
from gradxform.derivatives import constant_size
from gradxform.hyperparameters import Count, NonNegative, Seed, checked, scalar
from gradxform.info import diagnostics
from gradxform.objective import bind
from gradxform.sharding import varying_like

_ROUNDS = 10  # in random order, all blocks count as tried after this many draws per block


@diagnostics
class CoordinateDescentInfo(NamedTuple):
    """Counts over all updates, and numbers from the last one."""

    evaluations: jax.Array  #: evaluations of ``value_fn``, each with two derivatives
    non_finite: jax.Array  #: evaluations with a NaN or infinite value or derivative
    block: jax.Array  #: number of the coordinate (in flattened order) or leaf of the last update
    step: jax.Array  #: t of the last update
    stalled: jax.Array  #: whether no block moves any more


class CoordinateDescentState(NamedTuple):
    """State of :func:`coordinate_descent`."""

    next_block: jax.Array  #: the next block in cyclic order
    key: jax.Array  #: raw key data for the random order
    idle: jax.Array  #: zero updates in a row
    info: CoordinateDescentInfo


@checked
def coordinate_descent(
    order: Literal["cyclic", "random", "greedy"] = "cyclic",
    block: Literal["coordinate", "leaf"] = "coordinate",
    *,
    tol: NonNegative = 1e-6,
    max_newton_steps: Count = 20,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    """Coordinate descent: each update minimises over one coordinate (or one leaf).

    The update is a minimisation along a direction d::

        φ(t) = J(θ + t d)
        t* = argmin φ
        θ ← θ + t* d

    d is the unit vector of one coordinate; coordinates are numbered through all leaves in flattened
    order. With ``block="leaf"``, d is the negative gradient of one leaf, divided by its largest
    entry, so the update follows the steepest descent of that leaf.

    Newton's method on φ finds the minimum, with directional derivatives of ``value_fn``. If φ is
    quadratic, one step is exact. Otherwise there are safeguards, and φ never increases. After a
    step that does not decrease φ, or meets NaN or infinity, the search interpolates back. Where
    φ'' ≤ 0 the step goes downhill by ``|φ'/φ''|``, and at least twice as far as the step before.
    The evaluations are counted in ``state.info.evaluations``.

    Args:
      order: ``"cyclic"``; ``"random"``, uniform with replacement; or ``"greedy"``, the block with
        the largest gradient entry (or leaf norm), known as the Gauss–Southwell rule.
      block: ``"coordinate"`` or ``"leaf"``.
      tol: an update ends when ``|φ'(t)| ≤ tol |φ'(0)|``, or when rounding hides any further
        decrease.
      max_newton_steps: largest number of Newton steps in an update.
      seed: seed of the random order.

    Returns:
      The transformation. ``update`` needs ``params`` and ``value_fn``. Other keyword arguments of
      ``update`` reach the arguments of ``value_fn`` of the same name. ``value_fn`` must support
      forward-mode differentiation, so it cannot use ``jax.custom_vjp``.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, ``update`` is not
        given ``params`` and ``value_fn``, or a mask hides parameters that ``value_fn`` needs.

    References:
      Lecture 7, "Summary of Optimization Methods". Wright, "Coordinate descent algorithms", Math.
      Program. 151:3 (2015). Nutini et al., "Coordinate descent converges faster with the
      Gauss-Southwell rule than random selection", ICML 2015.

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> f = lambda x: (x[0] - 1) ** 2 + 100 * (x[1] + 2) ** 2
    >>> x = jnp.zeros(2)
    >>> tx = gx.coordinate_descent()
    >>> state = tx.init(x)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jax.grad(f)(x), state, x, value_fn=f)
    ...     x = optax.apply_updates(x, updates)
    >>> x
    Array([ 1., -2.], dtype=float32)
    """

    def init(params: tree.PyTree) -> CoordinateDescentState:
        if block == "coordinate" and tree.count(params) != tree.count_int32(params):
            raise ValueError(
                f'coordinate_descent(block="coordinate"): there are {tree.count(params)} '
                'parameters, more than int32 can count: use block="leaf"'
            )
        key = jax.random.key(jnp.asarray(seed).astype(jnp.uint32))
        # separate buffers, so that all can be donated
        first, idle, evaluations, non_finite, chosen = jnp.zeros(5, jnp.int32)
        info = CoordinateDescentInfo(evaluations, non_finite, chosen, scalar(0), jnp.array(False))
        return CoordinateDescentState(first, jax.random.key_data(key), idle, info)

    def update(
        grads: tree.PyTree,
        state: CoordinateDescentState,
        params: tree.PyTree | None = None,
        *,
        value_fn: Callable[..., jax.typing.ArrayLike] | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, CoordinateDescentState]:
        params = protocol.require_params("coordinate_descent", params, grads)
        value = bind(protocol.require("coordinate_descent", "value_fn", value_fn), extra_args)
        protocol.check_unmasked("coordinate_descent", params)
        blocks = _leaf_blocks(grads) if block == "leaf" else _coordinate_blocks(grads)
        if blocks.count == 0:
            return grads, state

        key, draw = jax.random.split(jax.random.wrap_key_data(state.key))
        if order == "cyclic":
            chosen = state.next_block
        elif order == "random":
            chosen = jax.random.randint(draw, (), 0, blocks.count, jnp.int32)
        else:
            chosen = blocks.steepest()
        direction = blocks.direction(chosen)

        def section(t: jax.Array) -> jax.Array:
            return value(tree.map(lambda p, d: p + t * d, params, direction))

        t, evaluations, non_finite = _line_minimum(
            section, params, scalar(tol), scalar(max_newton_steps)
        )
        tries = min((_ROUNDS if order == "random" else 1) * blocks.count, 2**31 - 1)
        idle = jnp.where(t == 0, tree.add_count(state.idle, 1), 0)
        info = CoordinateDescentInfo(
            tree.add_count(state.info.evaluations, evaluations),
            tree.add_count(state.info.non_finite, non_finite),
            chosen,
            t,
            idle >= tries,
        )
        # if the gradient is not finite, neither is the direction; then t is 0
        updates = tree.map(lambda _, d: jnp.where(jnp.isfinite(d), t * d, 0), grads, direction)
        next_block = (state.next_block + 1) % blocks.count
        return updates, CoordinateDescentState(next_block, jax.random.key_data(key), idle, info)

    return protocol.transformation(init, update)


class _Blocks(NamedTuple):
    """How the parameters are cut into blocks."""

    count: int  # number of blocks
    steepest: Callable[[], jax.Array]  # () → the block with the largest gradient
    direction: Callable[[jax.Array], tree.PyTree]  # (block) → the direction d


def _coordinate_blocks(grads: tree.PyTree) -> _Blocks:
    leaves, structure = jax.tree.flatten(grads)
    *starts, blocks = np.cumsum([0] + [leaf.size for leaf in leaves]).tolist()

    def numbers(start: int, g: jax.Array) -> jax.Array:
        return jnp.arange(start, start + g.size, dtype=jnp.int32).reshape(g.shape)

    def steepest() -> jax.Array:
        largest, where = [], []
        for start, g in zip(starts, leaves, strict=True):
            if g.size:
                size = jnp.abs(g)
                most = jnp.max(size)
                # argmax would flatten the leaf, which fails if its later axes are sharded
                is_most = (size == most) | jnp.isnan(size)
                where.append(jnp.min(jnp.where(is_most, numbers(start, g), blocks)))
                largest.append(tree.promote(most))
        return jnp.stack(where)[jnp.argmax(jnp.stack(largest))]

    def direction(chosen: jax.Array) -> tree.PyTree:
        units = [
            (numbers(start, g) == chosen).astype(g.dtype)
            for start, g in zip(starts, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, units)

    return _Blocks(blocks, steepest, direction)


def _leaf_blocks(grads: tree.PyTree) -> _Blocks:
    leaves, structure = jax.tree.flatten(grads)
    filled = [i for i, leaf in enumerate(leaves) if leaf.size]

    def steepest() -> jax.Array:
        largest = tree.reciprocal(constant_size(grads))  # keeps the squares in range
        norms = [jnp.sum(jnp.square(largest * tree.promote(leaves[i]))) for i in filled]
        return jnp.argmax(jnp.stack(norms)).astype(jnp.int32)

    def direction(chosen: jax.Array) -> tree.PyTree:
        moved = [jnp.zeros_like(leaf, dtype=tree.promote(leaf).dtype) for leaf in leaves]
        for position, i in enumerate(filled):
            g = tree.promote(leaves[i])
            unit = tree.reciprocal(constant_size(g))  # the length of d does not matter
            moved[i] = jnp.where(chosen == position, -g * unit, 0)
        return jax.tree.unflatten(structure, moved)

    return _Blocks(len(filled), steepest, direction)


class _SectionPoint(NamedTuple):
    """A point of the section φ with its derivatives."""

    t: jax.Array
    value: jax.Array
    slope: jax.Array
    curvature: jax.Array


class _LineSearch(NamedTuple):
    best: _SectionPoint  # the point with the lowest φ so far
    step: jax.Array  # the next trial is best.t + step
    first_slope: jax.Array  # |φ'(0)|
    evaluations: jax.Array  # evaluations of φ
    non_finite: jax.Array  # evaluations with a NaN or infinite value or derivative
    done: jax.Array  # whether the search has ended


def _line_minimum(
    section: Callable[[jax.Array], jax.Array],
    like: tree.PyTree,
    tol: jax.Array,
    max_newton_steps: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A local minimum t of ``section``, downhill from 0, by safeguarded Newton steps.

    Also returns the number of evaluations, and the number of those that were not finite.
    """
    one, zero = varying_like((scalar(1), scalar(0)), like)
    resolution = jnp.finfo(jax.eval_shape(section, zero).dtype).eps

    def evaluate(t: jax.Array) -> _SectionPoint:
        def with_slope(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(section, (t,), (one,))

        (value, slope), (_, curvature) = jax.jvp(with_slope, (t,), (one,))
        return _SectionPoint(t, scalar(value), scalar(slope), scalar(curvature))

    def newton_step(point: _SectionPoint, last: jax.Array) -> jax.Array:
        curvature = jnp.where(jnp.isfinite(point.curvature), point.curvature, 0)
        length = jnp.abs(tree.divide(point.slope, curvature))
        # without a minimum of the local parabola, go downhill in growing steps
        away = jnp.maximum(length, 2 * jnp.abs(last))
        length = jnp.where(curvature > 0, length, jnp.where(away > 0, away, one))
        return -jnp.sign(point.slope) * jnp.where(jnp.isfinite(length), length, one)

    def body(search: _LineSearch) -> _LineSearch:
        first = search.evaluations == 0
        best = search.best
        trial = evaluate(best.t + search.step)
        finite = jnp.isfinite(trial.value) & jnp.isfinite(trial.slope)
        # if rounding hides the difference of the values, the point with the smaller slope is better
        noise = resolution * jnp.abs(best.value)
        flatter = (trial.value <= best.value + noise) & (jnp.abs(trial.slope) < jnp.abs(best.slope))
        better = first | (finite & ((trial.value < best.value) | flatter))

        # the minimum of the parabola through φ and φ' at the best point and φ at the rejected one
        predicted = best.slope * search.step
        back = tree.divide(-predicted, 2 * (trial.value - best.value - predicted))
        back = jnp.where(jnp.isfinite(back), jnp.clip(back, 0.1, 0.5), 0.1)
        # From a non-finite point take the square root of the step, which quickly undoes any length.
        size = jnp.abs(search.step)
        shorter = jnp.where(size > 4, jnp.sqrt(size), 0.1 * size) * jnp.sign(search.step)
        back = jnp.where(finite, back * search.step, shorter)
        step = jnp.where(better, newton_step(trial, search.step), back)
        first_slope = jnp.where(first, jnp.abs(trial.slope), search.first_slope)

        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), trial, best)
        done = (
            (jnp.abs(best.slope) <= tol * first_slope)
            | (best.t + step == best.t)
            | (~better & (jnp.abs(best.slope * step) <= noise))
            | (first & ~finite)
        )
        all_finite = finite & jnp.isfinite(trial.curvature)
        non_finite = search.non_finite + jnp.where(all_finite, 0, 1)
        return _LineSearch(best, step, first_slope, search.evaluations + 1, non_finite, done)

    def unfinished(search: _LineSearch) -> jax.Array:
        return ~search.done & (scalar(search.evaluations) <= max_newton_steps)

    none = jnp.zeros((), jnp.int32)
    start = _SectionPoint(zero, zero, zero, zero)
    search = _LineSearch(start, zero, zero, none, none, jnp.zeros((), bool))
    search = varying_like(search, like)

    def solve(_: Any, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found = jax.lax.while_loop(unfinished, body, search)
        # as floats, because custom_root does not allow integers next to a root
        return start + found.best.t, (scalar(found.evaluations), scalar(found.non_finite))

    def along(bend: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
        curvature = bend(one)  # if this is not a minimum, the point counts as a constant
        return jnp.where(curvature > 0, tree.divide(y, curvature), 0)

    # JAX cannot reverse the loop. The implicit function theorem for φ'(t) = 0 gives the derivative.
    slope = lambda t: scalar(jax.jvp(section, (t,), (one,))[1])
    t, counts = jax.lax.custom_root(slope, zero, solve, along, has_aux=True)
    evaluations, non_finite = (count.astype(jnp.int32) for count in counts)
    return t, evaluations, non_finite
