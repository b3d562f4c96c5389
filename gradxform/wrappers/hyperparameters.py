"""Hyperparameters kept in the state, where they can be read, set and scheduled."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradxform import tree
from gradxform.hyperparameters import checked, scalar, shown
from gradxform.protocol import wrapper


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
            new_state = optax.InjectStatefulHyperparamsState(
                tree.add_count(count, 1),
                hyperparams,
                states,
                tree.cast_floating_like(inner_state, state.inner_state),
            )
            return tree.cast_floating_like(new_updates, updates), new_state

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
