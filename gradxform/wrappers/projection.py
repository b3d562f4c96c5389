"""Constraints and penalties: a projection or a proximal step after every update.

Both use the same scheme. It keeps ξ, a subgradient of the penalty at the parameters, and hands the
gradient of the whole objective, g + ξ, to the method. So the method stands still where g + ξ = 0,
which is the minimum of objective and penalty, whatever momentum or rates it has::

    u = update of the method for the gradient g + ξ
    s = max |u| / max |g + ξ|                  the step; for gradient descent its learning rate
    y = θ + u + s ξ
    θ ← prox(y, s)
    ξ ← (y − θ) / s

For gradient descent y is θ − s g, so this is the proximal gradient method. A wrong s would not move
the minimum, it would only take more updates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradxform import leaves, tree
from gradxform.complex_leaves import has_parts
from gradxform.evaluation import eval_params
from gradxform.hyperparameters import NonNegative, checked, scalar
from gradxform.info import reported
from gradxform.protocol import require_params, transformation

Prox = Callable[[tree.PyTree, jax.Array], tree.PyTree]


class ProximalState(NamedTuple):
    """State of :func:`proximal` and :func:`projected`."""

    step: jax.Array  #: s, the step of the last update; 0 while the method waits
    subgradient: tree.PyTree  #: ξ, of the penalty at the parameters, in at least float32
    inner_state: optax.OptState  #: the state of the method, for parameters in at least float32


@checked
def projected(
    tx: optax.GradientTransformation, projection: Callable[[tree.PyTree], tree.PyTree]
) -> optax.GradientTransformationExtraArgs:
    """Keeps the parameters in a set: a projection after every update.

    For gradient descent with rate ε this is the projected gradient method, where P(x) is the point
    of the set that is closest to x::

        θ ← P(θ − ε g)

    Other methods get the gradient g + ξ in place of g, where −ξ is the part of −g that points out
    of the set and back, as the last projection has found it::

        y = θ + u + s ξ,    u the update of the method for the gradient g + ξ
        θ ← P(y)
        ξ ← (y − θ) / s,    s = max |u| / max |g + ξ|

    So momentum does not push against the set, and methods with a rate for each parameter, such as
    Adam, find the minimum on a simplex or a ball too. (Plain P(θ + u) does not.)

    :func:`gradxform.minimize` stops at a small g + ξ, and ``Solution.grad_norm`` is its largest
    entry.

    Args:
      tx: a first-order method. Methods that search by values take bounds only (``bounds`` of
        :func:`gradxform.minimize`).
      projection: P, a function of the parameters that returns the closest point of the set, such as
        ``optax.projections.projection_simplex``. Give its arguments by ``functools.partial``.

    Returns:
      The transformation. ``update`` needs ``params`` and what ``tx`` needs. Nothing may change its
      updates afterwards, so put it around the whole chain. ``optax.apply_updates`` rounds θ + u:
      zeros are exact, and other numbers may be rounded like the parameters before. They become
      exact when the parameters settle.

    Raises:
      TypeError: an argument is of the wrong type, or a parameter is complex.
      ValueError: ``tx`` searches by values or evaluates ``value_fn``, contains such a wrapper
        itself, or ``projection`` returns other shapes.

    References:
      Goldstein, "Convex programming in Hilbert space", Bull. AMS 70:709 (1964). Levitin & Polyak,
      "Constrained minimization methods", USSR Comput. Math. 6:1 (1966).

    >>> import jax.numpy as jnp, optax, gradxform as gx
    >>> tx = gx.projected(gx.sgd(0.3), optax.projections.projection_simplex)
    >>> solution = gx.minimize(lambda p: jnp.sum((p - jnp.arange(3)) ** 2), jnp.zeros(3), tx)
    >>> solution.params.round(4), bool(solution.converged)
    (Array([0., 0., 1.], dtype=float32), True)
    """
    return _after_updates("projected", "projection", tx, lambda params, step: projection(params))


@checked
def proximal(
    tx: optax.GradientTransformation, prox: Callable[[tree.PyTree, jax.Array], tree.PyTree]
) -> optax.GradientTransformationExtraArgs:
    """Adds a penalty h by its proximal operator, a step after every update.

    For gradient descent with rate ε this is the proximal gradient method (ISTA)::

        θ ← prox(θ − ε g, ε),    prox(x, s) = argmin_z  h(z) + |z − x|² / (2 s)

    An L1 penalty (:func:`gradxform.soft_threshold`) gives parameters that are exactly zero. Other
    methods get the gradient g + ξ in place of g, where ξ is a subgradient of h at θ, as the last
    step has found it::

        y = θ + u + s ξ,    u the update of the method for the gradient g + ξ
        θ ← prox(y, s)
        ξ ← (y − θ) / s,    s = max |u| / max |g + ξ|

    The step s is read off the update. It is ε for gradient descent, also if ε is a schedule or a
    traced array. With any method, also with momentum or Adam, θ stands still only where
    g + ξ = 0, the minimum of the objective plus h. With :func:`gradxform.nesterov`, θ is the
    interim point, which is the sparse one; :func:`gradxform.eval_params` gives it.

    :func:`gradxform.minimize` stops at a small g + ξ, and ``Solution.grad_norm`` is its largest
    entry. ``Solution.value`` does not contain h.

    Args:
      tx: a first-order method. Momentum, :func:`gradxform.nesterov` and Adam take fewer updates
        than gradient descent.
      prox: a function of the parameters and the step s > 0, a scalar array, that returns new
        parameters. ``gx.soft_threshold(strength)`` is the one of the L1 norm.

    Returns:
      The transformation. ``update`` needs ``params`` and what ``tx`` needs. Nothing may change its
      updates afterwards, so put it around the whole chain. To penalise a part of the parameters,
      put it into :func:`gradxform.partition` or :func:`gradxform.masked`. ``optax.apply_updates``
      rounds θ + u; zeros are exact.

    Raises:
      TypeError: an argument is of the wrong type, or a parameter is complex.
      ValueError: ``tx`` searches by values or evaluates ``value_fn``, contains such a wrapper
        itself, or ``prox`` returns other shapes.

    References:
      Beck & Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse
      problems", SIAM J. Imaging Sci. 2:183 (2009). Parikh & Boyd, "Proximal algorithms", Found.
      Trends Optim. 1:127 (2014).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.proximal(gx.momentum(0.1), gx.soft_threshold(1.0))
    >>> bowl = lambda p: jnp.sum((p - jnp.asarray([3.0, 0.4])) ** 2) / 2
    >>> gx.minimize(bowl, jnp.ones(2), tx).params.round(4)
    Array([2., 0.], dtype=float32)
    """

    def step_by(params: tree.PyTree, step: jax.Array) -> tree.PyTree:
        moves = step > 0
        return jax.tree.map(
            lambda new, old: jnp.where(moves, new, old),
            prox(params, jnp.where(moves, step, 1)),
            params,
        )

    return _after_updates("proximal", "prox", tx, step_by)


@checked
def soft_threshold(strength: NonNegative) -> Callable[[tree.PyTree, jax.Array], tree.PyTree]:
    """The proximal operator of the L1 penalty λ ‖θ‖₁, for :func:`proximal`.

    ::

        prox(θ, s) = sign(θ) max(|θ| − s λ, 0)

    Args:
      strength: λ ≥ 0, a number or a scalar array. It may be traced.

    Returns:
      A function of the parameters and the step s.

    Raises:
      TypeError, ValueError: ``strength`` is not a number of at least 0.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> gx.soft_threshold(2.0)(jnp.asarray([3.0, -0.5, -4.0]), 0.5)
    Array([ 2.,  0., -3.], dtype=float32)
    """

    def prox(params: tree.PyTree, step: jax.Array) -> tree.PyTree:
        threshold = scalar(step) * scalar(strength)
        # the clipped part is subtracted, so that small numbers become exact zeros
        return tree.map(lambda p: p - jnp.clip(p, -threshold, threshold), params)

    return prox


def _after_updates(
    name: str, argument: str, tx: optax.GradientTransformation, prox: Prox
) -> optax.GradientTransformationExtraArgs:
    """The scheme of the module, for the public function ``name``."""
    inner = optax.with_extra_args_support(tx)

    def init(params: tree.PyTree) -> ProximalState:
        _check_real(name, params)
        params = jax.tree.map(tree.promote, params)
        state = inner.init(params)
        _check_first_order(name, state)
        return ProximalState(_first_step(inner, state, params), tree.zeros_like(params), state)

    def update(
        updates: tree.PyTree,
        state: ProximalState,
        params: tree.PyTree | None = None,
        *,
        grad: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, ProximalState]:
        params = require_params(name, params, updates)
        wide = jax.tree.map(tree.promote, params)
        total = tree.map(jnp.add, state.subgradient, updates)
        if grad is not None:
            extra_args["grad"] = total
        u, inner_state = inner.update(total, state.inner_state, wide, **extra_args)
        # without a gradient the update tells no step
        size = tree.max_abs(total)
        step = jnp.where(size > 0, tree.divide(scalar(tree.max_abs(u)), scalar(size)), state.step)

        y = tree.map(lambda p, u, xi: p + u + step * xi, wide, u, state.subgradient)
        target = prox(y, step)
        if (difference := leaves.difference(target, y, dtypes=False)) is not None:
            raise ValueError(
                f"{name}({argument}=…): the function must return parameters like those that it "
                f"gets: {difference}"
            )
        subgradient = tree.map(
            lambda xi, y, x: jnp.where(step > 0, tree.divide(y - x, step), xi),
            *(state.subgradient, y, target),
        )
        to_target = jax.tree.map(_update_to, params, target)
        return to_target, ProximalState(step, subgradient, inner_state)

    return transformation(init, update, takes_complex=True)


def _update_to(param: jax.Array, target: jax.Array) -> jax.Array:
    """The update from ``param`` to ``target``, exactly −param where the target rounds to 0."""
    param = jnp.asarray(param)
    landing = target.astype(param.dtype)
    return (tree.promote(landing) - tree.promote(param)).astype(param.dtype)


def _first_step(
    tx: optax.GradientTransformationExtraArgs, state: optax.OptState, params: tree.PyTree
) -> jax.Array:
    """The step for a gradient of ones. It serves if the gradient at the start is exactly zero."""
    ones = jax.tree.map(jnp.ones_like, params)
    one = jnp.array(scalar(1))
    known = {"value": one, "grad": ones, "value_fn": lambda params: one}
    return jnp.array(scalar(tree.max_abs(tx.update(ones, state, params, **known)[0])))


def _check_real(name: str, params: tree.PyTree) -> None:
    if has_parts(params) or any(map(tree.is_complex, jax.tree.leaves(params))):
        raise TypeError(
            f"{name}: a parameter is complex; pass its real and imaginary parts as two parameters"
        )


def _check_first_order(name: str, state: optax.OptState) -> None:
    judging = ("stalled", "evaluations", "curvature_products", "num_linesearch_steps")
    if any(reported(state, field) for field in judging):
        raise ValueError(
            f"{name}(tx=…): the method compares values or uses curvature, which do not contain "
            f"what {name} adds; take a first-order method, for instance gx.momentum(0.1)"
        )
    if _proximal_states(state):
        raise ValueError(
            f"{name}(tx=…): the method contains gx.proximal or gx.projected already; combine both "
            "into one prox"
        )


@eval_params.register
def _(state: ProximalState, params: tree.PyTree) -> tree.PyTree:
    return params  # the inner state may know another point, but that one is not in the set


# -- for gradxform.minimize


def subgradient_of(state: optax.OptState, params: tree.PyTree) -> tree.PyTree | None:
    """ξ of all penalties and sets in a state, None without; 0 for parameters that have none."""
    states = _proximal_states(state)
    if not states:
        return None
    total = tree.zeros_like(params)
    for found in states:
        total = leaves.map_unmasked(jnp.add, total, found.subgradient)
    return total


def has_stepped(state: optax.OptState) -> jax.Array:
    """Whether the last update made a proximal step. An update of zero can then mean the end."""
    steps = [found.step > 0 for found in _proximal_states(state)]
    return jnp.any(jnp.stack(steps)) if steps else jnp.array(False)


def dual_change(before: optax.OptState, after: optax.OptState) -> jax.Array:
    """The largest change of s ξ in an update; 0 without such a wrapper.

    While ξ changes the parameters may rest at a kink or a corner, and leave it again.
    """
    total = scalar(0)
    for old, new in zip(_proximal_states(before), _proximal_states(after), strict=True):
        apart = jax.tree.map(jnp.subtract, new.subgradient, old.subgradient)
        total = jnp.maximum(total, new.step * scalar(tree.max_abs(apart)))
    return total


def _proximal_states(state: optax.OptState) -> list[ProximalState]:
    is_mine = lambda node: isinstance(node, ProximalState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_mine) if is_mine(x)]
