"""How a trust region computes its step: each solver is a :class:`Subproblem`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.bounds import Box
from gradxform.hyperparameters import scalar


class Point(NamedTuple):
    """The accepted point."""

    params: tree.PyTree  #: x, in at least float32
    grad: tree.PyTree  #: g, in at least float32; with bounds the projected gradient
    linearise: Callable[[], Any]  #: what the solver needs at x; the call takes an evaluation
    is_new: jax.Array  #: whether this update accepted the point
    is_first: jax.Array  #: whether the point is new and the first one of a run
    grad_size: jax.Array  #: largest absolute entry of g if the point is new
    rough_radius: jax.Array  #: a fallback for the first Δ
    box: Box | tuple[()] = ()  #: the bounds, in at least float32; () without bounds


class Prepared(NamedTuple):
    """The model at the accepted point."""

    model: Any  #: data of the solver, stored in the state
    radius: jax.Array  #: the first Δ; 0 if the step computes it
    products: jax.Array  #: curvature products made, an int32
    finite: jax.Array  #: whether the curvature was finite


class Full(NamedTuple):
    """The step to the minimum of the model."""

    predicted: jax.Array  #: the predicted reduction
    relative: jax.Array  #: ‖Dp‖ / ‖Dx‖


class Step(NamedTuple):
    """A step p: the minimum of the model within the radius, or an approximation."""

    p: tree.PyTree  #: the step
    length: jax.Array  #: ‖Dp‖
    radius: jax.Array  #: Δ, the radius of the step
    predicted: jax.Array  #: m(0) − m(p), the predicted reduction
    negative: jax.Array  #: whether negative curvature was found
    products: jax.Array  #: curvature products made, an int32
    finite: jax.Array  #: whether the curvature was finite
    full: Full | None = None  #: the step without a radius, if the solver knows it


class Subproblem(NamedTuple):
    """A solver: three functions that compute the step within the radius."""

    init: Callable[[tree.PyTree], Any]  #: (params) → the initial ``model``
    prepare: Callable[[Point, Any], Prepared]  #: (accepted point, stored model) → the model there
    step: Callable[[Point, Any, jax.Array], Step]  #: (accepted point, model, Δ) → the step


def rough_radius(params: tree.PyTree) -> jax.Array:
    """A tenth of the largest absolute parameter, or 1 if all are 0."""
    size = scalar(tree.max_abs(params))
    return jnp.where(size > 0, 0.1 * size, 1)


def usable_radius(guess: jax.Array, rough: jax.Array) -> jax.Array:
    """``guess`` if it is positive and finite, otherwise ``rough``."""
    return jnp.where((guess > 0) & jnp.isfinite(guess), guess, rough)
