"""What a function reads from outside: global names, closure variables and their attributes.

``config.sub.scale`` in the source of a function is the *chain* ``("config", "sub", "scale")``. The
chains come from the bytecode, also from that of inner functions.
"""

import dis
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")
_F = TypeVar("_F")

Chain = tuple[str, ...]

_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_CLOSURE = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}

# attributes through which a function reaches values that its source does not name
_DYNAMIC = {
    *("__globals__", "__closure__", "__code__", "__builtins__", "__subclasses__", "__loader__"),
    *("f_globals", "f_locals", "f_back", "gi_frame", "tb_frame", "cell_contents", "__self__"),
}


def remembered(make: Callable[[_T], _F]) -> Callable[[_T], _F]:
    """A cache of ``make`` by the identity of its argument.

    It does not keep the argument alive, and a result is dropped together with its argument.
    """
    results: dict[int, tuple[weakref.ref[Any], _F]] = {}

    def result(value: _T) -> _F:
        key = id(value)
        entry = results.get(key)
        if entry is not None and entry[0]() is value:
            return entry[1]

        def forget(reference: weakref.ref[Any]) -> None:
            if key in results and results[key][0] is reference:
                del results[key]

        made = make(value)
        results[key] = (weakref.ref(value, forget), made)
        return made

    return result


_numbers = itertools.count()


@remembered
def number(value: Any) -> int:
    """A unique number for this object.

    Raises:
      TypeError: the object does not support weak references.
    """
    return next(_numbers)


class Reads(NamedTuple):
    """What a code object reads."""

    number: int  #: the unique number of the code object
    names: tuple[Chain, ...]  #: chains that begin at a global or built-in name
    variables: tuple[Chain, ...]  #: chains that begin at a closure variable
    modules: tuple[str, ...]  #: modules that the function itself imports
    dynamic: bool  #: whether it may also read values that its source does not name


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@remembered
def reads(code: types.CodeType) -> Reads:
    """What a function with this code reads from outside."""
    names, variables, modules = set[Chain](), set[Chain](), set[str]()
    for part in _codes(code):
        chain, into = [], None
        for step in dis.get_instructions(part):
            if into is not None and step.opname in _ATTRIBUTE:
                chain.append(step.argval)
                continue
            if step.opname == "EXTENDED_ARG":
                continue
            if into is not None:
                into.add(tuple(chain))
            is_outer = step.opname in _CLOSURE and step.argval in code.co_freevars
            into = names if step.opname in _GLOBAL else variables if is_outer else None
            chain = [step.argval]
            if step.opname == "IMPORT_NAME":
                modules.add(step.argval)
    spelled = {text for part in _codes(code) for text in (*part.co_names, *part.co_consts)}
    return Reads(
        number(code),
        tuple(sorted(names)),
        tuple(sorted(variables)),
        tuple(sorted(modules)),
        not _DYNAMIC.isdisjoint(spelled),
    )
