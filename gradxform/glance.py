"""Whether what a method and an objective read is still the very same, told at a glance.

A configuration's key (:mod:`gradxform.configuration`) is made by a walk over all values, which
takes longer than a small solve. Mostly nothing has changed. Where all of it consists of numbers,
functions, JAX arrays and containers of these, comparing identities tells.
"""

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax.core import Tracer

from gradxform.configuration import ATOMS, NotRecognisable, is_known_constant, read_by

_Same = Callable[[Any], bool]
_JITTED = type(jax.jit(len))


def glance(values: Sequence[Any]) -> _Same | None:
    """A test of whether other values read the very same objects; None where identity cannot tell.

    The test keeps none of them alive, numbers and constants of libraries apart. Where it says no,
    they may still be alike.
    """
    functions: dict[int, tuple[weakref.ref[Any], _Same]] = {}
    try:
        same = _same(tuple(values), functions)
    except NotRecognisable:
        return None
    inner = tuple(functions.values())

    def unchanged(now: Any) -> bool:
        # reached from what is the same, they are alive
        return same(now) and all(reads(read_by(cast(Any, function()))) for function, reads in inner)

    return unchanged


def _same(value: Any, functions: dict[int, tuple[weakref.ref[Any], _Same]]) -> _Same:
    kind = type(value)
    if kind in ATOMS or kind is float or is_known_constant(value):
        return lambda now: now is value
    if issubclass(kind, tuple) or kind in (dict, list):
        parts = [_same(part, functions) for part in _content(value)]

        def same_content(now: Any) -> bool:
            if type(now) is not kind:
                return False
            content = _content(now)
            return len(content) == len(parts) and all(
                same(part) for same, part in zip(parts, content, strict=True)
            )

        return same_content
    if kind is types.CodeType:
        return _same_object(value)
    if kind is types.FunctionType:
        if id(value) not in functions:
            reference = weakref.ref(value)
            functions[id(value)] = (
                reference,
                lambda now: False,
            )  # while its own reads are looked at
            functions[id(value)] = (reference, _same(read_by(value), functions))
        return _same_object(value)
    if kind is _JITTED:
        same_inside = _same(value.__wrapped__, functions)
        same_jitted = _same_object(value)
        return lambda now: same_jitted(now) and same_inside(now.__wrapped__)
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        return _same_object(value)
    raise NotRecognisable


def _same_object(value: Any) -> _Same:
    reference = weakref.ref(value)
    return lambda now: reference() is now


def _content(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return tuple(tuple.__iter__(value) if isinstance(value, tuple) else value)
