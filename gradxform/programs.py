"""Compiled programs, found again where nothing that they read has changed.

A program belongs to its objective (for a bound method, to the object it is bound to). It is found
by :func:`~gradxform.configuration.configuration_key` of everything that objective and method read.
Without a key it serves one call. A program refers to neither objective nor method: both are handed
over for the time of a call, so when the caller drops an objective its programs and data go with it.
"""

import collections
import contextlib
import contextvars
import dataclasses
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from gradxform.configuration import configuration_key
from gradxform.glance import glance

#: programs kept, of 1 to 9 MB each; beyond them the one not used for longest is dropped
MOST_PROGRAMS = 64


class _Kept(NamedTuple):
    owner: weakref.ref[Any]
    run: Callable[..., Any]
    ids: tuple[int, ...] = ()  #: of the values when it was found last
    unchanged: Callable[[Any], bool] | None = None  #: whether what they read is the same


@dataclasses.dataclass
class _Call:
    """What the call in progress hands to a program that is traced."""

    statics: tuple[Any, ...]
    keys: tuple[Hashable | None, ...] = ()  #: after each trace


_kept: collections.OrderedDict[Hashable, _Kept] = collections.OrderedDict()
_latest: dict[int, Hashable] = {}  #: where the program is that an owner used last
_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("gradxform_call")


def program(function: Callable[..., Any], fn: Any, *statics: Any) -> Callable[..., Any]:
    """``function(fn, *statics, *arrays)`` as a compiled function of the arrays.

    What ``fn`` and ``statics`` read may change from one call of the result to the next.

    Args:
      function: what to compile; a function of a module.
      fn: the objective, which owns the program.
      statics: whatever else is not an array.
    """
    owner = fn.__self__ if isinstance(fn, types.MethodType) else fn
    own: dict[Hashable | None, Callable[..., Any]] = {}  # also serve what cannot be kept

    def solve(*arrays: Any) -> Any:
        values = (function, fn, *statics)
        run, key = _find_at_a_glance(owner, values), None
        at_a_glance = run is not None
        if run is None:
            key = configuration_key(*values)
            run = _find(owner, key, values) or own.get(key) or _compiled(function)
            own[key] = run
        call = _Call((fn, *statics))
        token = _call.set(call)
        try:
            result = run(*arrays)
        finally:
            _call.reset(token)
        if call.keys and (at_a_glance or key is not None):
            for reached in {key, *call.keys} - {None}:
                _keep(owner, reached, run)
        return result

    return solve


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # JAX keeps what it traced as long as this function, which refers to nothing of the call
    def traced(*arrays: Any) -> Any:
        call = _call.get()
        result = function(*call.statics, *arrays)
        # what it reads may have changed by the trace itself, for instance where it counts traces
        call.keys += (configuration_key(function, *call.statics),)
        return result

    return jax.jit(traced)


def _find_at_a_glance(owner: Any, values: tuple[Any, ...]) -> Callable[..., Any] | None:
    kept = _kept.get(_latest.get(id(owner)))
    if kept is None or kept.owner() is not owner or kept.unchanged is None:
        return None
    return kept.run if kept.unchanged(values) else None


def _find(owner: Any, key: Hashable | None, values: tuple[Any, ...]) -> Callable[..., Any] | None:
    place = (id(owner), key)
    kept = _kept.get(place)
    if kept is None or kept.owner() is not owner:
        return None
    ids = tuple(map(id, values))
    if ids == kept.ids:  # else they are made anew for each call
        kept = kept._replace(unchanged=glance(values))
        _latest[id(owner)] = place
    _kept[place] = kept._replace(ids=ids)
    with contextlib.suppress(KeyError):  # another thread may have dropped it
        _kept.move_to_end(place)
    return kept.run


def _keep(owner: Any, key: Hashable, run: Callable[..., Any]) -> None:
    place = (id(owner), key)

    def forget(
        _: weakref.ref[Any],
        kept: dict[Hashable, _Kept] = _kept,
        latest: dict[int, Hashable] = _latest,
    ) -> None:
        kept.pop(place, None)
        latest.pop(place[0], None)

    try:
        _kept[place] = _Kept(weakref.ref(owner, forget), run)
    except TypeError:  # it cannot be referenced weakly
        return
    while len(_kept) > MOST_PROGRAMS:
        _kept.popitem(last=False)
