"""Checks of values in a config that pydantic has no type for."""

from typing import Any, Literal, NamedTuple

from pydantic_core import PydanticCustomError

from gradxform.lab.experiment import registry

MAX_EPOCHS, MAX_STEPS, MAX_BATCH, MAX_WIDTH = 10**5, 10**6, 10**6, 10**5
MAX_POINTS = 1000  # per side of a grid of starts


def batch_size(value: Any) -> int | Literal["full"]:
    if value == "full" or (type(value) is int and 1 <= value <= MAX_BATCH):
        return value
    raise PydanticCustomError(
        "batch_size", 'a whole number from 1 to {largest}, or "full"', {"largest": MAX_BATCH}
    )


def point(value: Any) -> tuple[float, float]:
    match value:
        case [x, y] if all(type(z) in (int, float) and abs(z) <= 1e30 for z in (x, y)):
            return float(x), float(y)
    raise PydanticCustomError("point", "a pair of numbers, like [-1.5, 2.0]")


def starts(value: Any) -> dict[str, int] | tuple[tuple[float, float], ...]:
    match value:
        case {"points": int() as points} if len(value) == 1 and 2 <= points <= MAX_POINTS:
            return {"points": points}
        case list() if value:
            return tuple(map(point, value))
    raise PydanticCustomError(
        "starts",
        "{points = 21}, with 2 to {most} a side, or a list of pairs like [[-1.5, 2.0]]",
        {"most": MAX_POINTS},
    )


def rungs(value: Any) -> tuple[int, ...]:
    epochs = value if isinstance(value, list) else [0]
    if all(type(epoch) is int and epoch >= 1 for epoch in epochs) and epochs == sorted(set(epochs)):
        return tuple(epochs)
    raise PydanticCustomError("rungs", "a list of epochs, each after the one before, like [2, 6]")


def widths(value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, list) and value else [0]
    if all(type(width) is int and 1 <= width <= MAX_WIDTH for width in given):
        return tuple(given)
    raise PydanticCustomError(
        "widths", "a list of whole numbers from 1 to {largest}", {"largest": MAX_WIDTH}
    )


class Names(NamedTuple):
    """The names that a key accepts: ours, and those that users registered."""

    kind: str  #: kind of the users' names, see :mod:`gradxform.lab.experiment.registry`
    ours: tuple[str, ...]

    def known(self) -> tuple[str, ...]:
        return registry.choices(self.kind, self.ours)

    def __call__(self, value: Any) -> str:
        names = self.known()
        if isinstance(value, str) and value in names:
            return value
        *most, last = map(repr, names) if names else ["a name that a --with file registers"]
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise PydanticCustomError("name", "{wanted}", {"wanted": wanted, "names": names})


def columns(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    raise PydanticCustomError("columns", 'a column, or a list of columns like ["x1", "x2"]')


def interval(value: Any) -> tuple[float, float]:
    match value:
        case [low, high] if all(type(z) in (int, float) for z in (low, high)) and low < high:
            return float(low), float(high)
    raise PydanticCustomError("interval", "a pair of numbers, the lower first; inf is no bound")
