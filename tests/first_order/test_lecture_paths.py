"""The path of θ equals the slide's pseudo-code, to 1e-10 in float64."""

import numpy as np
import pytest

from tests.reference.rows import ROWS, START, Row, constant, gradient, largest_difference

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


@every_row
@pytest.mark.usefixtures("x64")
def test_constant_rate(row: Row) -> None:
    assert largest_difference(row) < 1e-10


@pytest.mark.parametrize("name", [name for name in ROWS if name != "delta_bar_delta"])
@pytest.mark.usefixtures("x64")
def test_decaying_rate(name: str) -> None:
    row = ROWS[name]  # delta-bar-delta's rates start from one number on its slide
    assert largest_difference(row, decay=True) < 1e-10


@every_row
def test_the_comparison_can_fail(row: Row) -> None:
    """The slides' loops really move, and not all alike."""
    path = np.array(row.loop(gradient, START, 300, constant(row.rate), *row.constants))
    other = np.array(row.loop(gradient, START, 300, constant(1.01 * row.rate), *row.constants))
    assert np.max(np.abs(path - other)) > 1e-4
