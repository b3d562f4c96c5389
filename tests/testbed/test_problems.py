"""The Moré–Garbow–Hillstrom problems against loops written from the paper's formulas."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from testbed.problems import FACTORS, PROBLEMS, Problem, starts
from tests.thinning import every, long_form

pytestmark = pytest.mark.usefixtures("x64")
named = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.number}")

X = Sequence[float]
exp, sqrt, cos, sin = np.exp, math.sqrt, math.cos, math.sin


def rosenbrock(x: X) -> list[float]:
    r = []
    for i in range(1, len(x) // 2 + 1):
        r += [10 * (x[2 * i - 1] - x[2 * i - 2] ** 2), 1 - x[2 * i - 2]]
    return r


def freudenstein_roth(x: X) -> list[float]:
    return [
        -13 + x[0] + 5 * x[1] ** 2 - x[1] ** 3 - 2 * x[1],
        -29 + x[0] + x[1] ** 3 + x[1] ** 2 - 14 * x[1],
    ]


def beale(x: X) -> list[float]:
    return [y - x[0] * (1 - x[1] ** i) for i, y in enumerate((1.5, 2.25, 2.625), start=1)]


def jennrich_sampson(x: X) -> list[float]:
    return [2 + 2 * i - (exp(i * x[0]) + exp(i * x[1])) for i in range(1, 11)]


def helical_valley(x: X) -> list[float]:
    theta = math.atan(x[1] / x[0]) / (2 * math.pi) + (0.5 if x[0] < 0 else 0)
    return [10 * (x[2] - 10 * theta), 10 * (math.hypot(x[0], x[1]) - 1), x[2]]


def bard(x: X) -> list[float]:
    y = (14, 18, 22, 25, 29, 32, 35, 39, 37, 58, 73, 96, 134, 210, 439)
    r = []
    for i in range(1, 16):
        v, w = 16 - i, min(i, 16 - i)
        r.append(y[i - 1] / 100 - (x[0] + i / (v * x[1] + w * x[2])))
    return r


def gaussian(x: X) -> list[float]:
    half = (9, 44, 175, 540, 1295, 2420, 3521, 3989)
    y = [v / 1e4 for v in (*half, *half[-2::-1])]
    return [x[0] * exp(-x[1] * ((8 - i) / 2 - x[2]) ** 2 / 2) - y[i - 1] for i in range(1, 16)]


def meyer(x: X) -> list[float]:
    y = (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744)
    y += (8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
    return [x[0] * exp(x[1] / (45 + 5 * i + x[2])) - y[i - 1] for i in range(1, 17)]


def gulf(x: X) -> list[float]:
    r = []
    for i in range(1, 100):
        t = i / 100
        y = 25 + (-50 * math.log(t)) ** (2 / 3)
        r.append(exp(-(abs(y - x[1]) ** x[2]) / x[0]) - t)
    return r


def box(x: X) -> list[float]:
    r = []
    for i in range(1, 11):
        t = 0.1 * i
        r.append(exp(-t * x[0]) - exp(-t * x[1]) - x[2] * (exp(-t) - exp(-10 * t)))
    return r


def powell_singular(x: X) -> list[float]:
    r = []
    for a, b, c, d in zip(x[0::4], x[1::4], x[2::4], x[3::4], strict=True):
        r += [a + 10 * b, sqrt(5) * (c - d), (b - 2 * c) ** 2, sqrt(10) * (a - d) ** 2]
    return r


def wood(x: X) -> list[float]:
    a, b, c, d = x
    f = 100 * (b - a * a) ** 2 + (1 - a) ** 2 + 90 * (d - c * c) ** 2 + (1 - c) ** 2
    return [sqrt(f + 10 * (b + d - 2) ** 2 + (b - d) ** 2 / 10)]


def kowalik_osborne(x: X) -> list[float]:
    y = (1957, 1947, 1735, 1600, 844, 627, 456, 342, 323, 235, 246)
    u = (4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
    return [
        v / 1e4 - x[0] * (s * s + s * x[1]) / (s * s + s * x[2] + x[3])
        for v, s in zip(y, u, strict=True)
    ]


def brown_dennis(x: X) -> list[float]:
    r = []
    for i in range(1, 21):
        t = i / 5
        r.append((x[0] + t * x[1] - exp(t)) ** 2 + (x[2] + x[3] * sin(t) - cos(t)) ** 2)
    return r


def osborne_1(x: X) -> list[float]:
    y = (844, 908, 932, 936, 925, 908, 881, 850, 818, 784, 751, 718, 685, 658, 628, 603, 580)
    y += (558, 538, 522, 506, 490, 478, 467, 457, 448, 438, 431, 424, 420, 414, 411, 406)
    return [
        v / 1e3 - (x[0] + x[1] * exp(-10 * i * x[3]) + x[2] * exp(-10 * i * x[4]))
        for i, v in enumerate(y)
    ]


def biggs(x: X) -> list[float]:
    r = []
    for i in range(1, 14):
        t = 0.1 * i
        y = exp(-t) - 5 * exp(-10 * t) + 3 * exp(-4 * t)
        r.append(x[2] * exp(-t * x[0]) - x[3] * exp(-t * x[1]) + x[5] * exp(-t * x[4]) - y)
    return r


def osborne_2(x: X) -> list[float]:
    y = (1366, 1191, 1112, 1013, 991, 885, 831, 847, 786, 725, 746, 679, 608, 655, 616, 606, 602)
    y += (626, 651, 724, 649, 649, 694, 644, 624, 661, 612, 558, 533, 495, 500, 423, 395, 375)
    y += (372, 391, 396, 405, 428, 429, 523, 562, 607, 653, 672, 708, 633, 668, 645, 632, 591)
    y += (559, 597, 625, 739, 710, 729, 720, 636, 581, 428, 292, 162, 98, 54)
    r = []
    for i, v in enumerate(y):
        t = i / 10
        model = x[0] * exp(-t * x[4]) + x[1] * exp(-((t - x[8]) ** 2) * x[5])
        model += x[2] * exp(-((t - x[9]) ** 2) * x[6]) + x[3] * exp(-((t - x[10]) ** 2) * x[7])
        r.append(v / 1e3 - model)
    return r


def watson(x: X) -> list[float]:
    n, r = len(x), []
    for i in range(1, 30):
        t = i / 29
        first = sum((j - 1) * x[j - 1] * t ** (j - 2) for j in range(2, n + 1))
        second = sum(x[j - 1] * t ** (j - 1) for j in range(1, n + 1))
        r.append(first - second**2 - 1)
    return [*r, x[0], x[1] - x[0] ** 2 - 1]


def penalty_1(x: X) -> list[float]:
    return [*(sqrt(1e-5) * (v - 1) for v in x), sum(v * v for v in x) - 0.25]


def penalty_2(x: X) -> list[float]:
    n = len(x)
    r = [x[0] - 0.2]
    for i in range(2, n + 1):
        y = exp(i / 10) + exp((i - 1) / 10)
        r.append(sqrt(1e-5) * (exp(x[i - 1] / 10) + exp(x[i - 2] / 10) - y))
    for i in range(n + 1, 2 * n):
        r.append(sqrt(1e-5) * (exp(x[i - n] / 10) - exp(-1 / 10)))
    return [*r, sum((n - j + 1) * x[j - 1] ** 2 for j in range(1, n + 1)) - 1]


def variably_dimensioned(x: X) -> list[float]:
    total = sum(j * (v - 1) for j, v in enumerate(x, start=1))
    return [*(v - 1 for v in x), total, total**2]


def trigonometric(x: X) -> list[float]:
    n, total = len(x), sum(cos(v) for v in x)
    return [n - total + i * (1 - cos(v)) - sin(v) for i, v in enumerate(x, start=1)]


def brown_almost_linear(x: X) -> list[float]:
    n = len(x)
    return [*(x[i] + sum(x) - (n + 1) for i in range(n - 1)), math.prod(x) - 1]


def boundary_value(x: X) -> list[float]:
    n, h, r = len(x), 1 / (len(x) + 1), []
    around = [0.0, *x, 0.0]
    for i in range(1, n + 1):
        cube = h**2 * (around[i] + i * h + 1) ** 3 / 2
        r.append(2 * around[i] - around[i - 1] - around[i + 1] + cube)
    return r


def integral_equation(x: X) -> list[float]:
    n, h, r = len(x), 1 / (len(x) + 1), []
    for i in range(1, n + 1):
        left = sum(j * h * (x[j - 1] + j * h + 1) ** 3 for j in range(1, i + 1))
        right = sum((1 - j * h) * (x[j - 1] + j * h + 1) ** 3 for j in range(i + 1, n + 1))
        r.append(x[i - 1] + h * ((1 - i * h) * left + i * h * right) / 2)
    return r


def broyden_tridiagonal(x: X) -> list[float]:
    around = [0.0, *x, 0.0]
    return [
        (3 - 2 * around[i]) * around[i] - around[i - 1] - 2 * around[i + 1] + 1
        for i in range(1, len(x) + 1)
    ]


def broyden_banded(x: X) -> list[float]:
    n, r = len(x), []
    for i in range(1, n + 1):
        others = (j for j in range(max(1, i - 5), min(n, i + 1) + 1) if j != i)
        near = sum(x[j - 1] * (1 + x[j - 1]) for j in others)
        r.append(x[i - 1] * (2 + 5 * x[i - 1] ** 2) + 1 - near)
    return r


def linear_full_rank(x: X) -> list[float]:
    return [(x[i] if i < len(x) else 0) - 2 / 20 * sum(x) - 1 for i in range(20)]


def linear_rank_1(x: X) -> list[float]:
    return [i * sum(j * v for j, v in enumerate(x, start=1)) - 1 for i in range(1, 21)]


def linear_rank_1_zeros(x: X) -> list[float]:
    total = sum(j * x[j - 1] for j in range(2, len(x)))
    return [-1, *((i - 1) * total - 1 for i in range(2, 20)), -1]


def chebyquad(x: X) -> list[float]:
    n, r = len(x), []
    for i in range(1, n + 1):
        polynomial = np.polynomial.Chebyshev.basis(i, domain=[0, 1])
        integral = 0 if i % 2 else -1 / (i**2 - 1)
        r.append(sum(polynomial(v) for v in x) / n - integral)
    return r


LOOPS: tuple[Callable[[X], list[float]], ...] = (
    rosenbrock,
    freudenstein_roth,
    lambda x: [1e4 * x[0] * x[1] - 1, exp(-x[0]) + exp(-x[1]) - 1.0001],
    lambda x: [x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2],
    beale,
    jennrich_sampson,
    helical_valley,
    bard,
    gaussian,
    meyer,
    gulf,
    box,
    powell_singular,
    wood,
    kowalik_osborne,
    brown_dennis,
    osborne_1,
    biggs,
    osborne_2,
    watson,
    rosenbrock,
    powell_singular,
    penalty_1,
    penalty_2,
    variably_dimensioned,
    trigonometric,
    brown_almost_linear,
    boundary_value,
    integral_equation,
    broyden_tridiagonal,
    broyden_banded,
    linear_full_rank,
    linear_rank_1,
    linear_rank_1_zeros,
    chebyquad,
)

#: f at the standard start, as published for these sizes
AT_START = {
    1: 24.2,
    2: 400.5,
    3: 1.135262,
    4: 999998000003.0,
    5: 14.203125,
    6: 4171.306,
    7: 2500.0,
    8: 41.68170,
    9: 3.88811e-6,
    10: 1.693608e9,
    11: 12.11071,
    12: 1031.154,
    13: 215.0,
    14: 19192.0,
    15: 5.313172e-3,
    16: 7926693.0,
    17: 0.8790263,
    18: 0.7790701,
    19: 2.093420,
    20: 30.0,
}

#: the minima as the paper prints them
IN_PRINT = {
    2: (0, 48.9842),
    6: (124.362,),
    8: (8.21487e-3, 17.4286),
    9: (1.12793e-8,),
    10: (87.9458,),
    15: (3.07505e-4, 1.02734e-3),
    16: (85822.2,),
    17: (5.46489e-5,),
    18: (0, 5.65565e-3),
    19: (4.01377e-2,),
    20: (1.39976e-6,),
    23: (7.08765e-5,),
    24: (2.93660e-4,),
    26: (0, 2.79506e-5),
    27: (0, 1),
    32: (20 - 10,),
    33: (20 * 19 / (2 * 41),),
    34: ((400 + 60 - 6) / (2 * 37),),
    35: (3.51687e-3,),
}


def test_numbers_in_order() -> None:
    assert [p.number for p in PROBLEMS] == list(range(1, 36))
    assert all(p.minima[0] == min(p.minima) for p in PROBLEMS)


@long_form
@named
def test_formula(problem: Problem) -> None:
    standard = np.asarray(problem.start, np.float64)
    noise = np.random.default_rng(problem.number).uniform(0.9, 1.1, standard.shape)
    for x in (standard, standard * noise, standard * noise + 0.05):
        expected = math.fsum(r * r for r in LOOPS[problem.number - 1](x.tolist()))
        np.testing.assert_allclose(problem(jnp.asarray(x)), expected, rtol=1e-9)


@pytest.mark.parametrize("number", every(2, AT_START))
def test_published_value_at_start(number: int) -> None:
    problem = PROBLEMS[number - 1]
    x = jnp.asarray(problem.start, jnp.float64)
    np.testing.assert_allclose(problem(x), AT_START[number], rtol=1e-6)


@named
def test_minima_in_print(problem: Problem) -> None:
    # the last digit in print is sometimes cut, sometimes rounded
    printed = IN_PRINT.get(problem.number, (0,))
    np.testing.assert_allclose(problem.minima, printed, rtol=1e-5)


@named
def test_reference_solve_reaches_a_minimum(problem: Problem) -> None:
    residuals = jax.jit(problem.residuals)
    jacobian = jax.jit(jax.jacfwd(problem.residuals))
    solution = scipy.optimize.least_squares(
        lambda x: np.asarray(residuals(x)),
        np.asarray(problem.start, np.float64),
        lambda x: np.asarray(jacobian(x)),
        method="lm",
        xtol=3e-16,
        ftol=3e-16,
        gtol=3e-16,
        max_nfev=3000,
    )
    value = 2 * solution.cost
    assert min(abs(value - m) / (m or 1) for m in problem.minima) < 1e-6


@pytest.mark.parametrize(
    ("number", "infimum", "x"),
    [
        (8, 17.428693333333335, (0.840666666666667, -1e9, -1e9)),
        (15, 1.027343048695457e-3, (2.209594e7, -14.075883, -1e9, -6.2380134e8)),
        (27, 1.0, (0.0,) * 9 + (11.0,)),
    ],
)
def test_other_minima(number: int, infimum: float, x: tuple[float, ...]) -> None:
    problem = PROBLEMS[number - 1]
    assert infimum in problem.minima
    np.testing.assert_allclose(problem(jnp.asarray(x)), infimum, rtol=1e-6)


@named
def test_starts(problem: Problem) -> None:
    factors, points = zip(*starts(problem), strict=True)
    assert factors == FACTORS == (1, 10, 100)
    np.testing.assert_array_equal(points[0], problem.start)
    np.testing.assert_allclose(points[2], 10 * points[1])
    scaled = 10 * points[0] if np.any(points[0]) else np.full_like(points[0], 10)
    np.testing.assert_array_equal(points[1], scaled)
