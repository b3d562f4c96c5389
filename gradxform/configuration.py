"""Recognising a method configured like one seen before, so that it is not compiled again."""

import functools
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np

_CONSTANTS = (bool, int, float, str, tuple, list, dict, np.ndarray, np.generic, jax.Array)


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that a function, or a function within it, may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def configuration_key(method: Any) -> Hashable | None:
    """A key that equally configured methods share; None for what cannot be recognised again.

    A method is a pair of closures: it is told by its code, by what the code closes over and by the
    constants it reads. A traced hyperparameter cannot be told, and whoever traces it compiles the
    loop.
    """

    def walk(value: Any, above: tuple[int, ...]) -> Hashable:
        if id(value) in above:
            return "recursive"
        above = (*above, id(value))

        def parts(*values: Any) -> tuple[Hashable, ...]:
            return tuple(walk(x, above) for x in values)

        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            defaults = (value.__defaults__, value.__kwdefaults__)
            read = {name: value.__globals__.get(name) for name in _names(value.__code__)}
            constants = {name: x for name, x in read.items() if isinstance(x, _CONSTANTS)}
            return (value.__code__, id(value.__globals__), *parts(cells, *defaults, constants))
        if isinstance(value, functools.partial):
            return parts("partial", value.func, value.args, value.keywords)
        if isinstance(value, tuple | list):
            return (type(value), *parts(*value))
        if isinstance(value, dict):
            return (dict, *parts(*value.keys()), *parts(*value.values()))
        if isinstance(value, np.ndarray | jax.Array):
            array = np.asarray(value)
            return (type(value), array.dtype, array.shape, array.tobytes())
        if isinstance(value, float):
            return value.hex()
        hash(value)
        return (type(value), value)

    try:
        return walk(method, ())
    except (jax.errors.TracerArrayConversionError, TypeError, ValueError):
        return None
