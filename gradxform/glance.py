"""A quick test of whether method and objective still read the same objects.

The key of a configuration (:mod:`gradxform.configuration`) takes a walk over all values, which is
slower than a small solve. Mostly nothing has changed. If all values are numbers, functions, JAX
arrays and containers of these, it is enough to compare identities.
"""

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from gradxform.configuration import ATOMS, NotRecognisable, is_known_constant, read_by
from gradxform.content import content
from gradxform.objective import Composed

_JITTED = type(jax.jit(len))
_CONTAINERS = (tuple, dict, list, Composed)
# libraries whose functions never assign to a variable of their closure
_SETTLED = ("gradxform", "optax")


def glance(values: Sequence[Any]) -> Callable[[Sequence[Any]], bool] | None:
    """A test of whether other values read the same objects; None if identities cannot tell.

    The test keeps only numbers and constants of libraries alive. If it says no, the values may
    still be equal.
    """
    held: list[Any] = []  # while these objects are alive, no other object can have their ids
    all_alive, functions, known = [True], list[Any](), set[int]()

    def lost(_: weakref.ref[Any]) -> None:
        all_alive[0] = False

    def hold(value: Any) -> None:
        if type(value) in ATOMS or type(value) is float or is_known_constant(value):
            held.append(value)
        elif isinstance(value, _CONTAINERS):
            for part in _parts(value):
                hold(part)
        elif isinstance(value, types.FunctionType | _JITTED):
            if id(value) not in known:
                known.add(id(value))
                functions.append(value)
                held.append(weakref.ref(value, lost))
        elif isinstance(value, types.CodeType | jax.Array) and not isinstance(value, Tracer):
            held.append(weakref.ref(value, lost))
        else:
            raise NotRecognisable

    readers: list[tuple[weakref.ref[Any], _Layout]] = []
    try:
        hold(tuple(values))
        for function in functions:  # the list grows during the loop
            read = _read(function)
            hold(read)
            if not _is_settled(function):
                readers.append((weakref.ref(function), _layout(read)))
    except NotRecognisable:
        return None
    expected = _layout(tuple(values))

    def unchanged(now: Sequence[Any]) -> bool:
        if not (held and all_alive[0] and _has_layout(tuple(now), expected)):
            return False
        return all([_has_layout(_read(function()), read) for function, read in readers])

    return unchanged


def _read(function: Any) -> tuple[Any, ...]:
    if isinstance(function, types.FunctionType):
        return read_by(function)
    return (function.__wrapped__,)


def _is_settled(function: Any) -> bool:
    """Whether nothing that a function reads can change."""
    if not isinstance(function, types.FunctionType):
        return True
    module = str(function.__globals__.get("__name__"))
    cells = map(content, function.__closure__ or ())
    return module.startswith(_SETTLED) and not any(isinstance(x, dict | list) for x in cells)


def identities(values: tuple[Any, ...]) -> list[int]:
    """The id of each value; for a container the ids of its type and of its content."""
    return _layout(values).ids


class _Layout(NamedTuple):
    """The containers and the identities in a tuple of values.

    The values stand in one list, where a container is followed, further on, by its content.
    """

    count: int  #: number of values, without the content of containers
    containers: list[tuple[int, type, int]]  #: place, type and size of each container
    ids: list[int]  #: the id of each value; for a container that of its type


def _layout(values: tuple[Any, ...]) -> _Layout:
    flat, containers = [*values], []
    for place, value in enumerate(flat):  # the list grows during the loop
        if isinstance(value, _CONTAINERS) and not is_known_constant(value):
            parts = _parts(value)
            containers.append((place, type(value), len(parts)))
            flat += parts
            flat[place] = type(value)
    return _Layout(len(values), containers, [*map(id, flat)])


def _has_layout(values: tuple[Any, ...], layout: _Layout) -> bool:
    if len(values) != layout.count:
        return False
    flat = [*values]
    for place, kind, size in layout.containers:
        if type(value := flat[place]) is not kind:
            return False
        parts = value if isinstance(value, tuple) else _parts(value)
        if len(parts) != size:
            return False
        flat += parts
        flat[place] = kind
    return [*map(id, flat)] == layout.ids


def _parts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, Composed):
        return tuple(vars(value).values())
    return tuple(value)
