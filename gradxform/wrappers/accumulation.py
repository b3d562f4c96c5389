"""Large batches in small pieces: one update with the mean of several minibatches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import tree
from gradxform.hyperparameters import Count, check_argument, checked, scalar
from gradxform.objective import check_value
from gradxform.protocol import transformation


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`. The fields of Optax's ``MultiStepsState``, and the value."""

    mini_step: jax.Array  #: minibatches accumulated since the last update of the method
    gradient_step: jax.Array  #: updates of the method
    inner_opt_state: optax.OptState  #: the state of the method
    acc_grads: tree.PyTree  #: their mean gradient, or sum, in at least float32
    acc_value: jax.Array  #: their mean value, or sum, in at least float32
    skip_state: tree.PyTree  #: what ``should_skip_update_fn`` reported


@checked
def accumulate(
    opt: optax.GradientTransformation,
    every_k_schedule: Count | Callable[[jax.Array], jax.typing.ArrayLike],
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., tuple[jax.typing.ArrayLike, tree.PyTree]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates k minibatches, then makes one update of ``opt`` with their mean.

    .. math::
        \bar g = \frac{1}{k} \sum_{i=1}^k g_i, \qquad \bar f = \frac{1}{k} \sum_{i=1}^k f_i

    are the gradient and the ``value`` that ``opt`` gets at every k-th call; the updates in between
    are zero. With minibatches of equal size and losses that are means, that is the update of the
    large batch. ``opt`` runs only then (``optax.MultiSteps`` runs it in every call and drops all
    results but one), so that a costly method costs once. Under ``jax.vmap`` with a counter for each
    lane it runs in every call, like any ``jax.lax.cond``, and what it gives is dropped.

    ``value_fn`` is not accumulated: ``opt`` gets the one of the k-th call. For a method that takes
    curvature from it, that is the curvature of one minibatch with the gradient of all, as in
    Hessian-free optimisation. A method that compares values of ``value_fn``
    (``coordinate_descent``, Optax's line searches) needs the large batch's: pass that.

    Args:
      opt: the method.
      every_k_schedule: k ≥ 1, or a function of the number of updates of ``opt`` made so far; of
        such a number below 1, taken as 1.
      use_grad_mean: False hands on the sums of gradients and values instead of their means.
      should_skip_update_fn: of the gradients, the number of updates of ``opt`` and the parameters,
        to whether to leave this minibatch out, a boolean, and anything to be kept in
        ``state.skip_state``; for instance ``optax.skip_not_finite``.

    Returns:
      The transformation. ``update`` needs what ``opt`` needs; ``value``, if at all, in every call.
      ``opt`` gets the accumulated gradient, in the dtype of the last one, as ``grad`` too, so links
      that change gradients belong inside. Right after ``opt`` has run, ``state.mini_step`` is 0.

    Raises:
      TypeError, ValueError: k is not a whole number of at least 1, or ``should_skip_update_fn``
        does not return a boolean.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> tx = gx.accumulate(gx.sgd(1.0), every_k_schedule=2)
    >>> theta = jnp.asarray(0.0)
    >>> state = tx.init(theta)
    >>> for g in (1.0, 3.0):
    ...     updates, state = tx.update(jnp.asarray(g), state, theta)
    ...     print(float(updates))
    0.0
    -2.0
    """
    inner = optax.with_extra_args_support(opt)
    if not callable(every_k_schedule):
        _check_every_k(every_k_schedule)

    def skips(
        updates: tree.PyTree, count: jax.Array, params: tree.PyTree
    ) -> tuple[jax.Array, tree.PyTree]:
        if should_skip_update_fn is None:
            return jnp.asarray(False), ()
        skip, report = should_skip_update_fn(updates, count, params)
        skip = jnp.asarray(skip)
        if skip.shape != () or skip.dtype != jnp.bool_:
            raise ValueError(
                "accumulate: should_skip_update_fn must return one boolean and a report, got "
                f"{skip.dtype} of shape {skip.shape}"
            )
        return skip, report

    def init(params: tree.PyTree) -> AccumulateState:
        gradient_step = jnp.array(0, jnp.int32)
        _, skip_state = skips(jax.tree.map(jnp.zeros_like, params), gradient_step, params)
        return AccumulateState(
            mini_step=jnp.array(0, jnp.int32),
            gradient_step=gradient_step,
            inner_opt_state=inner.init(params),
            acc_grads=tree.zeros_like(params),
            acc_value=jnp.array(scalar(0), copy=True),
            skip_state=skip_state,
        )

    def update(
        updates: tree.PyTree,
        state: AccumulateState,
        params: tree.PyTree | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        grad: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, AccumulateState]:
        k = every_k_schedule
        if callable(k):
            k = k(state.gradient_step)
            _check_every_k(k)
        skip, skip_state = skips(updates, state.gradient_step, params)
        mini_step = state.mini_step + 1
        emit = ~skip & (mini_step >= jnp.asarray(k))

        def add(total: jax.Array, x: jax.Array) -> jax.Array:
            more = (x - total) / scalar(mini_step) if use_grad_mean else x
            return jnp.where(skip, total, total + more)

        grads = tree.map(add, state.acc_grads, updates)
        total = state.acc_value
        if value is not None:
            value = check_value("value", value)
            total = tree.map(add, total, value)

        def step() -> tuple[tree.PyTree, optax.OptState, tuple[tree.PyTree, jax.Array]]:
            mean = tree.cast_like(grads, updates)
            known = {} if grad is None else {"grad": mean}
            if value is not None:
                known["value"] = total.astype(tree.promote(value).dtype)
            new, inner_state = inner.update(
                mean, state.inner_opt_state, params, **known, **extra_args
            )
            inner_state = tree.cast_floating_like(inner_state, state.inner_opt_state)
            emptied = jax.tree.map(jnp.zeros_like, (grads, total))
            return tree.cast_floating_like(new, updates), inner_state, emptied

        def wait() -> tuple[tree.PyTree, optax.OptState, tuple[tree.PyTree, jax.Array]]:
            none = jax.tree.map(jnp.zeros_like, updates)
            return none, state.inner_opt_state, (grads, total)

        new_updates, inner_state, (grads, total) = jax.lax.cond(emit, step, wait)
        return new_updates, AccumulateState(
            mini_step=jnp.where(emit, 0, jnp.where(skip, state.mini_step, mini_step)),
            gradient_step=tree.add_count(state.gradient_step, emit.astype(jnp.int32)),
            inner_opt_state=inner_state,
            acc_grads=grads,
            acc_value=total,
            skip_state=skip_state,
        )

    return transformation(init, update)


def _check_every_k(k: Any) -> None:
    check_argument("accumulate", "every_k_schedule", k, Count)
    if isinstance(k, float | np.floating) and k != int(k):
        raise ValueError(f"accumulate(every_k_schedule={k!r}): must be a whole number")
