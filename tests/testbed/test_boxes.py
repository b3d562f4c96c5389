"""The boxes: that they bind, and that the stored minima are minima."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.optimize

from testbed.boxes import GAY, Box, derivatives, judge, minimizer, random_box, starts, usable_starts
from testbed.problems import PROBLEMS, Problem
from tests.thinning import every

pytestmark = pytest.mark.usefixtures("x64")
RANDOM = [random_box(problem, seed) for problem in PROBLEMS for seed in range(3)]

#: f at the solution in Gay's boxes, as published, where the sizes are those of this module
IN_PRINT = {
    1: 0.25,
    2: 48.985202,
    3: 1.5125900e-10,
    4: 784.0,
    5: 0.0,
    6: 124.383112916,
    7: 0.99042212,
    8: 9.58228472e-3,
    9: 1.1279300e-8,
    10: 127.4517712,
    13: 1.8781963e-4,
    14: 1.5567008,
    15: 3.07830723e-4,
    16: 88860.479,
    17: 5.47028334e-5,
    18: 5.3209865e-4,
    20: 0.0374013978,
    27: 6.093178576e-3,
    35: 3.592242386e-3,
}


def identifier(box: Box) -> str:
    return f"{box.problem.number}-{box.name}"


@pytest.mark.parametrize("box", GAY, ids=identifier)
def test_published_minima(box: Box) -> None:
    published = IN_PRINT.get(box.problem.number, box.minima[0])
    np.testing.assert_allclose(box.minima[0], published, rtol=3e-6)


@pytest.mark.parametrize("box", [*GAY, *RANDOM], ids=identifier)
def test_well_formed(box: Box) -> None:
    n = len(box.problem.start)
    assert box.lower.shape == box.upper.shape == (n,)
    assert np.all(box.lower < box.upper)
    assert box.minima[0] == min(box.minima) >= 0
    for factor, x in starts(box):
        assert factor in (1, 10, 100)
        np.testing.assert_array_equal(box.project(x), x)


@pytest.mark.parametrize("box", RANDOM, ids=identifier)
def test_random_boxes_exclude_the_minimizer(box: Box) -> None:
    best = minimizer(box.problem)
    assert np.any(box.project(best) != best)
    same_sign = best * np.asarray(box.problem.start) > 0
    assert not np.any(same_sign & (box.lower < 0) & (box.upper > 0))


def test_random_boxes_are_deterministic_and_mixed() -> None:
    again = random_box(PROBLEMS[13], 2)
    same = RANDOM[13 * 3 + 2]
    np.testing.assert_array_equal(again.lower, same.lower)
    np.testing.assert_array_equal(again.upper, same.upper)
    assert random_box(PROBLEMS[13], 99).minima == ()
    bounds = np.concatenate([b for box in RANDOM for b in (box.lower, box.upper)])
    assert 0.05 < np.mean(np.isinf(bounds)) < 0.3
    inside = [np.all(box.project(x) == x) for box in RANDOM for x in [np.array(box.problem.start)]]
    assert 0.2 < np.mean(inside) < 0.8


@pytest.mark.parametrize("problem", every(5, PROBLEMS), ids=lambda p: f"{p.number}")
def test_minimizers(problem: Problem) -> None:
    value, *_ = derivatives(problem)(minimizer(problem))
    assert value - problem.minima[0] <= 1e-10 * max(problem.minima[0], 1)


@pytest.mark.parametrize("box", [*every(6, GAY, first=1), *every(21, RANDOM)], ids=identifier)
def test_judge(box: Box) -> None:
    residuals = jax.jit(box.problem.residuals)
    jacobian = jax.jit(jax.jacfwd(box.problem.residuals))

    least_squares: Any = scipy.optimize.least_squares  # its stubs know no function as a Jacobian
    tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}

    def solve(start: np.ndarray) -> Any:
        with np.errstate(all="ignore"):  # some problems overflow at 100 times the standard start
            return least_squares(
                lambda x: np.asarray(residuals(x)),
                start,
                lambda x: np.asarray(jacobian(x)),
                bounds=(box.lower, box.upper),
                **tight,
            )

    best = min((solve(x) for _, x in usable_starts(box)), key=lambda result: result.cost)
    assert judge(box, best.x)[1] == "global"
    assert judge(box, usable_starts(box)[0][1])[1] == "failed"
    below = np.where(np.isfinite(box.lower), box.lower - np.abs(box.lower) - 1, best.x)
    above = np.where(np.isfinite(box.upper), box.upper + np.abs(box.upper) + 1, below)
    assert judge(box, above)[1] == "failed"
    assert judge(box, best.x * np.nan)[1] == "failed"
    rounded = judge(box, best.x.astype(np.float32), 1e-4)
    assert rounded[1] == "global"
