"""How containers, objects and arrays are decomposed for the key of a configuration.

See :mod:`gradxform.configuration`.
"""

import collections
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradxform.reads import number

# libraries whose functions and classes are assumed never to change
_LIBRARIES = {
    *("gradxform", "jax", "jaxlib", "optax", "chex", "flax", "equinox", "numpy", "scipy"),
    *("ml_dtypes", "jaxtyping", "lineax", "optimistix", "diffrax", "einops", "builtins", "types"),
    *("abc", "bisect", "cmath", "collections", "contextlib", "copy", "copyreg", "dataclasses"),
    *("enum", "fractions", "functools", "heapq", "inspect", "itertools", "keyword", "math"),
    *("numbers", "operator", "re", "reprlib", "statistics", "string", "struct", "textwrap"),
    *("typing", "typing_extensions", "warnings", "_abc", "_bisect", "_collections"),
    *("_collections_abc", "_functools", "_heapq", "_operator", "_struct", "_typing"),
    *("_weakrefset", "__future__"),
}
# exceptions: functions that draw random numbers or read files
_IMPURE_MODULES = ("numpy.random", "scipy.stats", "scipy.io", "flax.serialization")
_IMPURE_NAMES = {
    *("eval", "exec", "compile", "globals", "open", "input", "id", "__import__", "load", "memmap"),
    *("loadtxt", "genfromtxt", "fromfile", "fromregex", "open_memmap", "tree_deserialise_leaves"),
}

HEAP_TYPE = 1 << 9  #: the flag of a class created at run time, for instance by a class statement
ABSENT = object()  #: stands for a missing value


class NotRecognisable(Exception):
    """The walk met a value whose changes it cannot see."""


class Found(NamedTuple):
    """A decomposed value."""

    tokens: Sequence[Hashable] = ()  #: parts that enter the key directly
    parts: Sequence[Any] = ()  #: values to be walked next


Walk = Callable[[Any], Found | None]  # None for a constant


def is_library(module: object) -> bool:
    if not isinstance(module, str) or module.startswith(_IMPURE_MODULES):
        return False
    return module.partition(".")[0] in _LIBRARIES


def is_constant(value: Any) -> bool:
    """Whether this is a function or class that a library exports under its own name.

    Raises:
      NotRecognisable: it is, but its results may change from call to call.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None and isinstance(value, types.BuiltinFunctionType):
        module = getattr(value.__self__, "__name__", None)
    if not (is_library(module) and isinstance(name, str)):
        return False
    # functools.wraps may give a user's function the name of a library's function
    code = value if isinstance(value, types.FunctionType) else getattr(value, "__wrapped__", None)
    if isinstance(code, types.FunctionType) and not is_library(code.__globals__.get("__name__")):
        return False
    found: Any = sys.modules.get(str(module))
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is value and name in _IMPURE_NAMES:
        raise NotRecognisable
    return found is value


def content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


CONTAINERS = {
    list: lambda x: (*list.__iter__(x),),
    tuple: lambda x: (*tuple.__iter__(x),),
    collections.OrderedDict: lambda x: (*collections.OrderedDict.items(x),),
    collections.defaultdict: lambda x: (x.default_factory, *dict.items(x)),
    collections.deque: lambda x: (x.maxlen, *x),
    dict: lambda x: (*dict.keys(x), *dict.values(x)),
    set: lambda x: (*set.__iter__(x),),
    frozenset: lambda x: (*frozenset.__iter__(x),),
    functools.partial: lambda x: (x.func, x.args, x.keywords),
    int: lambda x: (int.__int__(x),),
    float: lambda x: (float.__float__(x),),
    str: lambda x: (str.__str__(x),),
    bytes: lambda x: (bytes.__getitem__(x, slice(None)),),
    object: lambda x: (),
}


def container(base: type) -> Walk:
    parts = CONTAINERS[base]

    def found(value: Any) -> Found | None:
        return Found((base,), parts(value))

    return found


def _slots(kind: type, base: type) -> list[types.MemberDescriptorType]:
    return [
        slot
        for cls in kind.__mro__
        if cls.__flags__ & HEAP_TYPE and not issubclass(base, cls)
        for slot in vars(cls).values()
        if type(slot) is types.MemberDescriptorType
    ]


_POINTER = object.__basicsize__ // 2  #: bytes


def _own_size(kind: type) -> int:
    """The size of an object in bytes, without the pointers to ``__dict__`` and weak references."""
    counted = kind.__dictoffset__ > 0 or kind.__dictoffset__ == -_POINTER
    return kind.__basicsize__ - _POINTER * (counted + (kind.__weakrefoffset__ > 0))


def instance(kind: type) -> Walk:
    """How to walk objects of a class: the content, if it is a container, and the attributes."""
    base = next(cls for cls in kind.__mro__ if cls in CONTAINERS)
    slots = len(_slots(kind, base))
    # an object larger than its attributes is implemented in C and may hold anything
    if _own_size(kind) != _own_size(base) + _POINTER * slots:
        return refuse

    def found(value: Any) -> Found | None:
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            attributes = None
        if attributes and "__qualname__" in attributes and is_constant(value):
            return None
        # slots belong to the class, and this function must not keep the class alive
        own = _slots(type(value), base) if slots else ()
        filled = [_slot_value(slot, value) for slot in own]
        return Found((base,), (type(value), attributes, *filled, *CONTAINERS[base](value)))

    return found


def _slot_value(slot: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return ABSENT


def refuse(value: Any) -> Found | None:
    if is_constant(value):
        return None
    raise NotRecognisable


def numpy_array(value: np.ndarray) -> Found | None:
    if value.dtype.hasobject:
        return Found((np.ndarray, value.shape), value.ravel().tolist())
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    digest = flat.tobytes() if flat.size <= 256 else hashlib.blake2b(flat.data).digest()
    return Found((np.ndarray, value.dtype, value.shape, digest))


def jax_array(value: jax.Array) -> Found | None:
    if isinstance(value, Tracer) or value.is_deleted():
        raise NotRecognisable
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
    if is_key or value.size > 64 or not value.is_fully_addressable:
        return Found((jax.Array, number(value)))  # a JAX array never changes
    kind = (value.dtype, value.shape, value.weak_type, value.committed, value.sharding)
    return Found((jax.Array, *kind, np.asarray(value).tobytes()))
