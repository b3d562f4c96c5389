"""What the methods share of Optax's protocol: the arguments of ``update`` and their errors."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from gradxform import tree
from gradxform.curvature import Composed, data_of
from gradxform.hyperparameters import shown
from gradxform.tree import PyTree, varying_like

T = TypeVar("T")


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A method from its two functions, for real floating-point parameters and gradients alone."""

    @functools.wraps(init)
    def checked_init(params: PyTree) -> Any:
        tree.check_floating(params, "init: params")
        return varying_like(init(params), params)

    @functools.wraps(update)
    def checked_update(
        grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        tree.check_floating(grads, "update: grads")
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
        return tree.difference(state, jax.eval_shape(lambda: init(grads)), dtypes=False)
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
    if (difference := tree.difference(params, grads, dtypes=False)) is not None:
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


def bind(
    value_fn: Callable[..., jax.typing.ArrayLike],
    extra_args: Mapping[str, Any],
    name: str = "value_fn",
) -> Callable[[PyTree], jax.Array]:
    """``value_fn`` as a function of the parameters alone, called ``name`` in errors.

    Data passed to ``update`` by keyword reach the arguments of ``value_fn`` of the same name, as in
    Optax; a ``value_fn`` with ``**kwargs`` gets all of them. One from :func:`gradxform.compose`
    stays one, with the data in its parts.

    Raises:
      TypeError: ``value_fn`` is no function.
      ValueError: when called, if the value is not one real number.
    """
    if not callable(value_fn):
        raise TypeError(f"{name}={shown(value_fn)}: expected a function of the parameters")
    if isinstance(value_fn, Composed):
        loss = value_fn.loss
        data = {**data_of(loss, extra_args), **data_of(value_fn.model, extra_args)}

        # shows the signature of loss, which says what data it takes
        @functools.wraps(loss, updated=())
        def checked(outputs: PyTree, **data: Any) -> jax.Array:
            return check_value(name, loss(outputs, **data))

        return dataclasses.replace(value_fn, loss=checked, data={**value_fn.data, **data})
    data = data_of(value_fn, extra_args)
    return lambda params: check_value(name, value_fn(params, **data))


def check_value(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """``value``, if it is one real floating-point number."""
    try:
        value = jnp.asarray(value)
    except TypeError:
        raise ValueError(
            f"{name} must return one real number, got {type(value).__name__}"
        ) from None
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} must return one real number, got {value.dtype} of shape {value.shape}; "
            "reduce it, for instance by jnp.mean"
        )
    return value
