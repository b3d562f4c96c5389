"""A method for a part of the parameters, or one for each part."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from gradxform import tree
from gradxform.hyperparameters import check_argument, checked, shown
from gradxform.objective import substituted
from gradxform.protocol import FilledNode, check_unmasked, wrapper


@checked
def masked(
    inner: optax.GradientTransformation,
    mask: tree.PyTree | Callable[[tree.PyTree], tree.PyTree],
    *,
    mask_compatible_extra_args: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Applies ``inner`` to a part of the parameters only.

    The mask splits the parameters into the part x and the rest y. ``inner`` gets x, the gradient
    with respect to x, and the objective as a function of x, with y fixed at its present value::

        value_fn(x) = J(x, y)

    So a method that evaluates ``value_fn`` takes the same steps as on a problem in x alone. Under
    ``optax.masked``, ``value_fn`` expects all parameters but gets only a part.

    The updates of the rest are not changed, as in Optax: **they are the incoming gradients**, for
    the next method of a chain. To freeze the rest use :func:`gradxform.partition` with
    ``optax.set_to_zero()``, as in the example.

    Args:
      inner: any transformation.
      mask: a pytree of booleans with the structure of the parameters or a prefix of it; True where
        ``inner`` applies. Or a function that returns one. It gets the parameters in ``init`` and
        the updates in ``update``, so it may use only structure, shapes and dtypes.
      mask_compatible_extra_args: True masks all extra arguments with the structure of the updates;
        False masks only ``grad``.

    Returns:
      The transformation, with Optax's ``MaskedState``. ``update`` needs what ``inner`` needs.

    Raises:
      TypeError: a leaf of the mask is not a boolean.
      ValueError: the mask does not fit the parameters, or an ``optax.masked`` around this one hides
        parameters that ``value_fn`` needs.

    >>> import jax, jax.numpy as jnp, optax, gradxform as gx
    >>> f = lambda p: (p["a"] - 1) ** 2 + (p["b"] - p["a"]) ** 2
    >>> params = {"a": jnp.asarray(3.0), "b": jnp.asarray(5.0)}
    >>> tx = gx.masked(gx.coordinate_descent(), {"a": True, "b": False})
    >>> updates, state = tx.update(jax.grad(f)(params), tx.init(params), params, value_fn=f)
    >>> {name: float(x) for name, x in updates.items()}  # a is at its minimum; b has its gradient
    {'a': 0.0, 'b': 4.0}
    >>> parts = {"train": gx.coordinate_descent(), "freeze": optax.set_to_zero()}
    >>> tx = gx.partition(parts, {"a": "freeze", "b": "train"})
    >>> updates, state = tx.update(jax.grad(f)(params), tx.init(params), params, value_fn=f)
    >>> {name: float(x) for name, x in updates.items()}
    {'a': 0.0, 'b': -2.0}
    """
    return _masked("masked(mask=…)", inner, mask, mask_compatible_extra_args)


def _masked(
    place: str,
    inner: optax.GradientTransformation,
    mask: tree.PyTree | Callable[[tree.PyTree], tree.PyTree],
    mask_compatible_extra_args: bool,
) -> optax.GradientTransformationExtraArgs:
    """:func:`masked`, with errors that name ``place``: a function and its argument."""
    inner = optax.with_extra_args_support(inner)

    def init(params: tree.PyTree) -> optax.MaskedState:
        return optax.MaskedState(inner.init(_hide(_booleans(place, mask, params), params)))

    def update(
        updates: tree.PyTree,
        state: optax.MaskedState,
        params: tree.PyTree | None = None,
        *,
        value_fn: Callable[..., jax.typing.ArrayLike] | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, optax.MaskedState]:
        used = _booleans(place, mask, updates)
        for name, argument in extra_args.items():
            may_hide = name == "grad" or mask_compatible_extra_args
            if may_hide and _has_structure_of(updates, argument):
                extra_args[name] = _hide(used, argument)
        if value_fn is not None:
            extra_args["value_fn"] = value_fn if params is None else _part(value_fn, used, params)
        part = None if params is None else _hide(_booleans(place, used, params), params)
        part_updates, inner_state = inner.update(
            _hide(used, updates), state.inner_state, part, **extra_args
        )
        return _fill(used, part_updates, updates), optax.MaskedState(inner_state)

    return wrapper(init, update)


@checked
def partition(
    transforms: Mapping[Hashable, optax.GradientTransformation],
    param_labels: tree.PyTree | Callable[[tree.PyTree], tree.PyTree],
    *,
    mask_compatible_extra_args: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Applies a different method to each part of the parameters.

    Each method gets its part as with :func:`gradxform.masked`: ``value_fn`` is a function of that
    part, with the other parts fixed at their present values. Then all parts move together. A line
    search or trust region judges its step by ``value``, which also contains the moves of the other
    parts. Combine it only with parts that move little or are frozen.

    Args:
      transforms: a mapping from label to method. ``optax.set_to_zero()`` freezes a part.
      param_labels: a pytree of labels with the structure of the parameters or a prefix of it. Or a
        function that returns one; it gets the parameters in ``init`` and the updates in ``update``.
      mask_compatible_extra_args: see :func:`gradxform.masked`.

    Returns:
      The transformation, with Optax's ``PartitionState``. ``update`` needs what the methods need.

    Raises:
      ValueError: a label has no method, or the labels do not fit the parameters.

    >>> import jax, jax.numpy as jnp, gradxform as gx
    >>> f = lambda p: p["w"] ** 2 + (p["b"] - 3) ** 2
    >>> params = {"w": jnp.asarray(1.0), "b": jnp.asarray(1.0)}
    >>> tx = gx.partition({1: gx.sgd(0.1), 2: gx.coordinate_descent()}, {"w": 1, "b": 2})
    >>> updates, state = tx.update(jax.grad(f)(params), tx.init(params), params, value_fn=f)
    >>> {name: round(float(x), 6) for name, x in updates.items()}
    {'b': 2.0, 'w': -0.2}
    """
    for label, tx in transforms.items():
        check_argument("partition", f"transforms[{label!r}]", tx, optax.GradientTransformation)

    def labels(params: tree.PyTree) -> tree.PyTree:
        labels = param_labels(params) if _is_function(param_labels) else param_labels
        unknown = {
            shown(x)
            for x in jax.tree.leaves(labels)
            if not isinstance(x, Hashable) or x not in transforms
        }
        if unknown:
            raise ValueError(
                f"partition(param_labels=…): no method for the label {', '.join(sorted(unknown))}; "
                f"transforms has {', '.join(sorted(map(repr, transforms)))}"
            )
        return labels

    def belongs(label: Hashable, params: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(lambda x: bool(x == label), labels(params))

    parts = {
        label: _masked(
            "partition(param_labels=…)",
            tx,
            functools.partial(belongs, label),
            mask_compatible_extra_args,
        )
        for label, tx in transforms.items()
    }

    def init(params: tree.PyTree) -> optax.PartitionState:
        return optax.PartitionState({label: part.init(params) for label, part in parts.items()})

    def update(
        updates: tree.PyTree,
        state: optax.PartitionState,
        params: tree.PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.PyTree, optax.PartitionState]:
        states = {}
        for label, part in parts.items():
            updates, states[label] = part.update(
                updates, state.inner_states[label], params, **extra_args
            )
        return updates, optax.PartitionState(states)

    return wrapper(init, update)


def _is_function(choice: tree.PyTree) -> bool:
    """Whether this is a function. A pytree can be callable too, for instance a module."""
    leaves = jax.tree.leaves(choice)
    return bool(leaves) and all(callable(leaf) for leaf in leaves)


def _has_structure_of(updates: tree.PyTree, argument: Any) -> bool:
    try:
        jax.tree.map(lambda _, x: x, updates, argument)
    except (TypeError, ValueError):
        return False
    # the same number of leaves, because a prefix is not enough
    return len(jax.tree.leaves(updates)) == len(jax.tree.leaves(argument))


def _booleans(place: str, mask: tree.PyTree, params: tree.PyTree) -> tree.PyTree:
    """The mask for ``params``, checked."""
    if not jax.tree.leaves(params):
        return True  # a tree without leaves, such as the placeholder of optax.tree.map_params
    mask = mask(params) if _is_function(mask) else mask
    for path, used in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(used, bool | np.bool_):
            raise TypeError(
                f"{place}: mask{jax.tree_util.keystr(path)} is {shown(used)}, expected True or "
                "False: a mask decides what is compiled, so it cannot be an array"
            )
    try:
        jax.tree.map(lambda used, _: used, mask, params)
    except ValueError as error:
        raise ValueError(
            f"{place}: the structure is {jax.tree.structure(mask)}, but must be that of the "
            f"parameters or a prefix of it: {jax.tree.structure(params)}"
        ) from error
    return mask


def _hide(mask: tree.PyTree, full: tree.PyTree) -> tree.PyTree:
    """The masked part of a tree, with holes for the rest."""
    return jax.tree.map(lambda used, x: x if used else FilledNode(), mask, full)


def _fill(mask: tree.PyTree, part: tree.PyTree, full: tree.PyTree) -> tree.PyTree:
    """The part with its holes filled from ``full``."""
    return jax.tree.map(lambda used, x, y: x if used else y, mask, part, full)


def _part(
    value_fn: Callable[..., Any], mask: tree.PyTree, params: tree.PyTree
) -> Callable[..., Any]:
    """``value_fn`` as a function of the masked part, with the rest from ``params``."""

    def filled(part: tree.PyTree) -> tree.PyTree:
        full = _fill(mask, part, params)
        check_unmasked("the method in gx.masked", full)
        return full

    return substituted(value_fn, filled)
