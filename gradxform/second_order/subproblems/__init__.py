"""The ways in which a trust region finds its step, each a :class:`Subproblem`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.curvature import Product
from gradxform.hyperparameters import scalar


class Point(NamedTuple):
    """The accepted point."""

    params: tree.PyTree  #: x, in at least float32
    grad: tree.PyTree  #: g, in at least float32
    linearise: Callable[[], Product]  #: makes v ↦ Hv at x, which takes an evaluation
    is_new: jax.Array  #: whether this update accepted it
    is_first: jax.Array  #: whether a search begins here, with a point that is new
    grad_size: jax.Array  #: largest absolute entry of g, where the point is new
    rough_radius: jax.Array  #: a first Δ where the curvature gives none


class Prepared(NamedTuple):
    """What is known at the accepted point before the radius is."""

    model: Any  #: what the state keeps from update to update
    radius: jax.Array  #: Δ to begin a search with; 0 where the step finds it
    products: jax.Array  #: curvature products made, an int32
    finite: jax.Array  #: whether the curvature was finite


class Step(NamedTuple):
    """A step p: the minimum of the model within the radius, or near it."""

    p: tree.PyTree
    length: jax.Array  #: ‖Dp‖
    radius: jax.Array  #: Δ that it was found within
    predicted: jax.Array  #: m(0) − m(p)
    negative: jax.Array  #: whether H was seen to have negative curvature
    products: jax.Array  #: curvature products made, an int32
    finite: jax.Array  #: whether the curvature was finite


class Subproblem(NamedTuple):
    """How the step within the radius is found."""

    init: Callable[[tree.PyTree], Any]  #: of the parameters, to the model of no point yet
    prepare: Callable[[Point, Any], Prepared]  #: of the accepted point and the model kept
    step: Callable[[Point, Any, jax.Array], Step]  #: of the point, its model and the radius


def rough_radius(params: tree.PyTree) -> jax.Array:
    """A tenth of the size of the parameters, 1 where they are 0."""
    size = scalar(tree.max_abs(params))
    return jnp.where(size > 0, 0.1 * size, 1)


def usable_radius(guess: jax.Array, rough: jax.Array) -> jax.Array:
    """``guess``, or ``rough`` where it is not finite or not above 0."""
    return jnp.where((guess > 0) & jnp.isfinite(guess), guess, rough)
