"""Optax's protocol, shared by all methods: the arguments of ``update`` and their errors."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import optax

from gradxform import leaves
from gradxform.complex_leaves import to_real, update_of_real
from gradxform.sharding import varying_like
from gradxform.tree import PyTree

T = TypeVar("T")


def transformation(
    init: Callable[..., Any],
    update: Callable[..., tuple[PyTree, Any]],
    *,
    takes_complex: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A method from its two functions. It accepts floating-point and complex arrays.

    Unless it ``takes_complex`` arrays itself, its functions get each complex leaf as two real ones,
    and its state holds these.
    """

    @functools.wraps(init)
    def checked_init(params: PyTree) -> Any:
        if leaves.check_floating(params, "init: params") and not takes_complex:
            params = to_real(params)
        return varying_like(init(params), params)

    @functools.wraps(update)
    def checked_update(
        grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        is_split = leaves.check_floating(grads, "update: grads") and not takes_complex
        grads = varying_like(grads, state)  # gradients of empty leaves may be constants
        of_leaves = update_of_real(update) if is_split else update
        updates, new_state = of_leaves(grads, state, params, **extra_args)
        return updates, varying_like(new_state, state)

    return wrapper(checked_init, checked_update)


def wrapper(
    init: Callable[..., Any], update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A method from its two functions. An error says so if it was caused by a foreign state."""

    @functools.wraps(update)
    def explained(grads: PyTree, state: Any, *args: Any, **kwargs: Any) -> tuple[PyTree, Any]:
        try:
            return update(grads, state, *args, **kwargs)
        except Exception as error:
            # the state is checked only after an error, because almost every state fits
            difference = _from_fresh_state(init, grads, state)
            if difference is None:
                raise
            raise ValueError(
                f"update: the state does not belong to this method and these gradients: "
                f"{difference}; pass the state that init or the last update returned"
            ) from error

    # Optax's type does not allow more specific state types
    return optax.GradientTransformationExtraArgs(init, cast(Any, explained))


def _from_fresh_state(init: Callable[..., Any], grads: PyTree, state: Any) -> str | None:
    """The difference between ``state`` and a new one for parameters like ``grads``, or None."""
    try:
        return leaves.difference(state, jax.eval_shape(lambda: init(grads)), dtypes=False)
    except Exception:  # init fails for these gradients
        return None


_CALLS = {
    "params": "tx.update(grads, state, params)",
    "value": "tx.update(grads, state, params, value=loss)",
    "value_fn": "tx.update(grads, state, params, value=loss, value_fn=loss_fn)",
}


def require(method: str, name: str, value: T | None) -> T:
    """``value``, or a ValueError that names the missing argument of ``update``."""
    if value is None:
        raise ValueError(f"{method} needs {name}=…: call {_CALLS[name]}")
    return value


def require_params(method: str, params: PyTree | None, grads: PyTree) -> PyTree:
    """``params``, or a ValueError if they are missing or differ from ``grads`` in structure."""
    params = require(method, "params", params)
    if (difference := leaves.difference(params, grads, dtypes=False)) is not None:
        raise ValueError(
            f"{method}: update got params that differ from the gradients: {difference}; pass the "
            "parameters at which the gradient was taken"
        )
    return params


class FilledNode(optax.MaskedNode):
    """A leaf that :func:`gradxform.masked` removed from a tree; ``value_fn`` fills it in."""


def check_unmasked(method: str, params: PyTree) -> None:
    """Raises a ValueError if ``optax.masked`` or ``partition`` removed leaves of ``params``."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) and type(node) is not FilledNode for node in nodes):
        raise ValueError(
            f"{method} evaluates value_fn, which expects all parameters, but optax.masked (or "
            "optax.partition) hides some of them: use gx.masked or gx.partition, which fill them in"
        )
