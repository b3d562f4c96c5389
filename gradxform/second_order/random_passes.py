"""Random backward passes, whose covariance is the Gauss–Newton matrix.

J is the Jacobian of the model, H the Hessian of the loss in the outputs, and ε a vector of random
signs::

    V = Jᵀ H^½ ε,    E[vec V (vec V)ᵀ] = JᵀHJ
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.complex_leaves import to_complex, to_real
from gradxform.hyperparameters import scalar
from gradxform.objective import Composed
from gradxform.second_order.joined_leaves import joined
from gradxform.sharding import sharded_like, varying_like


class Part(NamedTuple):
    """A part of the examples, on which a curvature is computed."""

    value_fn: Composed
    times: float  #: examples in the whole batch over those in the part


class Linear(NamedTuple):
    """Model and loss of a part at θ, linearised: Jᵀ (scale · H) J is the Gauss–Newton matrix."""

    value: jax.Array  #: the loss of the part
    outputs: tree.PyTree  #: of the model; complex ones are pairs of real ones
    push: Callable[..., tree.PyTree]  #: v ↦ J v
    bend: Callable[[tree.PyTree], tree.PyTree]  #: y ↦ H y
    scale: jax.Array  #: the objective over the loss of the part: 1 for a mean over the examples


def linearised(part: Part, params: tree.PyTree) -> Linear:
    """The model and the loss of a part of the examples, taken for a mean over them."""
    loss, model = part.value_fn.parts()

    def real_outputs(params: tree.PyTree) -> tree.PyTree:
        return to_real(jax.tree.map(tree.promote, model(params)))

    def real_loss(outputs: tree.PyTree) -> jax.Array:
        return jnp.asarray(loss(to_complex(outputs)))

    outputs, push = jax.linearize(real_outputs, params)
    (value, _), bend = jax.linearize(jax.value_and_grad(real_loss), outputs)
    return Linear(scalar(value), outputs, push, lambda y: bend(y)[1], scalar(1))


def is_sum(at: Linear, part: Part, value: jax.Array) -> jax.Array:
    """Whether the objective is a sum over the examples, not a mean.

    Then ``value``, that of the whole batch, is as many times larger as there are more examples. At
    the start of a training all examples have similar losses, so one look is enough.
    """
    return jnp.abs(value - part.times * at.value) < jnp.abs(value - at.value)


def scaled(at: Linear, part: Part, sums: jax.Array) -> Linear:
    """The same for an objective that is a sum over the examples, if ``sums``."""
    return at._replace(scale=jnp.where(sums, scalar(part.times), at.scale))


def curvature_along(at: Linear, g: tree.PyTree) -> jax.Array:
    """gᵀFg / gᵀg; 0 if it is not positive, or not finite."""
    parts = joined(g)
    unit = tree.reciprocal(tree.max_abs(parts))  # so that the square of g is a number
    parts, pushed = tree.scale(unit, parts), tree.scale(unit, at.push(g))
    curved = at.scale * tree.vdot(pushed, at.bend(pushed))
    return positive_ratio(curved, tree.vdot(parts, parts))


def positive_ratio(curved: jax.Array, square: jax.Array) -> jax.Array:
    """A curvature; 0 if it is not positive, or not finite."""
    ratio = tree.divide(curved, square)
    return jnp.where((ratio > 0) & jnp.isfinite(ratio), scalar(ratio), 0)


def or_one(unit: jax.Array) -> jax.Array:
    """The unit of the damping: 1 as long as no curvature is known."""
    return jnp.where(unit > 0, unit, 1)


class Probe(NamedTuple):
    """A random vector whose covariance is the Gauss–Newton matrix."""

    v: tree.PyTree  #: V, like the parameters
    convex: jax.Array  #: whether Lanczos's method saw no negative curvature of the loss


def probe(at: Linear, params: tree.PyTree, key: jax.Array, lanczos: int) -> Probe:
    """V = Jᵀ H^½ ε for random signs ε, with ``lanczos`` products with H."""
    leaves, structure = jax.tree.flatten(at.outputs)
    keys = [key] if len(leaves) == 1 else jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, y.shape, y.dtype) for k, y in zip(keys, leaves, strict=True)]
    signs = sharded_like(jax.tree.unflatten(structure, signs), at.outputs)
    root, convex = root_times(at.bend, signs, lanczos)
    (v,) = jax.linear_transpose(at.push, params)(tree.scale(jnp.sqrt(at.scale), root))
    return Probe(v, convex)


class _Lanczos(NamedTuple):
    """A step of Lanczos's method."""

    last: tree.PyTree  # neighbours in the basis, each of unit length or zero
    now: tree.PyTree
    between: jax.Array  # the entry of the matrix that belongs to both
    largest: jax.Array  # of the entries on the diagonal so far


def root_times(
    bend: Callable[[tree.PyTree], tree.PyTree], x: tree.PyTree, steps: int
) -> tuple[tree.PyTree, jax.Array]:
    """H^½ x by Lanczos's method, and whether H showed no negative eigenvalue.

    With one step it is exact if H is a multiple of the identity, as for squared errors.
    """
    size = tree.sqrt(tree.vdot(x, x))
    eps = jnp.finfo(size.dtype).eps
    first = tree.scale(tree.reciprocal(size), x)

    def step(at: _Lanczos, _: None) -> tuple[_Lanczos, tuple[tree.PyTree, jax.Array, jax.Array]]:
        w = tree.map(lambda w, p: w - at.between * p, bend(at.now), at.last)
        diagonal = tree.vdot(w, at.now)
        w = tree.map(lambda w, p: w - diagonal * p, w, at.now)
        left, largest = tree.sqrt(tree.vdot(w, w)), jnp.maximum(at.largest, jnp.abs(diagonal))
        # below this the rest is rounding: the space is exhausted
        left = jnp.where(left > 100 * eps * largest, left, 0)
        following = tree.map(lambda w: tree.divide(w, left), w)
        return _Lanczos(at.now, following, left, largest), (at.now, diagonal, left)

    zeros, zero = jax.tree.map(jnp.zeros_like, first), jnp.zeros_like(size)
    begin = varying_like(_Lanczos(zeros, first, zero, zero), x)
    _, (basis, diagonal, beside) = jax.lax.scan(step, begin, length=steps)
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    weights = size * (vectors @ (jnp.sqrt(jnp.maximum(values, 0)) * vectors[0]))
    rounding = 1000 * eps * jnp.max(jnp.abs(values))
    root = tree.map(lambda _, qs: jnp.tensordot(weights, qs, 1), x, basis)
    return root, ~(values[0] < -rounding)  # NaN is counted elsewhere
