"""The rows of a sweep's members."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradxform.lab.experiment.grid import Member
from gradxform.lab.training.outcomes import Row

_RESERVED = (
    *("optimizer", "seed", "epochs", "steps", "diverged", "dropped", "seconds", "cost"),
    *("x0", "y0", "x", "y", "value", "evaluations", "curvature_products", "work", "status"),
)


def hyperparameters(member: Member) -> Row:
    """The columns of a member's hyperparameters; a name that is taken gets a prefix."""
    return {"optimizer": member.label} | {
        f"optimizer.{path}" if path in _RESERVED else path: value
        for path, value in member.values.items()
    }


def first_row(member: Member) -> Row:
    """The row of a member before its first epoch."""
    nothing = {"epochs": 0, "steps": 0, "diverged": False, "dropped": False}
    nothing |= {"seconds": 0.0, "cost": math.nan}
    return hyperparameters(member) | {"seed": member.seed} | nothing


def count_epoch(row: Row, cost: float, steps: int, seconds: float) -> None:
    """Adds an epoch to a row in place."""
    row["seconds"] += seconds
    row["diverged"] = not math.isfinite(cost)
    if not row["diverged"]:
        row["cost"] = float(cost)
        row["epochs"] += 1
        row["steps"] += steps


def better_points(
    members: Sequence[Member],
    rows: Mapping[int, Mapping[str, Any]],
    training: Sequence[int],
    measure: str,
    keep: float,
) -> np.ndarray:
    """The members of the better points among those that are training."""
    points: dict[Any, list[int]] = {}
    for number in training:
        points.setdefault(tuple(members[number].values.items()), []).append(number)

    def score(point: Any) -> float:
        values = [math.inf if rows[n]["diverged"] else rows[n][measure] for n in points[point]]
        mean = float(np.mean(values))
        return mean if math.isfinite(mean) else math.inf

    best = sorted(points, key=score)[: max(1, math.ceil(keep * len(points)))]
    return np.sort([number for point in best for number in points[point]])
