"""What the methods share of Optax's protocol: the arguments of ``update`` and their errors."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from gradxform.curvature import Composed, data_of
from gradxform.tree import PyTree, varying_like

T = TypeVar("T")


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A method from its two functions; Optax's own type does not let them name their state."""

    @functools.wraps(init)
    def varying_init(params: PyTree) -> Any:
        return varying_like(init(params), params)

    @functools.wraps(update)
    def varying_update(
        grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        grads = varying_like(grads, state)  # those of leaves without entries may be constants
        updates, new_state = update(grads, state, params, **extra_args)
        return updates, varying_like(new_state, state)

    return optax.GradientTransformationExtraArgs(varying_init, cast(Any, varying_update))


def require(method: str, name: str, value: T | None) -> T:
    """``value``, or a ValueError that names the extra argument of ``update`` that is missing."""
    if value is None:
        raise ValueError(
            f"{method} needs {name}=…: call tx.update(grads, state, params, value=value, "
            "grad=grads, value_fn=value_fn), or the part of it that the method needs"
        )
    return value


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
      ValueError: when called, if the value is not one real number.
    """
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
