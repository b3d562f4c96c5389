"""The cases of thinned tests: a part of them, or all with ``GRADXFORM_LONG=1``."""

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")
S = TypeVar("S")

LONG = bool(os.environ.get("GRADXFORM_LONG"))
long_form = pytest.mark.skipif(not LONG, reason="with GRADXFORM_LONG=1")


def in_turns(first: Iterable[T], second: Iterable[S]) -> list[tuple[T, S]]:
    """Each of the first cases with one of the second ones, in turns; with all in the long form."""
    others = list(second)
    pairs = [(x, list(others) if LONG else [others[i % len(others)]]) for i, x in enumerate(first)]
    return [(x, y) for x, ys in pairs for y in ys]


def every(step: int, cases: Iterable[T], first: int = 0) -> list[T]:
    """Every ``step``-th of the cases from ``first`` on; all of them in the long form."""
    return list(cases) if LONG else list(cases)[first::step]
