"""Bounds on the parameters, entry by entry: low ≤ x ≤ high.

A minimum within bounds need not have a zero gradient g. At a bound, g may point outwards: the value
would fall beyond it. So the projected gradient takes the place of g::

    P(x)  = min(max(x, low), high)                      the closest point within the bounds
    held  = x is at low and g > 0, or x is at high and g < 0
    projected gradient = 0 where held, otherwise g

A method with bounds keeps them as a :class:`Box` in its state. :func:`gradxform.minimize` finds it
there, whatever the wrappers around the method.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradxform import tree
from gradxform.complex_leaves import has_parts
from gradxform.hyperparameters import shown
from gradxform.sharding import sharded_like

Bounds: TypeAlias = tuple[Any, Any] | list[Any]

# so many units of rounding around a bound count as on the bound
_ROUNDING = 4


class Box(NamedTuple):
    """The bounds in the state of a method: two trees like the parameters, in their dtypes."""

    low: tree.PyTree
    high: tree.PyTree


def check_bounds(caller: str, bounds: Any) -> None:
    """Raises an error if ``bounds`` are no pair of numbers with low ≤ high; ``caller`` got them."""
    said = f"{caller}(bounds={shown(bounds)})"
    if len(bounds) != 2:
        raise ValueError(f"{said}: expected (low, high), got {len(bounds)} entries")
    sides = [jax.tree_util.tree_leaves_with_path(side) for side in bounds]
    for name, side in zip(("low", "high"), sides, strict=True):
        for path, x in side:
            where = f"{name}{jax.tree_util.keystr(path)}"
            if not _is_real(x):
                raise TypeError(f"{said}: {where} must be a real number or array, or None")
            if not isinstance(x, Tracer) and np.isnan(np.asarray(x, np.float64)).any():
                raise ValueError(f"{said}: {where} is NaN; use -inf or inf where there is no bound")
    # with None in one side the other side has no partner to compare with
    if [path for path, _ in sides[0]] == [path for path, _ in sides[1]]:
        for (path, low), (_, high) in zip(*sides, strict=True):
            _check_order(said, jax.tree_util.keystr(path), low, high)


def _check_order(said: str, where: str, low: Any, high: Any) -> None:
    if isinstance(low, Tracer) or isinstance(high, Tracer):
        return
    try:
        crossed = np.greater(np.asarray(low, np.float64), np.asarray(high, np.float64))
    except ValueError:  # shapes that do not broadcast; ``box`` compares each with the parameters
        return
    if crossed.any():
        raise ValueError(f"{said}: low{where} is above high{where}; exchange them")


def _is_real(x: Any) -> bool:
    if isinstance(x, str):  # the name of a dtype
        return False
    try:
        dtype = jnp.result_type(x)
    except TypeError:
        return False
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))


def box(caller: str, bounds: Bounds, params: tree.PyTree) -> Box:
    """The bounds for each entry of ``params``. ``None`` in place of a number means no bound.

    Raises:
      TypeError: a parameter is complex.
      ValueError: the bounds do not fit the parameters.
    """
    if has_parts(params) or any(map(tree.is_complex, jax.tree.leaves(params))):
        raise TypeError(
            f"{caller}(bounds={shown(bounds)}): a complex parameter has no bounds; pass its real "
            "and imaginary parts as two parameters"
        )
    low, high = (
        _like(f"{caller}(bounds={shown(bounds)}): {name}", side, nothing, params)
        for name, side, nothing in zip(("low", "high"), bounds, (-np.inf, np.inf), strict=True)
    )
    found = Box(low, high)
    leaves = zip(jax.tree_util.tree_leaves_with_path(low), jax.tree.leaves(high), strict=True)
    for (path, x), y in leaves:
        where = jax.tree_util.keystr(path)
        _check_order(f"{caller}(bounds={shown(bounds)})", where, x, y)
    return found


def _like(said: str, side: Any, nothing: float, params: tree.PyTree) -> tree.PyTree:
    """One side of the bounds as a tree like ``params``."""

    def fill(bound: Any, part: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(lambda _: nothing if bound is None else bound, part)

    try:
        filled = jax.tree.map(fill, side, params, is_leaf=lambda x: x is None)
    except ValueError:
        raise ValueError(
            f"{said} must have the structure of the parameters or a prefix of it"
        ) from None
    paths = jax.tree_util.tree_leaves_with_path(params)
    full = []
    for (path, p), x in zip(paths, jax.tree.leaves(filled), strict=True):
        # infinity would alarm JAX's debugging modes
        most = tree.largest(jnp.result_type(p))
        bound = jnp.clip(jnp.asarray(x), -most, most)
        bound = bound.astype(jnp.result_type(p))
        if not _broadcasts(bound.shape, jnp.shape(p)):
            raise ValueError(
                f"{said} has shape {bound.shape} where params{jax.tree_util.keystr(path)} has "
                f"shape {jnp.shape(p)}"
            )
        full.append(jnp.zeros_like(p) + bound)
    return sharded_like(jax.tree.unflatten(jax.tree.structure(params), full), params)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def project(box: Box, x: tree.PyTree) -> tree.PyTree:
    """P(x), the closest point within the bounds; NaN where low > high or a bound is NaN."""

    def closest(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        inside = jnp.minimum(jnp.maximum(x, low.astype(x.dtype)), high.astype(x.dtype))
        return jnp.where(low <= high, inside, jnp.nan)

    return jax.tree.map(closest, x, box.low, box.high)


def held(box: Box, x: tree.PyTree, g: tree.PyTree) -> tree.PyTree:
    """For each entry, whether it is at a bound and −g points outwards."""
    return jax.tree.map(
        lambda x, g, low, high: ((x <= low) & (g > 0)) | ((x >= high) & (g < 0)),
        *(x, g, box.low, box.high),
    )


def projected_gradient(box: Box, x: tree.PyTree, g: tree.PyTree) -> tree.PyTree:
    """``g``, and 0 where a bound holds x."""
    return jax.tree.map(lambda g, held: jnp.where(held, 0, g), g, held(box, x, g))


def reaches(box: Box, x: tree.PyTree, d: tree.PyTree) -> tree.PyTree:
    """For each entry the t ≥ 0 at which x + t d meets a bound, the largest number if never."""

    def reach(x: jax.Array, d: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        most = tree.largest(d.dtype)
        gap, speed = jnp.maximum(jnp.where(d < 0, x - low, high - x), 0), jnp.abs(d)
        # arranged so that nothing overflows
        never = (d == 0) | (gap / most >= speed / 2)
        return jnp.where(never, most, gap / jnp.where(never, 1, speed))

    return jax.tree.map(reach, x, d, box.low, box.high)


def longest(box: Box, x: tree.PyTree, d: tree.PyTree) -> jax.Array:
    """The largest t for which x + t d is within the bounds."""
    ends = [jnp.min(t) for t in jax.tree.leaves(reaches(box, x, d)) if jnp.size(t)]
    return jnp.min(jnp.stack(ends)) if ends else jnp.zeros((), jnp.float32)


def landed(box: Box, before: tree.PyTree, updates: tree.PyTree) -> tree.PyTree:
    """``before + updates`` within the bounds, and exactly on a bound if only rounding is between.

    A step to a bound may end beside it, because the sum is rounded.
    """

    def land(x: jax.Array, u: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        after = jnp.asarray(x + u).astype(x.dtype)
        near = _ROUNDING * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(x), jnp.abs(u))
        after = jnp.where(after - low <= near, low, after)
        return jnp.where(high - after <= near, high, after)

    return project(box, jax.tree.map(land, before, updates, box.low, box.high))


def on_bounds(box: Box, before: tree.PyTree, after: tree.PyTree) -> tree.PyTree:
    """``after``, exactly on a bound if only the rounding of a step from ``before`` is between."""

    def put(x: jax.Array, y: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        size = jnp.maximum(jnp.abs(x).astype(y.dtype), jnp.abs(y))
        near = _ROUNDING * jnp.finfo(y.dtype).eps * size
        y = jnp.where(jnp.abs(y - low) <= near, low, y)
        return jnp.where(jnp.abs(high - y) <= near, high, y)

    return jax.tree.map(put, before, after, box.low, box.high)


def updates_to(box: Box, target: tree.PyTree, params: tree.PyTree) -> tree.PyTree:
    """The updates from ``params`` to ``target``, such that their rounded sum is within the bounds.

    All in at least float32; the result has the dtypes of ``params``.
    """

    def update(p: jax.Array, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        u = (x.astype(tree.wide(p.dtype)) - tree.promote(p)).astype(p.dtype)
        one_unit = 2 * jnp.finfo(p.dtype).eps * jnp.abs(u)
        u = jnp.where(p + u < low, u + one_unit, u)
        return jnp.where(p + u > high, u - one_unit, u)

    return jax.tree.map(update, params, target, box.low, box.high)


def box_of(state: Any, params: tree.PyTree) -> Box | None:
    """The bounds in a state, None without; the largest numbers where the method sees no parameter.

    The bounds of several methods hold together.
    """
    is_box = lambda node: isinstance(node, Box)
    boxes = [x for x in jax.tree.leaves(state, is_leaf=is_box) if is_box(x)]
    if not boxes:
        return None
    high = jax.tree.map(lambda p: jnp.full_like(p, tree.largest(p.dtype)), params)
    low = jax.tree.map(jnp.negative, high)
    for found in boxes:
        low = _joined(jnp.maximum, low, found.low)
        high = _joined(jnp.minimum, high, found.high)
    return Box(low, high)


def _joined(join: Any, whole: tree.PyTree, part: tree.PyTree) -> tree.PyTree:
    is_hole = lambda node: isinstance(node, optax.MaskedNode)
    return jax.tree.map(
        lambda x, full: full if is_hole(x) else jax.tree.map(join, full, x),
        *(part, whole),
        is_leaf=is_hole,
    )


def sides(box: Box, x: tree.PyTree) -> tree.PyTree:
    """For each entry −1 at the lower bound, 1 at the upper one, and 0 between them; int8."""
    return jax.tree.map(
        lambda x, low, high: jnp.where(x <= low, -1, jnp.where(x >= high, 1, 0)).astype(jnp.int8),
        *(x, box.low, box.high),
    )
