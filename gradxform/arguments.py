"""The arguments of an objective beside the parameters: what is traced and what is compiled in.

Arrays are inputs of the compiled program, so new ones of the same shapes and dtypes do not compile
again, and no program keeps them alive. This also holds for arrays in an objective that is a pytree
itself, and for floats among the arguments. Everything else, such as integers, strings and
functions, may steer Python code in the objective and is compiled in.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gradxform.configuration import ABSENT
from gradxform.hyperparameters import shown
from gradxform.objective import Composed, bind, data_of
from gradxform.squares import squares_of

_ARRAYS = (jax.Array, np.ndarray, np.generic)
_DATA = (*_ARRAYS, float, complex)


def split(values: Any, *, floats: bool = True) -> tuple[Any, list[Any]]:
    """A pytree without its arrays, and the arrays; without ``floats`` Python floats stay in it."""
    if isinstance(values, types.FunctionType):
        return values, []
    kinds = _DATA if floats else _ARRAYS
    arrays = [x for x in jax.tree.leaves(values) if isinstance(x, kinds)]
    if not arrays:
        return values, []
    leaves, structure = jax.tree.flatten(values)
    rest = [ABSENT if isinstance(x, kinds) else x for x in leaves]
    return jax.tree.unflatten(structure, rest), arrays


def joined(fixed: Any, arrays: list[Any]) -> Any:
    """What :func:`split` has split."""
    if not arrays:
        return fixed
    values = iter(arrays)
    return jax.tree.map(lambda x: next(values) if x is ABSENT else x, fixed)


def with_arguments(
    caller: str, fn: Callable[..., Any], args: Any, before: tuple[Any, ...] = ()
) -> Callable[[Any], Any]:
    """``fn`` as a function of the parameters alone; an objective of ``gx.compose`` stays one.

    ``before`` are positional arguments between the parameters and ``args``. Errors name ``caller``,
    the function that the user called.
    """
    by_name = isinstance(args, Mapping)
    if isinstance(fn, Composed) and squares_of(fn) is not None:
        return dataclasses.replace(fn, model=with_arguments(caller, fn.model, args))
    if isinstance(fn, Composed):
        return _with_data(caller, fn, args) if args else fn
    if not args and not before:
        return fn
    _check_signature(caller, fn, args, before)
    if by_name:
        return lambda params: fn(params, *before, **args)
    return lambda params: fn(params, *before, *args)


def _with_data(caller: str, fn: Composed, data: Any) -> Callable[[Any], Any]:
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{caller}(args={shown(data)}): an objective of gx.compose takes its data by name: "
            "pass a dictionary"
        )
    known = {**data_of(fn.loss, data), **data_of(fn.model, data)}
    if unknown := [name for name in data if name not in known]:
        raise TypeError(
            f"{caller}(args={shown(data)}): neither loss nor model of gx.compose has an "
            f"argument {unknown[0]}"
        )
    return bind(fn, data)


def _check_signature(
    caller: str, fn: Callable[..., Any], args: Any, before: tuple[Any, ...]
) -> None:
    """Raises a TypeError if ``fn`` does not take ``args`` after the parameters."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a callable without a signature
        return
    try:
        if isinstance(args, Mapping):
            signature.bind(None, *before, **args)
        else:
            signature.bind(None, *before, *args)
    except TypeError as error:
        raise TypeError(
            f"{caller}(args={shown(args)}): fn{signature} does not take the parameters and these: "
            f"{error}"
        ) from None
