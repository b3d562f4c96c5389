"""What a movie shows when: its steps, its end, and the part of the surface in each frame."""

from collections.abc import Sequence

import numpy as np

from gradxform.lab.tasks.surfaces import Surface

CLOSEST = 0.02  # the smallest part of the surface that fills the panel, as a fraction of a side
_MARGIN = 1.4  # how much larger than the walks the part is
_CLOSER = 0.5  # the panel stays as it is until the walks fit into this fraction of it
_GLIDE = 6  # frames of a zoom; the rest of the movie has a still ground, and so a small file
_STILL = 1 / 400  # of the closest panel: a move that nobody sees
_LEVEL = 0.05  # a relative change of a height that nobody sees


def shown_steps(steps: int, most: int = 120) -> list[int]:
    """The steps from 0 to ``steps`` that get a frame, always including the first and the last.

    If not all steps fit, the gaps between frames grow, because most happens at the start.

    Args:
      steps: number of updates.
      most: the largest number of frames, at least 2. The usual 120 are six seconds at 20 frames per
        second, and a GIF of a few megabytes; more would add only waiting.

    >>> shown_steps(3), shown_steps(1000, most=5)
    ([0, 1, 2, 3], [0, 62, 250, 562, 1000])
    """
    if steps < most:
        return list(range(steps + 1))
    return [int(step) for step in np.unique(np.round(steps * np.linspace(0, 1, most) ** 2))]


def last_move(walks: Sequence[tuple[np.ndarray, np.ndarray, bool]], surface: Surface) -> int:
    """The last step at which anything moves that can be seen.

    Args:
      walks: the points, the heights, and whether the walk diverged after its last point.
      surface: the function, whose ``bounds`` are the picture.
    """
    low, high = np.transpose(surface.bounds)
    ends = []
    for points, heights, diverged in walks:
        if diverged:  # the mark appears one step later
            ends.append(len(points))
            continue
        far = np.abs(points - points[-1]) > _STILL * CLOSEST * (high - low)
        with np.errstate(divide="ignore", invalid="ignore"):
            apart = np.abs(np.log(heights / heights[-1])) > _LEVEL
        moved = np.flatnonzero(far.any(axis=1) | apart)
        ends.append(1 + int(moved[-1]) if len(moved) else 0)
    return max(ends)


def windows(
    paths: Sequence[np.ndarray], surface: Surface, steps: Sequence[int]
) -> list[np.ndarray]:
    """The part of the surface that each frame shows, as ((left, right), (bottom, top)).

    It contains everything that the walks will still visit, and has the shape of the whole picture.
    The movie begins with the whole picture, and zooms in when the walks fit into half of the part.
    """
    low, high = np.transpose(surface.bounds).astype(float)
    goal: tuple[float, ...] = (*((low + high) / 2).tolist(), 0.0)
    goals: list[tuple[float, ...]] = [goal] * _GLIDE
    for corners in _rests(paths, steps, low, high):
        box = _box_from(corners, low, high)
        goal = box if box[2] <= goal[2] + np.log(_CLOSER) else goal
        goals.append(goal)
    found = []
    for number in range(len(steps)):
        *centre, zoom = np.mean(goals[number : number + _GLIDE], axis=0)
        half = np.exp(zoom) * (high - low) / 2
        middle = np.clip(centre, low + half, high - half)
        found.append(np.stack([middle - half, middle + half], axis=1))
    return found


def _rests(
    paths: Sequence[np.ndarray], steps: Sequence[int], low: np.ndarray, high: np.ndarray
) -> list[np.ndarray]:
    """For each step the corners of the box of all points from then on."""
    ends = []
    for path in paths:
        inside = np.clip(path, low, high)[::-1]
        lowest = np.minimum.accumulate(inside)[::-1]
        highest = np.maximum.accumulate(inside)[::-1]
        at = np.minimum(steps, len(path) - 1)
        ends.append((lowest[at], highest[at]))
    lows, highs = (np.asarray(corners) for corners in zip(*ends, strict=True))
    return list(np.stack([lows.min(axis=0), highs.max(axis=0)], axis=1))


def _box_from(corners: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, ...]:
    """The centre and the logarithm of the size of a box around two corners."""
    size = _MARGIN * float(np.max((corners[1] - corners[0]) / (high - low)))
    x, y = corners.mean(axis=0)
    return float(x), float(y), float(np.log(np.clip(size, CLOSEST, 1.0)))
