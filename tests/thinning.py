"""The cases of thinned tests: a part of them, or all with ``GRADXFORM_LONG=1``."""

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")

LONG = bool(os.environ.get("GRADXFORM_LONG"))
long_form = pytest.mark.skipif(not LONG, reason="with GRADXFORM_LONG=1")


def every(step: int, cases: Iterable[T], first: int = 0) -> list[T]:
    """Every ``step``-th of the cases from ``first`` on; all of them in the long form."""
    return list(cases) if LONG else list(cases)[first::step]
