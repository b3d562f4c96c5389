"""The members of a sweep: their hyperparameters and seeds. Imports neither JAX nor Optax."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from gradxform.lab.experiment import catalogue, methods
from gradxform.lab.experiment.problems import Problem, suggest

Table: TypeAlias = Mapping[str, Any]
Axes: TypeAlias = Mapping[str, "Axis"]  # by dotted path in an optimiser's table

MAX_MEMBERS = 10**6
_FEW = 40  # names in a message
_SCALES = ("log", "linear")


class Axis(NamedTuple):
    """The values of one hyperparameter: a list or a range."""

    listed: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    points: int | None = None  #: points of the range; None to draw random ones

    def values(self) -> tuple[float, ...]:
        """The values on a grid; the ends of a range are exact.

        >>> Axis(low=0.01, high=1.0, is_log=True, points=3).values()
        (0.01, 0.1, 1.0)
        """
        if self.listed:
            return self.listed
        steps = (self.points or 2) - 1
        return (self.low, *(self._between(i / steps) for i in range(1, steps)), self.high)

    def draw(self, generator: random.Random) -> float:
        """A random value, uniform on the scale of the range."""
        if self.listed:
            return generator.choice(self.listed)
        return self._between(generator.random())

    def _between(self, part: float) -> float:
        """A value between the ends, rounded to six digits and kept inside the range."""
        if self.is_log:
            value = self.low ** (1 - part) * self.high**part
        else:
            value = (1 - part) * self.low + part * self.high
        return min(max(float(f"{value:.6g}"), self.low), self.high)


class Member(NamedTuple):
    """One run of a sweep."""

    label: str  #: label of the optimiser
    values: Mapping[str, float]  #: hyperparameters, by dotted path in the optimiser's table
    seed: int  #: counted from 0


def read_axes(table: Any, path: str) -> tuple[dict[str, Axis], list[Problem]]:
    """The axes of a table like ``{b2 = [0.9, 0.99], eps = {log = [1e-9, 1e-7], points = 9}}``.

    A hyperparameter inside a link or a schedule has a dotted path, ``chain.1.learning_rate`` or
    ``learning_rate.init_value``.

    Args:
      table: nested tables whose leaves are axes.
      path: the path of the table in the config, for messages.

    >>> axes, problems = read_axes({"chain": {"1": {"b2": [0.9, 0.99]}}}, "sweep.axes")
    >>> axes["chain.1.b2"].values(), problems
    ((0.9, 0.99), [])
    """
    axes: dict[str, Axis] = {}
    problems: list[Problem] = []

    def walk(value: Any, keys: tuple[str, ...]) -> None:
        where = ".".join((path, *keys))
        if isinstance(value, Mapping) and not any(scale in value for scale in _SCALES):
            if not value and keys:
                problems.append(Problem(where, f"should be {_WANTED}, found an empty table"))
            for key, inner in value.items():
                walk(inner, (*keys, key))
            return
        try:
            axis = _axis(value)
        except ValueError as error:
            problems.append(Problem(where, str(error)))
            return
        if ".".join(keys) in axes:
            problems.append(Problem(where, "appears twice: as a dotted key and as nested tables"))
        axes[".".join(keys)] = axis

    walk(table, ())
    return axes, problems


def members(
    tables: Mapping[str, Table],
    axes: Axes,
    overrides: Mapping[str, Axes],
    *,
    seeds: int = 1,
    samples: int | None = None,
    seed: int = 0,
) -> tuple[Member, ...]:
    """All runs of a sweep: for every optimiser its grid, or random points, times the seeds.

    Args:
      tables: the tables of the optimisers, by label.
      axes: axes of every optimiser that has the hyperparameter.
      overrides: by label, axes of single optimisers, in addition to or instead of ``axes``.
      seeds: runs of each point.
      samples: number of random points of each optimiser that has an axis, instead of the grid.
      seed: seed of the random points.

    >>> rates = {"learning_rate": Axis((0.1, 0.2))}
    >>> found = members({"a": {"method": "sgd"}, "b": {"method": "lbfgs"}}, rates, {}, seeds=2)
    >>> [(m.label, m.values, m.seed) for m in found][1:]
    [('a', {'learning_rate': 0.1}, 1), ('a', {'learning_rate': 0.2}, 0),
     ('a', {'learning_rate': 0.2}, 1), ('b', {}, 0), ('b', {}, 1)]
    """
    return tuple(_members(tables, axes, overrides, seeds, samples, seed))


def count(
    tables: Mapping[str, Table],
    axes: Axes,
    overrides: Mapping[str, Axes],
    *,
    seeds: int = 1,
    samples: int | None = None,
) -> int:
    """The number of :func:`members`, without making them."""
    total = 0
    for label, table in tables.items():
        own = _axes_of(label, table, axes, overrides)
        grid = math.prod(len(a.listed) or a.points or 1 for a in own.values())
        total += seeds * (samples if samples and own else grid)
    return total


def check(
    tables: Mapping[str, Table], axes: Axes, overrides: Mapping[str, Axes], samples: int | None
) -> Iterator[Problem]:
    """Checks the axes against the signatures of the optimisers."""
    # read each table only once, else many axes of many optimisers would take too long
    numbers = {label: catalogue.numbers(table) for label, table in tables.items()}
    bad = {label for label, table in tables.items() if any(methods.check(table, ""))}
    having: dict[str, list[str]] = {}
    for label, own in numbers.items():
        for name in own:
            having.setdefault(name, []).append(label)
    for name, axis in axes.items():
        where = f"sweep.axes.{name}"
        yield from _check_points(axis, samples, where)
        if name not in having and not bad:
            hint = suggest(name, having) or f"; they have {_few(sorted(having))}"
            yield Problem(where, f"no optimiser has such a number{hint}")
        refusals = (
            Problem(where, f"{problem.message} (optimiser {label})")
            for label in having.get(name, ())
            if label not in bad  # reported already
            for problem in _check_values(tables[label], numbers[label], name, axis, where)
        )
        yield from itertools.islice(refusals, 1)
    for label, own_axes in overrides.items():
        if label not in tables:
            hint = suggest(label, tables) or f"; the labels are {_few(tables)}"
            yield Problem(f"sweep.overrides.{label}", f"no optimiser has this label{hint}")
            continue
        for name, axis in own_axes.items():
            where = f"sweep.overrides.{label}.{name}"
            yield from _check_points(axis, samples, where)
            if name not in numbers[label]:
                hint = suggest(name, numbers[label]) or f"; it has {_few(numbers[label])}"
                yield Problem(where, f"{label} has no such number{hint}")
            elif label not in bad:
                yield from _check_values(tables[label], numbers[label], name, axis, where)


def _few(names: Iterable[str]) -> str:
    """The first few names, as text."""
    known = list(names)
    return f"{', '.join(known[:_FEW])}{', ...' if len(known) > _FEW else ''}" or "none"


def substitute(table: Any, values: Mapping[str, Any]) -> Any:
    """An optimiser's table with ``values`` put at their dotted paths.

    >>> substitute({"chain": [{"method": "sgd"}]}, {"chain.0.learning_rate": 0.1})
    {'chain': [{'method': 'sgd', 'learning_rate': 0.1}]}
    """
    for path, value in values.items():
        table = _put(table, path.split("."), value)
    return table


def _put(table: Any, keys: Sequence[str], value: Any) -> Any:
    if not keys:
        return value
    first, *rest = keys
    if isinstance(table, list):
        return [_put(x, rest, value) if str(i) == first else x for i, x in enumerate(table)]
    return {**table, first: _put(table.get(first), rest, value)}


def _members(
    tables: Mapping[str, Table],
    axes: Axes,
    overrides: Mapping[str, Axes],
    seeds: int,
    samples: int | None,
    seed: int,
) -> Iterator[Member]:
    for label, table in tables.items():
        own = _axes_of(label, table, axes, overrides)
        if samples and own:
            generator = random.Random(f"{seed} {label}")
            points = [[axis.draw(generator) for axis in own.values()] for _ in range(samples)]
        else:
            points = itertools.product(*(axis.values() for axis in own.values()))
        for point in points:
            values = dict(zip(own, point, strict=True))
            yield from (Member(label, values, s) for s in range(seeds))


def _axes_of(
    label: str, table: Table, axes: Axes, overrides: Mapping[str, Axes]
) -> dict[str, Axis]:
    numbers = catalogue.numbers(table)
    shared = {name: axis for name, axis in axes.items() if name in numbers}
    return {**shared, **overrides.get(label, {})}


_WANTED = (
    "a list of numbers, or a range like {log = [1e-4, 1.0], points = 9} or "
    "{linear = [0.0, 0.9], points = 4}"
)


def _axis(value: Any) -> Axis:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"should be {_WANTED}, found an empty list")
        if not all(map(_is_number, value)):
            raise ValueError(f"should be {_WANTED}, found {value!r}")
        if len(set(value)) < len(value):
            raise ValueError(f"lists a value twice: {value!r}")
        return Axis(tuple(value))
    if not isinstance(value, Mapping):
        raise ValueError(f"should be {_WANTED}, found {value!r}")
    scale = next(scale for scale in _SCALES if scale in value)
    unknown = value.keys() - {scale, "points"}
    ends, points = value[scale], value.get("points")
    if unknown or not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))):
        raise ValueError(f"should be {_WANTED}, found {dict(value)!r}")
    low, high = ends
    if not low < high or (scale == "log" and low <= 0):
        raise ValueError(f"{scale} = {ends!r}: the first should be below the second, both positive")
    if points is not None and not (type(points) is int and 2 <= points <= MAX_MEMBERS):
        raise ValueError(f"points = {points!r}: should be a whole number of at least 2")
    return Axis((), float(low), float(high), scale == "log", points)


def _check_points(axis: Axis, samples: int | None, where: str) -> Iterator[Problem]:
    if not axis.listed and (axis.points is None) == (samples is None):
        if samples is None:
            yield Problem(where, "a range needs points = N, or sweep.samples for random points")
        else:
            yield Problem(where, "points are for a grid: leave them out, or remove sweep.samples")


def _check_values(
    table: Table, numbers: Mapping[str, bool], name: str, axis: Axis, where: str
) -> Iterator[Problem]:
    if numbers[name] and not axis.listed:
        yield Problem(where, "takes whole numbers: list them, like [4, 8, 16]")
        return
    for value in axis.listed or (axis.low, axis.high):
        problems = list(methods.check(substitute(table, {name: value}), ""))
        if problems:
            yield Problem(where, problems[0].message)
            return


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= methods.LARGEST
