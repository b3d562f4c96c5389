"""The step of a trust region within bounds, whatever the solver on a face of the box.

After Lin & Moré (1999). With the model m(u) = gᵀu + ½ uᵀCu in units of the radius, and P(u) the
closest point within low ≤ u ≤ high::

    u ← 0,  A ← the entries without room
    repeat
        v ← the minimum of m with v_A = u_A and ‖v‖ ≤ 1             by the solver, but
            the minimum of m along −g with ‖v‖ ≤ 1                  the first time
        t ← 1; halve t until m(u') ≤ m(u) + μ ∇m(u)ᵀ(u' − u),  u' = P(u + t (v − u));
               t is at least the way to the first bound
        u ← u'
        A ← A and the entries of u at a bound, if there are new ones
        A ← the entries of u at a bound towards which −∇m(u) points, if there are none
    until A stays as it was

The first u is the Cauchy point. Without a bound in reach, v is the step that the solver finds
without bounds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.bounds import Box
from gradxform.derivatives import forward_only
from gradxform.second_order.subproblems import Point
from gradxform.sharding import varying_like

_DECREASE = 0.01  # μ
_FACES = 10  # most faces in one step, after the first u
_HALVINGS = 10  # most steps of the search on a face, before it goes to the first bound
_NEVER = 1.5  # the end of a path that stays within the box up to t = 1


class Face(NamedTuple):
    """A face of the box: some entries are fixed and the others free."""

    free: tree.PyTree  #: of booleans
    fixed: tree.PyTree  #: u_A, and 0 where free
    room: jax.Array  #: the largest ‖v_F‖


class OnFace(NamedTuple):
    """The minimum of the model on a face."""

    v: tree.PyTree  #: v_F, and 0 where fixed
    negative: jax.Array  #: whether negative curvature was found
    products: jax.Array  #: curvature products made, an int32
    finite: jax.Array  #: whether the curvature was finite


class Quadratic(NamedTuple):
    """The model m(u) = gᵀu + ½ uᵀCu, within ‖u‖ ≤ 1 and a box that contains 0."""

    slope: tree.PyTree  #: g; 0 where an entry stays as it is
    bend: jax.Array  #: gᵀCg
    room: Box  #: the bounds of u
    product: Callable[[tree.PyTree], tuple[tree.PyTree, jax.Array]]  #: v ↦ C v, vᵀCv
    solve: Callable[[Face], OnFace]  #: the minimum on a face


class Inside(NamedTuple):
    """A step within the box."""

    u: tree.PyTree  #: the step
    length: jax.Array  #: ‖u‖
    predicted: jax.Array  #: −m(u)
    negative: jax.Array  #: whether negative curvature was found
    products: jax.Array  #: curvature products made, an int32
    finite: jax.Array  #: whether the curvature was finite


def free_at(point: Point) -> tree.PyTree:
    """For each entry whether it can move: it is at no bound, or −g points to the inside."""
    assert isinstance(point.box, Box)
    return jax.tree.map(
        lambda x, g, low, high: ~(((x <= low) & (g >= 0)) | ((x >= high) & (g <= 0))),
        *(point.params, point.grad, point.box.low, point.box.high),
    )


def meets_bound(point: Point, p: tree.PyTree) -> jax.Array:
    """Whether the step p takes an entry to a bound."""
    assert isinstance(point.box, Box)
    return _any(
        jax.tree.map(
            lambda x, p, low, high: (p != 0) & ((x + p <= low) | (x + p >= high)),
            *(point.params, p, point.box.low, point.box.high),
        )
    )


def on_face(point: Point, matrix: jax.Array) -> jax.Array:
    """A symmetric matrix, with zeros in the rows and columns of entries that cannot move."""
    if not point.box:
        return matrix
    return free_columns(point, free_columns(point, matrix).T).T


def free_columns(point: Point, matrix: jax.Array) -> jax.Array:
    """The matrix, with zeros in the columns of entries that cannot move, if there are bounds."""
    if not point.box:
        return matrix
    free, _ = tree.ravel(free_at(point))
    return jnp.where(free, matrix, 0)


def room_at(point: Point, unit: tree.PyTree) -> Box:
    """The box around x in the given units; 0 for an entry that cannot move.

    Bounds beyond reach are drawn closer, so that nothing overflows.
    """
    assert isinstance(point.box, Box)

    def gap(side: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(
            lambda is_free, x, side, unit: jnp.where(
                is_free, tree.divide(jnp.clip(side - x, -2 * unit, 2 * unit), unit), 0
            ),
            *(free_at(point), point.params, side, unit),
        )

    return Box(gap(point.box.low), gap(point.box.high))


# -- the algorithm


class _Walk(NamedTuple):
    """A point of the walk over the faces."""

    u: tree.PyTree
    bent: tree.PyTree  # C u
    value: jax.Array  # m(u)
    fixed: tree.PyTree  # A, of booleans
    faces: jax.Array  # faces so far
    is_over: jax.Array
    found: OnFace  # what the solver said; its products are those of all faces and looks


def step_within(caller: str, model: Quadratic) -> Inside:
    """The step that minimises the model within the box and the radius, or an approximation.

    Reverse-mode derivatives raise an error that names ``caller``.
    """
    walk = jax.lax.while_loop(
        lambda walk: ~walk.is_over & (walk.faces <= _FACES),
        lambda walk: _to_next_face(model, walk),
        _start(model),
    )
    walk = forward_only(caller, walk)
    return Inside(
        u=walk.u,
        length=tree.sqrt(tree.vdot(walk.u, walk.u)),
        predicted=-walk.value,
        negative=walk.found.negative,
        products=walk.found.products,
        finite=walk.found.finite,
    )


def _start(model: Quadratic) -> _Walk:
    g = model.slope
    zero, none, no = jax.tree.map(jnp.zeros_like, g), jnp.array(0, jnp.int32), jnp.array(False)
    walk = _Walk(
        u=zero,
        bent=zero,
        value=jnp.zeros_like(model.bend),
        fixed=jax.tree.map(lambda low, high: low >= high, *model.room),
        faces=none,
        is_over=no,
        found=OnFace((), no, none, jnp.array(True)),
    )
    return varying_like(walk, g)


def _along_slope(model: Quadratic) -> OnFace:
    """The minimum of the model along −g, within the radius."""
    steepness = tree.vdot(model.slope, model.slope)
    farthest = tree.divide(jnp.ones_like(steepness), tree.sqrt(steepness))
    is_bent = model.bend > 0
    least = jnp.where(is_bent, steepness / jnp.where(is_bent, model.bend, 1), farthest)
    v = tree.scale(-jnp.minimum(least, farthest), model.slope)
    return OnFace(v, jnp.array(False), jnp.array(0, jnp.int32), jnp.array(True))


def _to_next_face(model: Quadratic, walk: _Walk) -> _Walk:
    u, fixed = walk.u, walk.fixed
    on = jax.tree.map(lambda is_fixed, u: jnp.where(is_fixed, u, 0), fixed, u)
    room = tree.sqrt(jnp.maximum(1 - tree.vdot(on, on), jnp.finfo(walk.value.dtype).eps ** 2))
    is_first = walk.faces == 0
    found = jax.lax.cond(
        is_first,
        lambda: varying_like(_along_slope(model), u),
        lambda: varying_like(model.solve(Face(jax.tree.map(jnp.logical_not, fixed), on, room)), u),
    )
    v = jax.tree.map(lambda is_fixed, u, v: jnp.where(is_fixed, u, v), fixed, u, found.v)
    search = _search(model, walk, v)
    new = tree.select(search.is_good, search.u, u)
    bent = tree.select(search.is_good, search.bent, walk.bent)
    at = _at_bound(model.room, new)
    hit = jax.tree.map(lambda at, is_fixed: at & ~is_fixed, at, fixed)
    gradient = jax.tree.map(jnp.add, model.slope, bent)
    binding = _binding(model.room, new, gradient)
    both = jax.tree.map(jnp.logical_or, fixed, at)
    following = tree.select(_any(hit), both, binding)
    changed = _any(jax.tree.map(jnp.not_equal, following, fixed))
    before = walk.found
    return _Walk(
        u=new,
        bent=bent,
        value=jnp.where(search.is_good, search.value, walk.value),
        fixed=following,
        faces=walk.faces + 1,
        is_over=~search.is_good | ~(changed | is_first),
        found=OnFace(
            v=(),
            negative=before.negative | found.negative,
            products=before.products + found.products + search.looks,
            finite=before.finite & found.finite,
        ),
    )


class _Search(NamedTuple):
    """A point of the search along the projected path from u to v."""

    t: jax.Array
    u: tree.PyTree
    bent: tree.PyTree
    value: jax.Array
    is_good: jax.Array
    looks: jax.Array


def _search(model: Quadratic, walk: _Walk, v: tree.PyTree) -> _Search:
    gradient = jax.tree.map(jnp.add, model.slope, walk.bent)
    ends = jax.tree.map(_end, walk.u, v, model.room.low, model.room.high)
    first = _least(ends)

    def at(u: jax.Array, v: jax.Array, end: jax.Array, bound: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.where(end <= t, bound, v + (1 - t) * (u - v))

    def shorter(search: _Search) -> _Search:
        half = jnp.where(search.looks < _HALVINGS, 0.5 * search.t, 0)
        t = jnp.where(search.looks == 0, half, jnp.maximum(half, first))
        u = jax.tree.map(
            lambda u, v, end, low, high: jnp.clip(
                at(u, v, end, jnp.where(v < u, low, high), t), low, high
            ),
            *(walk.u, v, ends, model.room.low, model.room.high),
        )
        bent, second = model.product(u)
        value = tree.vdot(model.slope, u) + 0.5 * second
        descent = tree.vdot(gradient, jax.tree.map(jnp.subtract, u, walk.u))
        needed = jnp.where(t <= first, 0, _DECREASE * jnp.minimum(descent, 0))
        return _Search(t, u, bent, value, value <= walk.value + needed, search.looks + 1)

    zero, none = jax.tree.map(jnp.zeros_like, walk.u), jnp.zeros_like(walk.value)
    start = _Search(none + 2, zero, zero, none, jnp.array(False), jnp.array(0, jnp.int32))
    return jax.lax.while_loop(
        lambda search: ~search.is_good & (search.t > first),
        shorter,
        varying_like(start, walk.u),
    )


def _end(u: jax.Array, v: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The t ≥ 0 at which u + t (v − u) leaves the box; ``_NEVER`` if v is inside."""
    bound = jnp.where(v < u, low, high)
    leaves = jnp.where(v < u, v < low, v > high)
    return jnp.where(leaves, (bound - u) / jnp.where(leaves, v - u, 1), _NEVER)


def _at_bound(room: Box, u: tree.PyTree) -> tree.PyTree:
    return jax.tree.map(lambda u, low, high: (u <= low) | (u >= high), u, *room)


def _binding(room: Box, u: tree.PyTree, gradient: tree.PyTree) -> tree.PyTree:
    return jax.tree.map(
        lambda u, g, low, high: ((u <= low) & (g >= 0)) | ((u >= high) & (g <= 0)),
        *(u, gradient, room.low, room.high),
    )


def _any(flags: tree.PyTree) -> jax.Array:
    return functools.reduce(jnp.logical_or, [jnp.any(x) for x in jax.tree.leaves(flags)])


def _least(values: tree.PyTree) -> jax.Array:
    return functools.reduce(
        jnp.minimum, [jnp.min(x) for x in jax.tree.leaves(values) if jnp.size(x)]
    )
