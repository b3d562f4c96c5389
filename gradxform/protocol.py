"""What the methods share of Optax's protocol: the arguments of ``update`` and their errors."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import optax

from gradxform import leaves
from gradxform.sharding import varying_like
from gradxform.tree import PyTree

T = TypeVar("T")


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A method from its two functions, for real floating-point parameters and gradients alone."""

    @functools.wraps(init)
    def checked_init(params: PyTree) -> Any:
        leaves.check_floating(params, "init: params")
        return varying_like(init(params), params)

    @functools.wraps(update)
    def checked_update(
        grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        leaves.check_floating(grads, "update: grads")
        grads = varying_like(grads, state)  # those of leaves without entries may be constants
        updates, new_state = update(grads, state, params, **extra_args)
        return updates, varying_like(new_state, state)

    return wrapper(checked_init, checked_update)


def wrapper(
    init: Callable[..., Any], update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A method around others; its errors say so where the state is what does not fit."""

    @functools.wraps(update)
    def explained(grads: PyTree, state: Any, *args: Any, **kwargs: Any) -> tuple[PyTree, Any]:
        try:
            return update(grads, state, *args, **kwargs)
        except Exception as error:
            # looked at only now, as almost every state fits
            difference = _from_fresh_state(init, grads, state)
            if difference is None:
                raise
            raise ValueError(
                f"update: the state is not of this method and these gradients: {difference}; give "
                "the one that init or the last update returned"
            ) from error

    # Optax's own type does not let the two functions name their state
    return optax.GradientTransformationExtraArgs(init, cast(Any, explained))


def _from_fresh_state(init: Callable[..., Any], grads: PyTree, state: Any) -> str | None:
    """How ``state`` differs from a fresh one for parameters like ``grads``; None if it does not."""
    try:
        return leaves.difference(state, jax.eval_shape(lambda: init(grads)), dtypes=False)
    except Exception:  # these gradients have no state
        return None


def require(method: str, name: str, value: T | None) -> T:
    """``value``, or a ValueError that names the extra argument of ``update`` that is missing."""
    if value is None:
        raise ValueError(
            f"{method} needs {name}=…: call tx.update(grads, state, params, value=value, "
            "grad=grads, value_fn=value_fn), or the part of it that the method needs"
        )
    return value


def require_params(method: str, params: PyTree | None, grads: PyTree) -> PyTree:
    """``params``, or a ValueError if they are missing or are no pytree like ``grads``."""
    params = require(method, "params", params)
    if (difference := leaves.difference(params, grads, dtypes=False)) is not None:
        raise ValueError(
            f"{method}: update got params unlike the gradients: {difference}; give the parameters "
            "that the gradient was taken at"
        )
    return params


class FilledNode(optax.MaskedNode):
    """Where :func:`gradxform.masked` took leaves out of a tree: ``value_fn`` fills them in."""


def check_unmasked(method: str, params: PyTree) -> None:
    """Raises a ValueError if ``optax.masked`` or ``partition`` took leaves out of ``params``."""
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) and type(node) is not FilledNode for node in nodes):
        raise ValueError(
            f"{method} evaluates value_fn, which expects all parameters, but optax.masked (or "
            "optax.partition) hides some of them: use gx.masked or gx.partition, which fill them in"
        )
