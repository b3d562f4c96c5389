"""A cache of compiled programs: a program is used again if nothing that it read has changed.

A program is owned by its objective (for a bound method, by the object it is bound to; for a pytree,
by its function or class). Its key is
the :func:`~gradxform.configuration.configuration_key` of everything that objective and method read.
Without a key a program serves one call. A program holds no reference to objective or method; they
are passed for the duration of a call. So when the caller drops an objective, its programs and data
are freed.
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
from gradxform.glance import glance, identities
from gradxform.objective import Composed

#: number of programs kept, of 1 to 9 MB each; then the least recently used one is dropped
MOST_PROGRAMS = 64


class _Kept(NamedTuple):
    """A program in the cache."""

    owner: weakref.ref[Any]  #: the objective
    run: Callable[..., Any]  #: the compiled program
    ids: list[int] | None = None  #: identities of the values at the last use
    unchanged: Callable[[Any], bool] | None = None  #: a quick test whether nothing has changed


@dataclasses.dataclass
class _Call:
    """The call in progress: what a program needs while it is traced."""

    statics: tuple[Any, ...]  #: objective, method and other arguments that are not arrays
    keys: tuple[Hashable | None, ...] = ()  #: the configuration keys after each trace


_Place = tuple[int, Hashable]  # the id of an owner, and the key
_kept: collections.OrderedDict[_Place, _Kept] = collections.OrderedDict()
_latest: dict[int, _Kept] = {}  #: id of an owner → the program it used last
_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("gradxform_call")


def program(function: Callable[..., Any], fn: Any, *statics: Any) -> Callable[..., Any]:
    """``function(fn, *statics, *arrays)`` as a compiled function of the arrays.

    The values that ``fn`` and ``statics`` read may change between calls of the result.

    Args:
      function: the function to compile, defined at the top level of a module.
      fn: the objective, which owns the program.
      statics: the other arguments that are not arrays.
    """
    owner = _owner(fn)
    own: dict[Hashable | None, Callable[..., Any]] = {}  # also for programs that cannot be cached

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


def _owner(fn: Any) -> Any:
    """The object whose life a program of ``fn`` shares."""
    if isinstance(fn, types.FunctionType):
        return fn
    if isinstance(fn, types.MethodType):
        return fn.__self__
    if isinstance(fn, jax.tree_util.Partial):
        return _owner(fn.func)
    if isinstance(fn, Composed):
        return _owner(fn.model)
    # other pytrees, such as modules, are made anew for new arrays
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(fn))
    return fn if is_leaf else type(fn)


def is_comparable(structure: Any) -> bool:
    """Whether this tree structure has an ``==``; it has none if a node holds arrays as metadata.

    Without it JAX cannot find a compiled program again.
    """
    if jax.tree_util.treedef_is_leaf(structure):
        return True
    data = structure.node_data()
    try:
        equal = data is None or bool(data[1] == data[1])
    except Exception:  # a node class may raise anything
        return False
    return equal and all(is_comparable(child) for child in structure.children())


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # JAX keeps a traced program as long as this function, which holds no reference to the call
    def traced(*arrays: Any) -> Any:
        call = _call.get()
        result = function(*call.statics, *arrays)
        # tracing itself may change what the function reads, for instance a counter of traces
        call.keys += (configuration_key(function, *call.statics),)
        return result

    return jax.jit(traced)


def _find_at_a_glance(owner: Any, values: tuple[Any, ...]) -> Callable[..., Any] | None:
    kept = _latest.get(id(owner))  # to find it by its key would take longer than the test
    if kept is None or kept.owner() is not owner or kept.unchanged is None:
        return None
    return kept.run if kept.unchanged(values) else None


def _find(owner: Any, key: Hashable | None, values: tuple[Any, ...]) -> Callable[..., Any] | None:
    place = (id(owner), key)
    kept = _kept.get(place)
    if kept is None or kept.owner() is not owner:
        return None
    ids = identities(values)
    if ids == kept.ids:  # otherwise the caller creates new objects for each call
        kept = _latest[id(owner)] = kept._replace(unchanged=glance(values))
    _kept[place] = kept._replace(ids=ids)
    with contextlib.suppress(KeyError):  # another thread may have removed it
        _kept.move_to_end(place)
    return kept.run


def _keep(owner: Any, key: Hashable, run: Callable[..., Any]) -> None:
    place = (id(owner), key)

    def forget(
        _: weakref.ref[Any],
        kept: dict[_Place, _Kept] = _kept,
        latest: dict[int, _Kept] = _latest,
    ) -> None:
        kept.pop(place, None)
        latest.pop(place[0], None)

    try:
        _kept[place] = _Kept(weakref.ref(owner, forget), run)
    except TypeError:  # the owner does not support weak references
        return
    while len(_kept) > MOST_PROGRAMS:
        (oldest, _), _ = _kept.popitem(last=False)
        _latest.pop(oldest, None)
