"""Where a line search begins: its direction, the first trial, and with bounds the longest step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.bounds import Box, longest, project, projected_gradient
from gradxform.hyperparameters import scalar
from gradxform.kernels import in_one_kernel, max_abs, maxima
from gradxform.section import Point, Section, first_step, new_section, slowness

# The first trial is at most this many times as long as the last step. Directions with a scale of
# their own (Newton's, say) may go farther.
_REACH, _SCALED_REACH = 10.0, 1e4


class Start(NamedTuple):
    """A search that begins."""

    direction: tree.PyTree  #: d
    size: jax.Array  #: largest absolute entry of d
    section: Section  #: φ(0), φ'(0) and the first t
    longest: jax.Array | tuple[()]  #: the largest t within the bounds; () without bounds


def descends(d: tree.PyTree, g: tree.PyTree) -> jax.Array:
    slope = tree.vdot(g, d)
    return (slope < 0) & jnp.isfinite(slope)


def free_gradient(within: Box | None, point: Point) -> tree.PyTree:
    """The gradient, within bounds the projected one."""
    if within is None:
        return point.grad
    return projected_gradient(within, point.params, point.grad)


def inside_only(within: Box, point: Point) -> Point:
    """``point``, with an infinite value if it is outside the bounds, so that it is not accepted."""
    outside = jax.tree.map(jnp.subtract, project(within, point.params), point.params)
    return point._replace(value=jnp.where(tree.max_abs(outside) > 0, jnp.inf, point.value))


def begin(
    d: tree.PyTree,
    accepted: Point,
    moved: jax.Array,
    last: Section,
    begins: jax.Array,
    steepest: jax.Array,
    *,
    unit_step: bool,
    spacing: float,
) -> Start:
    """A search along d, or along −g if ``steepest``.

    A direction without a scale of its own is scaled to a largest entry of 1.

    Args:
      d: the direction of the method.
      accepted: the point x where the search begins.
      moved: largest absolute entry of the last accepted step; 0 before the first one.
      last: the section of the last search.
      begins: whether a search begins; otherwise d goes on.
      steepest: whether the search runs along −g instead.
      unit_step: whether d has a scale of its own.
      spacing: relative spacing of the floating-point numbers of x.
    """
    x, value, g = accepted
    sizes = (jax.tree.map(tree.magnitudes, y) for y in (x, d, g))
    finest = (jax.tree.map(jnp.negative, slowness(y, x, spacing)) for y in (d, g))
    size_x, size_d, size_g, finest_d, finest_g = map(scalar, maxima(*sizes, *finest))
    size, finest = jnp.where(steepest, size_g, size_d), -jnp.where(steepest, finest_g, finest_d)

    first = steepest | (moved == 0)  # no step was made along such a direction yet
    unscaled = begins & (first | (not unit_step))
    unit = tree.reciprocal(jnp.where(unscaled, size, 1))
    finest = jnp.where(size > 0, finest * jnp.where(unscaled, size, 1), 0)
    size = jnp.where(unscaled & (size > 0), 1, size)
    numbers = steepest, first, unscaled, size, finest
    steepest, first, unscaled, size, finest = in_one_kernel(numbers)

    d = tree.map(lambda d, g: unit * jnp.where(steepest, -g, d), d, g)
    slope = tree.vdot(g, d)
    t = jnp.where(unscaled, first_step(size_x, value, slope, last, first), 1)
    far = jnp.where(unscaled, _REACH, _SCALED_REACH) * moved
    is_bounded = (far > 0) & (size > 0)
    t = in_one_kernel(jnp.where(is_bounded, jnp.minimum(t, tree.divide(far, size)), t))
    return Start(d, size, new_section(value, slope, t, finest), ())


def begin_within(
    box: Box,
    d: tree.PyTree,
    accepted: Point,
    moved: jax.Array,
    last: Section,
    begins: jax.Array,
    steepest: jax.Array,
    *,
    spacing: float,
) -> Start:
    """:func:`begin` within bounds, for a d that has a scale of its own and ends within them.

    The first direction, and that after a failure, is the way to P(x − t g).
    """
    x, value, g = accepted
    free = projected_gradient(box, x, g)
    size_x, size_g = map(scalar, max_abs(x, free))
    unit = tree.scale(tree.reciprocal(size_g), free)
    first = begins & (steepest | (moved == 0))
    t = first_step(size_x, value, -tree.vdot(g, unit), last, first)
    t = jnp.where(moved > 0, jnp.minimum(t, _REACH * moved), t)
    target = project(box, jax.tree.map(lambda x, u: x - t * u, x, unit))
    d = tree.select(first, jax.tree.map(jnp.subtract, target, x), d)

    size, finest = maxima(
        jax.tree.map(tree.magnitudes, d), jax.tree.map(jnp.negative, slowness(d, x, spacing))
    )
    far = _SCALED_REACH * moved
    is_far = (far > 0) & (size > far)
    t = jnp.where(is_far, tree.divide(far, size), 1)
    finest = jnp.where(size > 0, -finest, 0)
    section = new_section(value, tree.vdot(g, d), scalar(t), scalar(finest))
    # d ends within the bounds, whatever rounding does to the quotients
    return Start(d, scalar(size), section, jnp.maximum(scalar(longest(box, x, d)), 1))
