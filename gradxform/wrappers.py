"""Optax's wrappers, for methods that evaluate ``value_fn``, take whole numbers or are costly.

Names and arguments are Optax's. What differs: under a mask ``value_fn`` is a function of the masked
part; injected hyperparameters keep their precision and whole numbers stay whole; an accumulated
method runs only when it moves. ``nnx_value_fn`` writes ``value_fn`` for Flax NNX modules.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import tree
from gradxform.curvature import Composed
from gradxform.hyperparameters import Count, check_argument, checked, scalar, shown
from gradxform.protocol import FilledNode, check_unmasked, check_value, transformation, wrapper

# -- parts of the parameters


@checked
def masked(
    inner: optax.GradientTransformation,
    mask: tree.PyTree | Callable[[tree.PyTree], tree.PyTree],
    *,
    mask_compatible_extra_args: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies ``inner`` to a part of the parameters, as if they were all there is.

    With the parameters split by the mask into the part x and the rest y, ``inner`` gets x, its
    gradient, and

    .. math::
        \texttt{value\_fn}(x) = J(x, y)

    with y as it is in the loop now; ``value`` is J(x, y) already. So a method that evaluates
    ``value_fn`` takes exactly the steps that it takes on x alone with y closed over. Under
    ``optax.masked``, ``value_fn`` expects all parameters and gets a part.

    Updates of the rest pass through unchanged, as Optax's do: **they are the gradients that came
    in**, for the next link of a chain. To freeze the rest use :func:`gradxform.partition` with
    ``optax.set_to_zero()``, as below.

    Args:
      inner: any transformation.
      mask: booleans in the structure of the parameters or a prefix of it, True where ``inner``
        applies; or a function that gives them, of the parameters in ``init`` and of the updates in
        ``update``, so it may look at structure, shapes and dtypes only.
      mask_compatible_extra_args: whether to mask all extra arguments that have the structure of the
        updates, not ``grad`` alone.

    Returns:
      The transformation, with Optax's ``MaskedState``. ``update`` needs what ``inner`` needs.

    Raises:
      TypeError: a leaf of the mask is not a boolean.
      ValueError: the mask does not fit the parameters, or is itself inside an ``optax.masked`` that
        hides parameters from a ``value_fn`` which ``inner`` evaluates.

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
    """:func:`masked` by an argument of another function, which errors name as their ``place``."""
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
    """Applies a method of its own to each part of the parameters.

    Each method gets its part as :func:`gradxform.masked` gives it: ``value_fn`` is a function of
    the part, with the other parts as they are in the loop now. The parts then move together. A
    method that judges its step by ``value`` (a line search, a trust region) judges the moves of the
    other parts with it, so give it company that moves little, or freeze the other parts.

    Args:
      transforms: label to method. ``optax.set_to_zero()`` freezes a part.
      param_labels: labels in the structure of the parameters or a prefix of it; or a function that
        gives them, of the parameters in ``init`` and of the updates in ``update``.
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
    """Whether this is a function: a pytree can be callable too, as a module of booleans is."""
    leaves = jax.tree.leaves(choice)
    return bool(leaves) and all(callable(leaf) for leaf in leaves)


def _has_structure_of(updates: tree.PyTree, argument: Any) -> bool:
    try:
        jax.tree.map(lambda _, x: x, updates, argument)
    except (TypeError, ValueError):
        return False
    # a prefix is not enough
    return len(jax.tree.leaves(updates)) == len(jax.tree.leaves(argument))


def _booleans(place: str, mask: tree.PyTree, params: tree.PyTree) -> tree.PyTree:
    """The mask of a tree, checked."""
    if not jax.tree.leaves(params):
        return True  # nothing to hide, as in the placeholder that optax.tree.map_params passes
    mask = mask(params) if _is_function(mask) else mask
    for path, used in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(used, bool | np.bool_):
            raise TypeError(
                f"{place}: mask{jax.tree_util.keystr(path)} is {shown(used)}, expected True or "
                "False: a mask decides what is compiled, so it cannot be a traced array"
            )
    try:
        jax.tree.map(lambda used, _: used, mask, params)
    except ValueError as error:
        raise ValueError(
            f"{place}: it has the structure {jax.tree.structure(mask)}, but needs that of the "
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
    if not callable(value_fn):
        raise TypeError(f"value_fn={shown(value_fn)}: expected a function of the parameters")
    if isinstance(value_fn, Composed):
        return dataclasses.replace(value_fn, model=_part(value_fn.model, mask, params))

    # shows the signature of value_fn, which says what data it takes
    @functools.wraps(value_fn, updated=())
    def of_part(part: tree.PyTree, *args: Any, **data: Any) -> Any:
        full = _fill(mask, part, params)
        check_unmasked("the method in gx.masked", full)
        return value_fn(full, *args, **data)

    return of_part


# -- hyperparameters in the state


@checked
def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: jax.typing.DTypeLike | None = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Keeps the hyperparameters of a method in its state, where they can be read and set.

    ``gx.inject_hyperparams(gx.adam)(learning_rate=0.1)`` is ``gx.adam(learning_rate=0.1)`` with
    ``state.hyperparams["learning_rate"]``, which ``update`` uses and which
    ``optax.tree.set(state, learning_rate=0.05)`` changes. Of the arguments and defaults of the
    factory,

    * floats and arrays are kept in the state, floats in at least float32 whatever the dtype of the
      parameters (Optax rounds them to that: with bfloat16 parameters ``b2 = 0.999`` becomes 1);
    * an argument that is a function is a schedule of the number of updates made so far, evaluated
      in each update, or one of Optax's stateful schedules; setting it has no effect;
    * the rest stays as it is: whole numbers, which may be sizes (``memory_size=10``), booleans,
      strings, None, and defaults that are functions. To inject a whole number pass it as a float or
      an array.

    The inner state keeps the dtypes it starts with.

    Args:
      inner_factory: the function that builds the method, such as ``gx.adam``.
      static_args: name or names of arguments to leave as they are: functions that are no schedules.
      hyperparam_dtype: of the injected floats; ``None`` for float32, and float64 where JAX has it.

    Returns:
      A function with the arguments of ``inner_factory``. It gives the transformation, with Optax's
      ``InjectStatefulHyperparamsState``; ``update`` needs what the method needs.

    Raises:
      ValueError: ``static_args`` names no argument of the factory.
      TypeError: an argument is a function that does not give a number for a count.
      What the factory raises for a number out of range, where no argument is a schedule.

    >>> import jax.numpy as jnp, optax, gradxform as gx
    >>> tx = gx.inject_hyperparams(gx.sgd)(learning_rate=0.5)
    >>> theta = jnp.asarray(1.0)
    >>> state = optax.tree.set(tx.init(theta), learning_rate=0.25)
    >>> updates, state = tx.update(theta, state, theta)
    >>> float(updates), float(state.hyperparams["learning_rate"])
    (-0.25, 0.25)
    """
    _check_dtype(hyperparam_dtype)
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    signature = inspect.signature(inner_factory)
    if not static <= set(signature.parameters):
        raise ValueError(
            f"inject_hyperparams(static_args={sorted(static)}): the factory takes "
            f"{', '.join(signature.parameters)}"
        )

    @functools.wraps(inner_factory)
    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        given = {name: x for name, x in bound.arguments.items() if name not in static}
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        schedules = {name: x for name, x in given.items() if callable(x)}
        for name, schedule in schedules.items():
            _check_schedule(name, schedule)
        if not schedules:
            inner_factory(*args, **kwargs)  # checks the numbers, which it cannot check in arrays
        stateful = {
            name: x
            for name, x in schedules.items()
            if isinstance(x, optax.schedules.StatefulSchedule)
        }
        numbers = {
            name: x
            for name, x in arguments.items()
            if isinstance(x, float | np.floating | np.ndarray | jax.Array) and name not in static
        }

        def number(name: str, value: jax.typing.ArrayLike) -> jax.Array:
            dtype = jnp.result_type(numbers.get(name, 0.0))
            if jnp.issubdtype(dtype, jnp.floating):
                dtype = hyperparam_dtype or scalar(0).dtype
            # in a buffer of its own, so that it can be donated
            return jnp.array(value, dtype=dtype, copy=True)

        def current(
            kept: Mapping[str, Any],
            count: jax.Array,
            states: Mapping[str, Any],
            extra_args: Mapping[str, Any],
        ) -> dict[str, Any]:
            values = {name: kept[name] for name in numbers}
            for name, schedule in schedules.items():
                if name in stateful:
                    values[name] = schedule(states[name], **extra_args)
                else:
                    values[name] = schedule(count)
            return {name: number(name, value) for name, value in values.items()}

        def method(hyperparams: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
            now = inspect.BoundArguments(signature, {**arguments, **hyperparams})  # pyright: ignore[reportArgumentType]
            return optax.with_extra_args_support(inner_factory(*now.args, **now.kwargs))

        def init(params: tree.PyTree) -> optax.InjectStatefulHyperparamsState:
            count = jnp.array(0, jnp.int32)
            states = {name: schedule.init() for name, schedule in stateful.items()}
            hyperparams = current(numbers, count, states, {})
            return optax.InjectStatefulHyperparamsState(
                count, hyperparams, states, method(hyperparams).init(params)
            )

        def update(
            updates: tree.PyTree,
            state: optax.InjectStatefulHyperparamsState,
            params: tree.PyTree | None = None,
            **extra_args: Any,
        ) -> tuple[tree.PyTree, optax.InjectStatefulHyperparamsState]:
            count, states = jnp.asarray(state.count), state.hyperparams_states
            hyperparams = current(state.hyperparams, count, states, extra_args)
            states = {
                name: schedule.update(states[name], **extra_args)
                for name, schedule in stateful.items()
            }
            new_updates, inner_state = method(hyperparams).update(
                updates, state.inner_state, params, **extra_args
            )
            return _in_dtypes_of(updates, new_updates), optax.InjectStatefulHyperparamsState(
                tree.add_count(count, 1),
                hyperparams,
                states,
                _in_dtypes_of(state.inner_state, inner_state),
            )

        return wrapper(init, update)

    return factory


def _check_dtype(hyperparam_dtype: jax.typing.DTypeLike | None) -> None:
    """Raises a TypeError if this is neither None nor a floating-point dtype."""
    try:
        dtype = jnp.float32 if hyperparam_dtype is None else jnp.dtype(hyperparam_dtype)
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except (TypeError, ValueError):
        is_floating = False
    if not is_floating:
        raise TypeError(
            f"inject_hyperparams(hyperparam_dtype={shown(hyperparam_dtype)}): expected a "
            "floating-point dtype, for instance jnp.float32"
        )


def _check_schedule(name: str, schedule: Callable[..., Any]) -> None:
    """Raises a TypeError if this function takes no count, or gives no number for it."""
    if isinstance(schedule, optax.schedules.StatefulSchedule):
        return
    try:
        shape = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception as error:
        raise TypeError(_NO_SCHEDULE.format(name=name)) from error
    if not hasattr(shape, "dtype") or not jnp.issubdtype(shape.dtype, jnp.number):
        raise TypeError(_NO_SCHEDULE.format(name=name))


_NO_SCHEDULE = (
    "inject_hyperparams takes an argument that is a function for a schedule, but {name} does not "
    'give a number for a count: list it in static_args="{name}"'
)


def _in_dtypes_of(old: tree.PyTree, new: tree.PyTree) -> tree.PyTree:
    """``new`` with the floating-point dtypes of ``old``.

    A float32 hyperparameter times a bfloat16 moment is float32, and a scan wants bfloat16 back.
    """

    def cast(old: jax.typing.ArrayLike, new: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        dtype = jnp.result_type(old)
        return jnp.asarray(new, dtype=dtype) if jnp.issubdtype(dtype, jnp.floating) else new

    return jax.tree.map(cast, old, new)


# -- large batches in small pieces


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
            inner_state = _in_dtypes_of(state.inner_opt_state, inner_state)
            emptied = jax.tree.map(jnp.zeros_like, (grads, total))
            return _in_dtypes_of(updates, new), inner_state, emptied

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


# -- Flax NNX


@checked
def nnx_value_fn(
    model: Any, loss: Callable[..., jax.typing.ArrayLike], wrt: Any = None
) -> Callable[..., jax.typing.ArrayLike]:
    """The ``value_fn`` of a Flax NNX module, for ``nnx.Optimizer.update(…, value_fn=…)``.

    Optimizer hands parameters to a method as an ``nnx.State``; this gives the function of such a
    state that puts it into a copy of the module, with everything else as it is now, and evaluates
    ``loss`` on that. What the loss changes in the copy (batch statistics, random counters) is
    dropped: ``model`` is neither changed nor referred to.

    Call it before ``nnx.value_and_grad``, which moves the random counters on: with dropout,
    ``value_fn`` then has the masks that the gradient was taken with.

    Args:
      model: the module.
      loss: of a module, and of data, to one real number. Data given to ``update`` by keyword reach
        the arguments of the same name.
      wrt: which variables are the parameters, the filter that the optimizer has; ``None`` for
        ``nnx.Param``.

    Raises:
      ImportError: Flax is not installed.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, gx.coordinate_descent(), wrt=nnx.Param)
    >>> loss = lambda model: jnp.sum((model(jnp.ones((1, 1))) - 2) ** 2)
    >>> value_fn = gx.nnx_value_fn(model, loss)
    >>> value, grads = nnx.value_and_grad(loss)(model)
    >>> updates = optimizer.update(model, grads, value=value, value_fn=value_fn)
    >>> model.kernel[...].round(3)
    Array([[2.]], dtype=float32)
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("nnx_value_fn needs Flax: pip install flax") from error
    try:
        graphdef, _, rest = nnx.split(model, nnx.Param if wrt is None else wrt, ...)
    except Exception as error:  # Flax has many, some of them of no use
        raise TypeError(
            f"nnx_value_fn(model={shown(model)}, wrt={shown(wrt)}): expected a Flax NNX module and "
            "a filter of its variables, for instance nnx.Param"
        ) from error
    rest = nnx.as_pure(rest)

    # shows the signature of loss, which says what data it takes
    @functools.wraps(loss, updated=())
    def value_fn(params: tree.PyTree, *args: Any, **data: Any) -> jax.typing.ArrayLike:
        return loss(nnx.merge(graphdef, params, rest), *args, **data)

    return value_fn
