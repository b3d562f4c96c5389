"""Gradient accumulation: one update with the mean gradient of several minibatches."""

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
    """State of :func:`accumulate`: Optax's ``MultiStepsState`` with the accumulated value."""

    mini_step: jax.Array  #: minibatches accumulated since the last update of the method
    gradient_step: jax.Array  #: updates of the method so far
    inner_opt_state: optax.OptState  #: the state of the method
    acc_grads: tree.PyTree  #: mean (or sum) of the accumulated gradients, in at least float32
    acc_value: jax.Array  #: mean (or sum) of the accumulated values, in at least float32
    skip_state: tree.PyTree  #: the last report of ``should_skip_update_fn``


@checked
def accumulate(
    opt: optax.GradientTransformation,
    every_k_schedule: Count | Callable[[jax.Array], jax.typing.ArrayLike],
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., tuple[jax.typing.ArrayLike, tree.PyTree]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Accumulates k minibatches, then makes one update of ``opt`` with their mean.

    At every k-th call ``opt`` gets the mean gradient and the mean value::

        ḡ = 1/k Σᵢ gᵢ,   f̄ = 1/k Σᵢ fᵢ

    The updates in between are zero. If the minibatches have equal size and the loss is a mean over
    examples, this is the update of the large batch. ``opt`` runs only at every k-th call, so a
    costly method costs once; ``optax.MultiSteps`` runs it in every call. Under ``jax.vmap`` with
    different counters it runs in every call too, and the unused results are dropped.

    ``value_fn`` is not accumulated: ``opt`` gets the one of the k-th call. A method that takes its
    curvature from it then uses the curvature of one minibatch with the gradient of all, as in
    Hessian-free optimisation. A method that compares values of ``value_fn``
    (``coordinate_descent``, Optax's line searches) needs the ``value_fn`` of the large batch.

    Args:
      opt: the method.
      every_k_schedule: k ≥ 1, or a function from the number of updates of ``opt`` so far to k.
        A k below 1 from such a function counts as 1.
      use_grad_mean: False passes the sums of gradients and values instead of their means.
      should_skip_update_fn: a function of the gradients, the number of updates of ``opt`` and the
        parameters. It returns a boolean (whether to leave out this minibatch) and any report,
        stored in ``state.skip_state``. An example is ``optax.skip_not_finite``.

    Returns:
      The transformation. ``update`` needs what ``opt`` needs. If ``opt`` needs ``value``, pass it
      in every call. ``opt`` gets the accumulated gradient as ``grad`` too, so methods that change
      gradients belong inside. ``state.mini_step`` is 0 right after ``opt`` has run.

    Raises:
      TypeError, ValueError: k is not an integer of at least 1, or ``should_skip_update_fn`` does
        not return a boolean.

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

    return transformation(init, update, takes_complex=True)


def _check_every_k(k: Any) -> None:
    check_argument("accumulate", "every_k_schedule", k, Count)
    if isinstance(k, float | np.floating) and k != int(k):
        raise ValueError(f"accumulate(every_k_schedule={k!r}): every_k_schedule must be an integer")
