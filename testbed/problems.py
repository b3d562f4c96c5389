r"""The 35 problems of Moré, Garbow and Hillstrom, as residual vectors in JAX.

Every objective is f(x) = Σᵢ rᵢ(x)². Formulas, data, standard starts and minima are
those of the paper; where it leaves n or m open, a comment gives the size taken here. Two things
differ from the printed page: problem 11 is that of the authors' Algorithm 566, without the factor
m i of the formula in print, as the minimum stated there demands; and minima, printed to six digits,
are given to what double precision resolves.

References:
  Moré, Garbow & Hillstrom, "Testing unconstrained optimization software", ACM Trans. Math. Softw.
  7:17 (1981); Algorithm 566, 7:136 (1981).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FACTORS = (1, 10, 100)  #: of the standard start, as in the paper


class Problem(NamedTuple):
    """One problem: ``residuals`` to be squared and summed."""

    number: int  #: in the paper
    name: str
    residuals: Callable[[jax.Array], jax.Array]
    start: tuple[float, ...]  #: the standard start
    minima: tuple[float, ...]  #: of the objective, the global one first; infima at infinity too

    def __call__(self, x: jax.Array) -> jax.Array:
        """The objective."""
        return jnp.sum(self.residuals(x) ** 2)


def starts(problem: Problem) -> Iterator[tuple[int, np.ndarray]]:
    """The factor and the start, for the factors 1, 10 and 100; a standard start of zeros is
    replaced by the factor itself in every entry, beyond the first."""
    standard = np.asarray(problem.start, np.float64)
    for factor in FACTORS:
        moved = factor * (standard if standard.any() else np.ones_like(standard))
        yield factor, standard if factor == 1 else moved


def _counting(last: int, x: jax.Array, first: int = 1) -> jax.Array:
    return jnp.arange(first, last + 1, dtype=x.dtype)


def _data(values: str | tuple[float, ...], x: jax.Array) -> jax.Array:
    numbers = values.split() if isinstance(values, str) else values
    return jnp.asarray([float(v) for v in numbers], x.dtype)


def _rosenbrock(x: jax.Array) -> jax.Array:
    odd, even = x[0::2], x[1::2]
    return jnp.stack([10 * (even - odd**2), 1 - odd], axis=1).ravel()


def _freudenstein_roth(x: jax.Array) -> jax.Array:
    a, b = x
    return jnp.stack([a - 13 + ((5 - b) * b - 2) * b, a - 29 + ((b + 1) * b - 14) * b])


def _powell_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def _brown_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def _beale(x: jax.Array) -> jax.Array:
    powers = jnp.stack([x[1], x[1] ** 2, x[1] ** 3])
    return _data((1.5, 2.25, 2.625), x) - x[0] * (1 - powers)


def _jennrich_sampson(x: jax.Array) -> jax.Array:  # m = 10
    i = _counting(10, x)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def _helical_valley(x: jax.Array) -> jax.Array:
    turn = jnp.arctan2(x[1], x[0]) / (2 * math.pi)
    # the paper's branch: arctan(x2 / x1) / 2π, and half a turn more where x1 < 0
    turn = jnp.where(turn < -0.25, turn + 1, turn)
    radius = jnp.sqrt(x[0] ** 2 + x[1] ** 2)
    return jnp.stack([10 * (x[2] - 10 * turn), 10 * (radius - 1), x[2]])


_BARD = "0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39"


def _bard(x: jax.Array) -> jax.Array:
    u = _counting(15, x)
    v = 16 - u
    return _data(_BARD, x) - (x[0] + u / (v * x[1] + jnp.minimum(u, v) * x[2]))


_GAUSSIAN = "0.0009 0.0044 0.0175 0.0540 0.1295 0.2420 0.3521 0.3989"


def _gaussian(x: jax.Array) -> jax.Array:
    rising = _data(_GAUSSIAN, x)
    t = (8 - _counting(15, x)) / 2
    values = jnp.concatenate([rising, rising[-2::-1]])
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - values


_MEYER = "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"


def _meyer(x: jax.Array) -> jax.Array:
    t = 45 + 5 * _counting(16, x)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - _data(_MEYER, x)


def _gulf(x: jax.Array) -> jax.Array:  # m = 99
    t = _counting(99, x) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def _box(x: jax.Array) -> jax.Array:  # m = 10
    t = _counting(10, x) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def _powell_singular(x: jax.Array) -> jax.Array:
    a, b, c, d = x[0::4], x[1::4], x[2::4], x[3::4]
    rows = [
        a + 10 * b,
        math.sqrt(5) * (c - d),
        (b - 2 * c) ** 2,
        math.sqrt(10) * (a - d) ** 2,
    ]
    return jnp.stack(rows, axis=1).ravel()


def _wood(x: jax.Array) -> jax.Array:
    a, b, c, d = x
    return jnp.stack(
        [
            10 * (b - a**2),
            1 - a,
            math.sqrt(90) * (d - c**2),
            1 - c,
            math.sqrt(10) * (b + d - 2),
            (b - d) / math.sqrt(10),
        ]
    )


_KOWALIK = "0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246"
_KOWALIK_AT = "4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625"


def _kowalik_osborne(x: jax.Array) -> jax.Array:
    u = _data(_KOWALIK_AT, x)
    return _data(_KOWALIK, x) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def _brown_dennis(x: jax.Array) -> jax.Array:  # m = 20
    t = _counting(20, x) / 5
    first = x[0] + t * x[1] - jnp.exp(t)
    second = x[2] + x[3] * jnp.sin(t) - jnp.cos(t)
    return first**2 + second**2


_OSBORNE_1 = """
    0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628
    0.603 0.580 0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420
    0.414 0.411 0.406
"""


def _osborne_1(x: jax.Array) -> jax.Array:
    t = 10 * (_counting(33, x) - 1)
    model = x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4])
    return _data(_OSBORNE_1, x) - model


def _biggs(x: jax.Array) -> jax.Array:  # m = 13
    t = _counting(13, x) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


_OSBORNE_2 = """
    1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616
    0.606 0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495
    0.500 0.423 0.395 0.375 0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672
    0.708 0.633 0.668 0.645 0.632 0.591 0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581
    0.428 0.292 0.162 0.098 0.054
"""


def _osborne_2(x: jax.Array) -> jax.Array:
    t = (_counting(65, x) - 1) / 10
    model = x[0] * jnp.exp(-t * x[4])
    for k in range(3):
        model += x[1 + k] * jnp.exp(-((t - x[8 + k]) ** 2) * x[5 + k])
    return _data(_OSBORNE_2, x) - model


def _watson(x: jax.Array) -> jax.Array:  # n = 9
    t = _counting(29, x)[:, None] / 29
    degree = jnp.arange(len(x))
    value = t**degree @ x
    slope = t ** degree[:-1] @ (degree[1:] * x[1:])
    ends = jnp.stack([x[0], x[1] - x[0] ** 2 - 1])
    return jnp.concatenate([slope - value**2 - 1, ends])


def _penalty_1(x: jax.Array) -> jax.Array:  # n = 10
    return jnp.append(math.sqrt(1e-5) * (x - 1), jnp.sum(x**2) - 0.25)


def _penalty_2(x: jax.Array) -> jax.Array:  # n = 10
    n, root = len(x), math.sqrt(1e-5)
    i = _counting(n, x, first=2)
    y = jnp.exp(i / 10) + jnp.exp((i - 1) / 10)
    growth = jnp.exp(x / 10)
    return jnp.concatenate(
        [
            x[:1] - 0.2,
            root * (growth[1:] + growth[:-1] - y),
            root * (growth[1:] - math.exp(-0.1)),
            (n + 1 - _counting(n, x)) @ x[:, None] ** 2 - 1,
        ]
    )


def _variably_dimensioned(x: jax.Array) -> jax.Array:  # n = 10
    total = _counting(len(x), x) @ (x - 1)
    return jnp.concatenate([x - 1, jnp.stack([total, total**2])])


def _trigonometric(x: jax.Array) -> jax.Array:  # n = 10
    i = _counting(len(x), x)
    return len(x) - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)


def _brown_almost_linear(x: jax.Array) -> jax.Array:  # n = 10
    linear = x[:-1] + jnp.sum(x) - (len(x) + 1)
    return jnp.append(linear, jnp.prod(x) - 1)


def _boundary_value(x: jax.Array) -> jax.Array:  # n = 10
    h = 1 / (len(x) + 1)
    t = h * _counting(len(x), x)
    padded = jnp.pad(x, 1)
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


def _integral_equation(x: jax.Array) -> jax.Array:  # n = 10
    h = 1 / (len(x) + 1)
    t = h * _counting(len(x), x)
    row, column = t[:, None], t[None, :]
    kernel = jnp.where(column <= row, (1 - row) * column, row * (1 - column))
    return x + h * kernel @ (x + t + 1) ** 3 / 2


def _broyden_tridiagonal(x: jax.Array) -> jax.Array:  # n = 10
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def _broyden_banded(x: jax.Array) -> jax.Array:  # n = 10
    offset = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
    band = jnp.asarray((offset <= 5) & (offset >= -1) & (offset != 0), x.dtype)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


_LINEAR_M = 20  #: of the three linear problems, which have n = 10


def _linear_full_rank(x: jax.Array) -> jax.Array:
    shift = 2 / _LINEAR_M * jnp.sum(x) + 1
    return jnp.pad(x, (0, _LINEAR_M - len(x))) - shift


def _linear_rank_1(x: jax.Array) -> jax.Array:
    return _counting(_LINEAR_M, x) * (_counting(len(x), x) @ x) - 1


def _linear_rank_1_zeros(x: jax.Array) -> jax.Array:
    total = _counting(len(x) - 1, x, first=2) @ x[1:-1]
    return jnp.pad(_counting(_LINEAR_M - 2, x) * total, 1) - 1


def _chebyquad(x: jax.Array) -> jax.Array:  # n = m = 8
    before, now = jnp.ones_like(x), 2 * x - 1
    rows = []
    for i in range(1, len(x) + 1):
        integral = -1 / (i**2 - 1) if i % 2 == 0 else 0
        rows.append(jnp.mean(now) - integral)
        before, now = now, 2 * (2 * x - 1) * now - before
    return jnp.stack(rows)


_M = _LINEAR_M
_GRID = tuple(i / 11 * (i / 11 - 1) for i in range(1, 11))

PROBLEMS: tuple[Problem, ...] = (
    Problem(1, "Rosenbrock", _rosenbrock, (-1.2, 1), (0,)),
    Problem(2, "Freudenstein–Roth", _freudenstein_roth, (0.5, -2), (0, 48.98425367924)),
    Problem(3, "Powell badly scaled", _powell_badly_scaled, (0, 1), (0,)),
    Problem(4, "Brown badly scaled", _brown_badly_scaled, (1, 1), (0,)),
    Problem(5, "Beale", _beale, (1, 1), (0,)),
    Problem(6, "Jennrich–Sampson", _jennrich_sampson, (0.3, 0.4), (124.362182355615,)),
    Problem(7, "Helical valley", _helical_valley, (-1, 0, 0), (0,)),
    Problem(8, "Bard", _bard, (1, 1, 1), (8.214877306578966e-3, 17.428693333333335)),
    Problem(9, "Gaussian", _gaussian, (0.4, 1, 0), (1.12793276961887e-8,)),
    Problem(10, "Meyer", _meyer, (0.02, 4000, 250), (87.9458551706,)),
    Problem(11, "Gulf research", _gulf, (5, 2.5, 0.15), (0,)),
    Problem(12, "Box 3-dimensional", _box, (0, 10, 20), (0,)),
    Problem(13, "Powell singular", _powell_singular, (3, -1, 0, 1), (0,)),
    Problem(14, "Wood", _wood, (-3, -1, -3, -1), (0,)),
    Problem(
        15,
        "Kowalik–Osborne",
        _kowalik_osborne,
        (0.25, 0.39, 0.415, 0.39),
        (3.07505603849237e-4, 1.027343048695457e-3),
    ),
    Problem(16, "Brown–Dennis", _brown_dennis, (25, 5, -5, -1), (85822.2016263563,)),
    Problem(17, "Osborne 1", _osborne_1, (0.5, 1.5, -1, 0.01, 0.02), (5.46489469748268e-5,)),
    Problem(18, "Biggs EXP6", _biggs, (1, 2, 1, 1, 1, 1), (0, 5.65564992549989e-3)),
    Problem(
        19,
        "Osborne 2",
        _osborne_2,
        (1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5),
        (4.01377362935477e-2,),
    ),
    Problem(20, "Watson", _watson, (0,) * 9, (1.39976013809e-6,)),
    Problem(21, "Extended Rosenbrock", _rosenbrock, (-1.2, 1) * 5, (0,)),
    Problem(22, "Extended Powell", _powell_singular, (3, -1, 0, 1) * 3, (0,)),
    Problem(23, "Penalty I", _penalty_1, tuple(range(1, 11)), (7.08765146709037e-5,)),
    Problem(24, "Penalty II", _penalty_2, (0.5,) * 10, (2.93660537456746e-4,)),
    Problem(
        25,
        "Variably dimensioned",
        _variably_dimensioned,
        tuple(1 - j / 10 for j in range(1, 11)),
        (0,),
    ),
    Problem(26, "Trigonometric", _trigonometric, (0.1,) * 10, (0, 2.79505612187905e-5)),
    Problem(27, "Brown almost linear", _brown_almost_linear, (0.5,) * 10, (0, 1)),
    Problem(28, "Boundary value", _boundary_value, _GRID, (0,)),
    Problem(29, "Integral equation", _integral_equation, _GRID, (0,)),
    Problem(30, "Broyden tridiagonal", _broyden_tridiagonal, (-1,) * 10, (0,)),
    Problem(31, "Broyden banded", _broyden_banded, (-1,) * 10, (0,)),
    Problem(32, "Linear, full rank", _linear_full_rank, (1,) * 10, (_M - 10,)),
    Problem(33, "Linear, rank 1", _linear_rank_1, (1,) * 10, (_M * (_M - 1) / (2 * (2 * _M + 1)),)),
    Problem(
        34,
        "Linear, rank 1, zeros",
        _linear_rank_1_zeros,
        (1,) * 10,
        ((_M**2 + 3 * _M - 6) / (2 * (2 * _M - 3)),),
    ),
    Problem(35, "Chebyquad", _chebyquad, tuple(j / 9 for j in range(1, 9)), (3.51687372567793e-3,)),
)
