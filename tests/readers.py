"""Ways in which a function can read a value from outside its argument.

Each builder makes ``fn(x) = body(value, x)`` and a function that changes the value. A new way is
one function with ``@reader``; ``recognised=False`` where a compiled program cannot be found again.
"""

import collections
import contextvars
import dataclasses
import enum
import functools
import operator
import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Body = Callable[[Any, Any], Any]
Function = Callable[[Any], Any]
Change = Callable[[float], None]


class Reader(NamedTuple):
    build: Callable[[Body], tuple[Function, Change]]
    recognised: bool


READERS: dict[str, Reader] = {}


def reader(build: Any = None, *, recognised: bool = True) -> Any:
    if build is None:
        return functools.partial(reader, recognised=recognised)
    READERS[build.__name__] = Reader(build, recognised)
    return build


class Holder:
    """An object whose ``value`` is read."""

    value: Any = 1.0


def setter(holder: Any, name: str = "value") -> Change:
    return lambda value: setattr(holder, name, value)


def with_globals(fn: Any, **names: Any) -> tuple[Any, dict[str, Any]]:
    """The function as if written in a module of its own."""
    own = {"__name__": "somebody", "__builtins__": __builtins__, **names}
    return types.FunctionType(fn.__code__, own), own


@reader
def closure(body: Body) -> tuple[Function, Change]:
    value = 1.0

    def change(new: float) -> None:
        nonlocal value
        value = new

    return lambda x: body(value, x), change


@reader
def closure_of_an_inner_function(body: Body) -> tuple[Function, Change]:
    value = 1.0

    def change(new: float) -> None:
        nonlocal value
        value = new

    return lambda x: sum((lambda y: body(value, y))(z) for z in [x]), change


@reader
def default(body: Body) -> tuple[Function, Change]:
    def fn(x: Any, value: float = 1.0) -> Any:
        return body(value, x)

    return fn, lambda value: setattr(fn, "__defaults__", (value,))


@reader
def mutable_default(body: Body) -> tuple[Function, Change]:
    held = [1.0]

    def fn(x: Any, held: list[float] = held) -> Any:
        return body(held[0], x)

    return fn, functools.partial(operator.setitem, held, 0)


@reader
def keyword_default(body: Body) -> tuple[Function, Change]:
    def fn(x: Any, *, value: float = 1.0) -> Any:
        return body(value, x)

    return fn, lambda value: setattr(fn, "__kwdefaults__", {"value": value})


@reader
def global_name(body: Body) -> tuple[Function, Change]:
    fn, own = with_globals(lambda x: BODY(VALUE, x), BODY=body, VALUE=1.0)  # noqa: F821 # pyright: ignore
    return fn, functools.partial(operator.setitem, own, "VALUE")


@reader
def redefined_helper(body: Body) -> tuple[Function, Change]:
    fn, own = with_globals(lambda x: BODY(helper(), x), BODY=body, helper=lambda: 1.0)  # noqa: F821 # pyright: ignore
    return fn, lambda value: own.update(helper=lambda: value)


@reader
def global_of_a_helper(body: Body) -> tuple[Function, Change]:
    helper, own = with_globals(lambda: VALUE, VALUE=1.0)  # noqa: F821 # pyright: ignore
    return lambda x: body(helper(), x), functools.partial(operator.setitem, own, "VALUE")


@reader
def module(body: Body) -> tuple[Function, Change]:
    settings: Any = types.ModuleType("somebody_settings")
    settings.value = 1.0
    return lambda x: body(settings.value, x), setter(settings)


@reader
def submodule(body: Body) -> tuple[Function, Change]:
    package: Any = types.ModuleType("somebody")
    settings: Any = types.ModuleType("somebody.settings")
    package.settings, settings.value = settings, 1.0
    return lambda x: body(package.settings.value, x), setter(settings)


@reader
def function_of_a_module(body: Body) -> tuple[Function, Change]:
    library: Any = types.ModuleType("somebody_library")
    library.helper = lambda: library.value
    library.value = 1.0
    return lambda x: body(library.helper(), x), setter(library)


@reader(recognised=False)
def module_by_another_name(body: Body) -> tuple[Function, Change]:
    settings: Any = types.ModuleType("somebody_settings")
    settings.value = 1.0

    def fn(x: Any) -> Any:
        local = settings
        return body(local.value, x)

    return fn, setter(settings)


@reader(recognised=False)
def dictionary_of_a_module(body: Body) -> tuple[Function, Change]:
    settings: Any = types.ModuleType("somebody_settings")
    settings.value = 1.0
    return lambda x: body(settings.__dict__["value"], x), setter(settings)


@reader(recognised=False)
def import_inside(body: Body) -> tuple[Function, Change]:
    settings = Holder()

    def fn(x: Any) -> Any:
        import somebody_imported  # pyright: ignore[reportMissingImports]

        return body(somebody_imported.values[id(settings)].value, x)

    imported: Any = sys.modules.setdefault("somebody_imported", types.ModuleType("imported"))
    imported.values = {**getattr(imported, "values", {}), id(settings): settings}
    return fn, setter(settings)


@reader
def class_attribute(body: Body) -> tuple[Function, Change]:
    class Settings(Holder):
        pass

    return lambda x: body(Settings.value, x), setter(Settings)


@reader
def inherited_attribute(body: Body) -> tuple[Function, Change]:
    class Base(Holder):
        pass

    class Settings(Base):
        pass

    settings = Settings()
    return lambda x: body(settings.value, x), setter(Base)


@reader
def metaclass_attribute(body: Body) -> tuple[Function, Change]:
    class Meta(type):
        value = 1.0

    class Settings(metaclass=Meta):
        pass

    return lambda x: body(Settings.value, x), setter(Meta)


@reader
def mutable_class_attribute(body: Body) -> tuple[Function, Change]:
    class Settings:
        values = {"value": [1.0]}  # noqa: RUF012

    change = functools.partial(operator.setitem, Settings.values["value"], 0)
    return lambda x: body(Settings().values["value"][0], x), change


@reader
def namespace(body: Body) -> tuple[Function, Change]:
    settings = types.SimpleNamespace(inner=types.SimpleNamespace(value=1.0))
    return lambda x: body(settings.inner.value, x), setter(settings.inner)


@reader
def attribute_by_its_name(body: Body) -> tuple[Function, Change]:
    settings = Holder()
    get = operator.attrgetter("value")
    return lambda x: body(get(settings) + getattr(settings, "value") * 0, x), setter(settings)  # noqa: B009


@reader
def cyclic_object(body: Body) -> tuple[Function, Change]:
    settings: Any = Holder()
    settings.all = [settings]
    settings.all.append(settings.all)
    return lambda x: body(settings.all[1][0].value, x), setter(settings)


@reader
def slot(body: Body) -> tuple[Function, Change]:
    class Base:
        __slots__ = ("value",)

    class Settings(Base):
        __slots__ = ("other",)

    settings = Settings()
    settings.value = 1.0
    return lambda x: body(settings.value, x), setter(settings)


@reader
def field_left_out_of_comparison(body: Body) -> tuple[Function, Change]:
    @dataclasses.dataclass
    class Objective:
        value: float = dataclasses.field(default=1.0, compare=False)

        def __call__(self, x: Any) -> Any:
            return body(self.value, x)

    objective = Objective()
    return objective, setter(objective)


@reader
def equal_to_everything(body: Body) -> tuple[Function, Change]:
    class Objective(Holder):
        __hash__ = lambda self: 1
        __eq__ = lambda self, other: True

        def __call__(self, x: Any) -> Any:
            return body(self.value, x)

    objective = Objective()
    return objective, setter(objective)


@reader
def bound_method(body: Body) -> tuple[Function, Change]:
    class Objective(Holder):
        def loss(self, x: Any) -> Any:
            return body(self.value, x)

    objective = Objective()
    return objective.loss, setter(objective)


@reader
def replaced_method(body: Body) -> tuple[Function, Change]:
    class Objective:
        def __call__(self, x: Any) -> Any:
            return body(1.0, x)

    def change(value: float) -> None:
        Objective.__call__ = lambda self, x: body(value, x)

    return Objective(), change


@reader
def class_and_static_methods(body: Body) -> tuple[Function, Change]:
    class Objective(Holder):
        @classmethod
        def read(cls) -> float:
            return cls.value

        @staticmethod
        def loss(value: float, x: Any) -> Any:
            return body(value, x)

    return lambda x: Objective.loss(Objective.read(), x), setter(Objective)


@reader
def computed_property(body: Body) -> tuple[Function, Change]:
    settings = Holder()

    class Objective:
        @property
        def read(self) -> float:
            return settings.value

        def __call__(self, x: Any) -> Any:
            return body(self.read, x)

    return Objective(), setter(settings)


@reader
def dynamic_attribute(body: Body) -> tuple[Function, Change]:
    values = {"value": 1.0}

    class Settings:
        def __getattr__(self, name: str) -> float:
            return values[name]

    settings = Settings()
    return lambda x: body(settings.value, x), functools.partial(operator.setitem, values, "value")


@reader
def descriptor(body: Body) -> tuple[Function, Change]:
    class Read(Holder):
        def __get__(self, instance: object, owner: type) -> float:
            return self.value

    read = Read()
    settings: Any = type("Settings", (), {"read": read})()
    return lambda x: body(settings.read, x), setter(read)


@reader
def inherited_call(body: Body) -> tuple[Function, Change]:
    class Base(Holder):
        def read(self) -> float:
            return type(self).value

    class Objective(Base):
        def __call__(self, x: Any) -> Any:
            return body(super().read(), x)

    return Objective(), setter(Base)


@reader
def partial(body: Body) -> tuple[Function, Change]:
    fn = functools.partial(lambda x, value: body(value, x), value=1.0)
    return fn, functools.partial(operator.setitem, fn.keywords, "value")


@reader
def decorator_with_state(body: Body) -> tuple[Function, Change]:
    state = Holder()

    @functools.wraps(jnp.sum)
    def fn(x: Any) -> Any:
        return body(state.value, x)

    return fn, setter(state)


@reader
def function_attribute(body: Body) -> tuple[Function, Change]:
    def fn(x: Any) -> Any:
        return body(fn.value, x)  # pyright: ignore[reportFunctionMemberAccess]

    fn.value = 1.0  # pyright: ignore[reportFunctionMemberAccess]
    return fn, setter(fn)


@reader
def replaced_code(body: Body) -> tuple[Function, Change]:
    value: Any = None
    fn = lambda x: body(1.0 + 0 * bool(value), x)
    texts = {0.5: lambda x: body(0.5 + 0 * bool(value), x)}
    texts |= {1.0: lambda x: body(1.0 + 0 * bool(value), x)}
    texts |= {2.0: lambda x: body(2.0 + 0 * bool(value), x)}
    return fn, lambda new: setattr(fn, "__code__", texts[new].__code__)


@reader
def containers(body: Body) -> tuple[Function, Change]:
    held: Any = {"list": [(1.0, collections.deque([{1.0}]))]}

    def change(value: float) -> None:
        held["list"][0][1][0].clear()
        held["list"][0][1][0].add(value)

    return lambda x: body(next(iter(held["list"][0][1][0])), x), change


@reader
def dictionaries_of_other_kinds(body: Body) -> tuple[Function, Change]:
    class Settings(dict):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    inner = collections.defaultdict(lambda: 0.0, a=1.0)
    held: Any = Settings(inner=types.MappingProxyType(inner))
    return lambda x: body(held.inner["a"], x), functools.partial(operator.setitem, inner, "a")


@reader
def order_of_a_dictionary(body: Body) -> tuple[Function, Change]:
    held = collections.OrderedDict.fromkeys([1.0, 0.5, 2.0])
    return lambda x: body(next(iter(held)), x), lambda value: held.move_to_end(value, last=False)


@reader
def small_numpy_array(body: Body) -> tuple[Function, Change]:
    array: Any = np.ones(3, np.float32)
    return lambda x: body(array[1], x), functools.partial(operator.setitem, array, 1)


@reader
def large_numpy_array(body: Body) -> tuple[Function, Change]:
    array: Any = np.ones((100, 100), np.float32)
    return lambda x: body(array[50, 50], x), functools.partial(operator.setitem, array, (50, 50))


@reader
def jax_array(body: Body) -> tuple[Function, Change]:
    settings = Holder()
    fn = lambda x: body(jnp.asarray(settings.value)[500], x)
    settings.value = jnp.ones(1000)
    return fn, lambda value: setattr(settings, "value", jnp.full(1000, value))


@reader
def enumeration(body: Body) -> tuple[Function, Change]:
    class Scale(enum.Enum):
        half, one, two = 0.5, 1.0, 2.0

    settings = Holder()
    settings.value = Scale.one
    return lambda x: body(settings.value.value, x), lambda v: setattr(settings, "value", Scale(v))


@reader
def monkeypatched_library(body: Body) -> tuple[Function, Change]:
    settings = Holder()
    jnp.gradxform_test_value = lambda value: value  # pyright: ignore[reportAttributeAccessIssue]
    read: Any = jnp
    return lambda x: body(read.gradxform_test_value(settings.value), x), setter(settings)


@reader(recognised=False)
def environment(body: Body) -> tuple[Function, Change]:
    name = f"GRADXFORM_TEST_{id(body)}_{len(os.environ)}"
    os.environ[name] = "1.0"
    return lambda x: body(float(os.environ[name]), x), lambda v: os.environ.update({name: str(v)})


@reader(recognised=False)
def globals_by_name(body: Body) -> tuple[Function, Change]:
    fn, own = with_globals(lambda x: BODY(globals()["VALUE"], x), BODY=body, VALUE=1.0)  # noqa: F821 # pyright: ignore
    return fn, functools.partial(operator.setitem, own, "VALUE")


@reader(recognised=False)
def context_variable(body: Body) -> tuple[Function, Change]:
    variable = contextvars.ContextVar("variable", default=1.0)
    return lambda x: body(variable.get(), x), variable.set  # pyright: ignore[reportReturnType]


@reader(recognised=False)
def weak_reference(body: Body) -> tuple[Function, Change]:
    settings = Holder()
    reference: Any = weakref.ref(settings)
    return lambda x: body(reference().value, x), setter(settings)


@reader(recognised=False)
def long_list(body: Body) -> tuple[Function, Change]:
    values = [1.0] * 10_000
    return lambda x: body(values[9_000], x), functools.partial(operator.setitem, values, 9_000)
