"""A key for everything that a method and an objective read, to find their compiled program.

The key comes from a walk over values. A function is represented by its code, closure, defaults and
the globals it reads (:mod:`gradxform.reads`). An object is represented by its class and attributes,
whatever its ``__eq__`` says, and a container or array by its content. Functions, classes and
modules of known libraries count as constants, but changing objects inside them, such as random
generators, do not. If the walk meets anything else there is no key, and the caller compiles again.
"""

import builtins
import collections
import functools
import inspect
import operator
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from gradxform.content import (
    ABSENT,
    CONTAINERS,
    HEAP_TYPE,
    Found,
    NotRecognisable,
    Walk,
    container,
    content,
    instance,
    is_constant,
    is_library,
    jax_array,
    numpy_array,
    refuse,
)
from gradxform.reads import number, reads, remembered

MOST_VALUES = 5_000  #: largest number of values in a walk; then compiling is about as fast

_WHOLE_MODULES = {"jax", "optax", "gradxform", "chex", "math", "cmath", "functools", "operator"}

# a container that a function only writes to, such as a log, is not read
_WRITES = {
    list: {"append", "extend"},
    set: {"add", "update"},
    dict: {"update"},
    collections.deque: {"append", "appendleft", "extend"},
}

ATOMS = {bool, int, str, bytes, type(None), type(...), type(NotImplemented)}

# attributes of a class that do not affect results, or that change in the interpreter
_BOOKKEEPING = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__"),
    *("__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"),
    *("__static_attributes__", "__dataclass_fields__", "__dataclass_params__", "__orig_bases__"),
    *("__parameters__", "__type_params__", "_abc_impl", "__abstractmethods__"),
}


def configuration_key(*values: Any) -> Hashable | None:
    """A key of values: if two keys are equal, the programs traced from the values are the same.

    It is None if that cannot be known, for instance if a function reads a file, a clock or a
    tracer. The key does not keep the values alive.
    """
    tokens, waiting = [], list(values)
    seen: dict[int, tuple[int, Any]] = {}  # keeps the values alive, so that no id is reused
    try:
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in ATOMS:
                tokens += (kind, value)
            elif kind is float:
                tokens += (kind, value.hex())  # distinguishes -0.0 from 0.0, and nan equals itself
            elif _constants.get(id(value), tokens) is value:
                tokens += ("constant", id(value))
            elif id(value) in seen:
                tokens += ("seen", seen[id(value)][0])
            else:
                found = (_KINDS.get(kind) or _kind_of(kind))(value)
                if found is None:
                    _constants[id(value)] = value
                    tokens += ("constant", id(value))
                    continue
                seen[id(value)] = (len(seen), value)
                tokens += (len(found.tokens), *found.tokens, len(found.parts))
                waiting += found.parts
                if len(seen) + len(waiting) > MOST_VALUES:
                    return None
        key = tuple(tokens)
        hash(key)
    except (NotRecognisable, TypeError, ValueError):
        return None
    return key


_WRITTEN = object()  #: stands for a value that is only written to
_constants: dict[int, Any] = {id(x): x for x in (ABSENT, _WRITTEN)}


T = TypeVar("T")


def constant(value: T) -> T:
    """``value``, which is kept for ever and never changes, so that no walk looks inside."""
    _constants[id(value)] = value
    return value


def is_known_constant(value: Any) -> bool:
    """Whether a walk has found ``value`` to be a constant."""
    return _constants.get(id(value), _WRITTEN) is value


def _function(value: types.FunctionType) -> Found | None:
    if is_constant(value):
        return None
    return Found(("function", reads(value.__code__).number), read_by(value)[1:])


def read_by(value: types.FunctionType) -> tuple[Any, ...]:
    """The code of a function and the values that it reads, in a fixed order.

    Raises:
      NotRecognisable: the function may read other values too.
    """
    code, closure, names = value.__code__, value.__closure__ or (), value.__globals__
    own = (code, value.__defaults__, value.__kwdefaults__, value.__dict__ or None)
    if is_library(names.get("__name__")):
        return (*own, *map(content, closure))
    read = reads(code)
    if read.dynamic or not all(map(is_library, read.modules)):
        raise NotRecognisable
    parts = [*own, *[sys.modules.get(module, ABSENT) for module in read.modules]]
    for root, *rest in read.names:
        held = names[root] if root in names else vars(builtins).get(root, ABSENT)
        parts.append(_at(held, rest) if rest else held)
    for root, *rest in read.variables:
        parts.append(_at(content(closure[code.co_freevars.index(root)]), rest))
    return tuple(parts)


def _at(value: Any, rest: Sequence[str]) -> Any:
    """The value that a chain of attributes reads: an attribute of a module, or the object."""
    for name in rest:
        if not isinstance(value, types.ModuleType):
            return _WRITTEN if name in _WRITES.get(type(value), ()) else value
        if name not in vars(value) and not is_library(value.__name__):
            computed = "__getattr__" in vars(value) or hasattr(type(value), name)
            return value if computed else ABSENT
        value = getattr(value, name, ABSENT)
    return value


def _builtin(value: types.BuiltinFunctionType) -> Found | None:
    if is_constant(value):
        return None
    if value.__self__ is None or isinstance(value.__self__, types.ModuleType):
        raise NotRecognisable
    return Found(("method", value.__name__), (value.__self__,))


def _module(value: types.ModuleType) -> Found | None:
    # numpy and scipy contain random generators; a user's module may contain anything
    if value.__name__.partition(".")[0] not in _WHOLE_MODULES:
        raise NotRecognisable
    return Found(("module", value.__name__))


def _class(value: type) -> Found | None:
    if not value.__flags__ & HEAP_TYPE:  # written in C
        return None if is_library(value.__module__) else refuse(value)
    if is_constant(value):
        return None
    own = {name: x for name, x in vars(value).items() if name not in _BOOKKEEPING}
    return Found((type, number(value)), (type(value), *value.__bases__, *own, *own.values()))


def _descriptor(value: Any) -> Found:
    is_slot = isinstance(value, types.MemberDescriptorType)
    if not is_slot and not is_library(value.__objclass__.__module__):
        raise NotRecognisable
    return Found((type(value), value.__name__), (value.__objclass__,))


def _jitted(value: Any) -> Found | None:
    # the options of jax.jit are hidden, but they never change
    return None if is_constant(value) else Found(("jit", number(value)), (value.__wrapped__,))


def _cached(value: Any) -> Found | None:
    if is_constant(value):
        return None
    return Found(("cache", *value.cache_info(), number(value)), (value.__wrapped__,))


def _ufunc(value: np.ufunc) -> Found:
    if getattr(np, value.__name__, None) is not value:
        raise NotRecognisable
    return Found((np.ufunc, value.__name__))


def _by_value(value: Any) -> Found:
    return Found((type(value), value))


def _reduced(value: Any) -> Found:
    return Found(("reduced",), value.__reduce__())


def _signature(value: inspect.Signature) -> Found:
    kept = ((p.name, int(p.kind), p.default) for p in value.parameters.values())
    return Found((inspect.Signature,), [part for parts in kept for part in parts])


def _complex(value: complex) -> Found:
    return Found((complex, value.real.hex(), value.imag.hex()))


_KINDS: dict[Any, Any] = {
    types.FunctionType: _function,
    types.BuiltinFunctionType: _builtin,
    types.MethodType: lambda x: Found(("bound",), (x.__func__, x.__self__)),
    types.ModuleType: _module,
    types.CellType: lambda x: Found(("cell",), (content(x),)),
    types.CodeType: lambda x: Found(("code", number(x))),
    types.MappingProxyType: lambda x: Found(("proxy",), (dict(x),)),
    types.GetSetDescriptorType: _descriptor,
    types.MemberDescriptorType: _descriptor,
    types.MethodDescriptorType: _descriptor,
    types.WrapperDescriptorType: _descriptor,
    types.ClassMethodDescriptorType: _descriptor,
    types.MethodWrapperType: lambda x: Found(("wrapper", x.__name__), (x.__self__,)),
    property: lambda x: Found((property,), (x.fget, x.fset, x.fdel)),
    staticmethod: lambda x: Found((staticmethod,), (x.__func__,)),
    classmethod: lambda x: Found((classmethod,), (x.__func__,)),
    functools.cached_property: lambda x: Found(("cached",), (x.func,)),
    type(functools.lru_cache(len)): _cached,
    type(jax.jit(len)): _jitted,
    type(jax.enable_x64): lambda x: None,  # JAX itself keeps programs apart by its value
    complex: _complex,
    types.UnionType: lambda x: Found((types.UnionType,), x.__args__),
    inspect.Signature: _signature,
    slice: lambda x: Found((slice,), (x.start, x.stop, x.step)),
    range: lambda x: Found((range,), (x.start, x.stop, x.step)),
    bytearray: lambda x: Found((bytearray, bytes(x))),
    operator.attrgetter: _reduced,
    operator.itemgetter: _reduced,
    operator.methodcaller: _reduced,
    type(collections.namedtuple("_Pair", "first").first): _reduced,  # pyright: ignore
    np.ndarray: numpy_array,
    np.ufunc: _ufunc,
    **{base: container(base) for base in CONTAINERS if base is not object},
}

# how objects of a class are walked: the first entry that is a base of the class decides
_FAMILIES: tuple[tuple[type | tuple[type, ...], Walk], ...] = (
    (jax.Array, jax_array),
    (np.dtype, _by_value),
    (np.generic, lambda x: Found((type(x), x.dtype, x.tobytes()))),
    (
        (
            jax.sharding.Sharding,
            jax.sharding.Mesh,
            jax.sharding.PartitionSpec,
            jax.Device,
            jax.tree_util.PyTreeDef,
        ),
        _by_value,
    ),
    (type, _class),
    (types.ModuleType, _module),
    (types.GenericAlias, lambda x: Found((types.GenericAlias,), (x.__origin__, x.__args__))),
    (np.ndarray, refuse),  # a subclass
)


@remembered
def _kind_of(kind: type) -> Walk:
    return next((walk for family, walk in _FAMILIES if issubclass(kind, family)), None) or (
        instance(kind)
    )
