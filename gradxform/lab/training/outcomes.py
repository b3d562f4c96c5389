"""What a race and a sweep return, and how their optimisers are ranked."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from gradxform.lab.experiment.grid import Member

Row = dict[str, Any]
RUNAWAY = 100.0


class History(NamedTuple):
    """The result of one optimiser."""

    label: str
    rows: tuple[Row, ...]  #: metrics after each epoch, or at each step on a surface
    diverged: bool
    """whether the loss or parameters were not finite (then the run stopped), or the last loss was
    more than :data:`RUNAWAY` times the loss at the start"""
    steps_per_second: float  #: updates, in the median epoch, without compilation
    compile_seconds: float
    params: Any  #: the final parameters, as ``gradxform.eval_params`` returns them


class RaceResult(NamedTuple):
    """The results of all optimisers of a race."""

    name: str
    measure: Literal["train_loss", "value"]  #: the metric that ranks the optimisers
    histories: tuple[History, ...]  #: in the order of the config
    unit: str  #: unit of the measure, in words; "" on a surface
    data: Any = None  #: the points of a curve fit, or the solution of an equation from a folder

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all histories, each with its ``optimizer``.

        ``pandas.DataFrame(result.rows)`` is a table.
        """
        return tuple({"optimizer": h.label, **row} for h in self.histories for row in h.rows)

    @property
    def ranking(self) -> tuple[History, ...]:
        """The histories, best first; see :func:`ranked`."""
        return ranked(self)


def ranked(result: RaceResult) -> tuple[History, ...]:
    """The histories sorted by the last ``result.measure``: best first, diverged ones last."""

    def place(history: History) -> tuple[bool, float]:
        last = history.rows[-1][result.measure]
        return history.diverged, last if math.isfinite(last) else math.inf

    return tuple(sorted(result.histories, key=place))


def ran_away(loss: float, first: float) -> bool:
    """Whether a loss of at least 0 is more than :data:`RUNAWAY` times the loss at the start.

    >>> ran_away(2e10, 2.3), ran_away(20.0, 2.3), ran_away(1e-30, 0.0)
    (True, False, False)
    """
    return 0 < first < math.inf and loss > RUNAWAY * first


class SweepResult(NamedTuple):
    """The results of all members of a sweep."""

    name: str
    measure: Literal["validation_loss", "train_loss", "work"]  #: the metric that compares members
    unit: str  #: unit of the measure, in words
    members: tuple[Member, ...]
    rows: tuple[Row, ...]
    """one row per member: ``optimizer``, its hyperparameters, ``seed``, the ``epochs`` and
    ``steps`` that it ran, ``diverged``, ``dropped``, its share of the ``seconds``, the ``cost`` of
    its last epoch, and the final metrics. For a surface see :func:`sweep_on_surface`.
    ``pandas.DataFrame(result.rows)`` is a tidy table"""
    costs: np.ndarray
    """training cost of every epoch, (members, epochs), NaN for epochs that did not run; there are
    no epochs on a surface"""
    seconds: float  #: training time, without compilation and evaluation
    compile_seconds: float

    @property
    def is_on_surface(self) -> bool:
        """Whether the members are minimisations of a surface, of which some may fail."""
        return self.measure == "work"

    @property
    def points(self) -> "dict[str, tuple[Point, ...]]":
        """The points of each optimiser by label; see :func:`points_of`."""
        return points_of(self)

    @property
    def best(self) -> "tuple[Point, ...]":
        """The best point of each optimiser, best first; see :func:`best_points`."""
        return best_points(self)


class Point(NamedTuple):
    """All runs with the same hyperparameters."""

    label: str  #: label of the optimiser
    values: Mapping[str, float]  #: hyperparameters, by dotted path in the optimiser's table
    numbers: tuple[int, ...]  #: numbers of its members
    rows: tuple[Row, ...]  #: rows of its members
    failures: int  #: members that diverged or, on a surface, were not solved
    mean: float
    """mean of the measure over its members, on a surface over the solved ones; infinite if a member
    diverged, or none was solved"""

    @property
    def dropped(self) -> bool:
        """Whether a rung ended it early because other points were better."""
        return any(row.get("dropped") for row in self.rows)


def points_of(result: SweepResult) -> dict[str, tuple[Point, ...]]:
    """The points of each optimiser by label, in the order of their members."""
    runs: dict[Any, list[int]] = {}
    for number, member in enumerate(result.members):
        runs.setdefault((member.label, tuple(member.values.items())), []).append(number)
    found: dict[str, tuple[Point, ...]] = {}
    for (label, values), numbers in runs.items():
        rows = tuple(result.rows[n] for n in numbers)
        if result.is_on_surface:
            good = [row["work"] for row in rows if row["solved"]]
        else:
            good = [row[result.measure] for row in rows if not row["diverged"]]
        failures = len(rows) - len(good)
        counts = good and (result.is_on_surface or not failures)
        mean = float(np.mean(good)) if counts else math.inf
        point = Point(
            label, dict(values), tuple(numbers), rows, failures, mean if mean == mean else math.inf
        )
        found[label] = (*found.get(label, ()), point)
    return found


def best_points(result: SweepResult) -> tuple[Point, ...]:
    """The best point of each optimiser, best first.

    On data the point with the lowest mean over the seeds is best. Points that were dropped, or that
    diverged with some seed, do not count; an optimiser with no other points is left out. On a
    surface the fewest failures come first, then the least work.
    """

    def place(point: Point) -> tuple[float, ...]:
        return (point.failures if result.is_on_surface else 0, point.mean)

    best = []
    for points in points_of(result).values():
        able = [p for p in points if math.isfinite(p.mean) and not p.dropped]
        best += [min(able, key=place)] if able else []
    return tuple(sorted(best, key=place))
