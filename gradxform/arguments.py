"""The arguments of an objective beside the parameters: what is traced and what is compiled in.

Arrays and floats are inputs of the compiled program, so new ones of the same shapes and dtypes do
not compile again, and no program keeps them alive. Everything else, such as integers, strings and
functions, may steer Python code in the objective and is compiled in.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gradxform.configuration import ABSENT
from gradxform.hyperparameters import shown
from gradxform.objective import Composed, bind, data_of


def split(args: tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """``args`` without the arrays, and the arrays."""
    leaves, structure = jax.tree.flatten(args)
    arrays = [x for x in leaves if _is_traced(x)]
    fixed = jax.tree.unflatten(structure, [ABSENT if _is_traced(x) else x for x in leaves])
    return fixed, arrays


def joined(fixed: Any, arrays: list[Any]) -> Any:
    """What :func:`split` has split."""
    values = iter(arrays)
    return jax.tree.map(lambda x: next(values) if x is ABSENT else x, fixed)


def with_arguments(fn: Callable[..., Any], args: Any, caller: str) -> Callable[[Any], Any]:
    """``fn`` as a function of the parameters alone; an objective of ``gx.compose`` stays one.

    Errors name ``caller``, the function that the user called.
    """
    if not args:
        return fn
    by_name = isinstance(args, Mapping)
    if isinstance(fn, Composed):
        if not by_name:
            raise TypeError(
                f"{caller}(args={shown(args)}): an objective of gx.compose takes its data by name: "
                "pass a dictionary"
            )
        known = {**data_of(fn.loss, args), **data_of(fn.model, args)}
        if unknown := [name for name in args if name not in known]:
            raise TypeError(
                f"{caller}(args={shown(args)}): neither loss nor model of gx.compose has an "
                f"argument {unknown[0]}"
            )
        return bind(fn, args)
    _check_signature(fn, args, caller)
    if by_name:
        return lambda params: fn(params, **args)
    return lambda params: fn(params, *args)


def _check_signature(fn: Callable[..., Any], args: Any, caller: str) -> None:
    """Raises a TypeError if ``fn`` does not take ``args`` after the parameters."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a callable without a signature
        return
    try:
        signature.bind(None, **args) if isinstance(args, Mapping) else signature.bind(None, *args)
    except TypeError as error:
        raise TypeError(
            f"{caller}(args={shown(args)}): fn{signature} does not take the parameters and these: "
            f"{error}"
        ) from None


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex)
