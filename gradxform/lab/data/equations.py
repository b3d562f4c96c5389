"""Differential equations with a known solution: their points, and the solution there.

Burgers' equation on x ∈ [−1, 1], t ∈ [0, 1] with the viscosity ν is::

    u_t + u u_x = ν u_xx,    u(0, x) = −sin πx,    u(t, −1) = u(t, 1) = 0

Its solution becomes steep at x = 0, over a width of about ν.
"""

import numpy as np

from gradxform.lab.data.formats import Split

_NODES = 200  # of the quadrature; 100 and 200 agree to 1e-12 at ν = 0.01/π
_LARGEST = 2**15  # points to train on
_GRID = 11, 256  # times and places of the test part; an even number, so that x = 0 is not one


def burgers(points: np.ndarray, viscosity: float) -> np.ndarray:
    """The solution u of Burgers' equation, by the integrals of Cole and Hopf.

    ::

        u = − ∫ sin π(x − η) w dη / ∫ w dη,    w = exp(−cos π(x − η) / 2πν − η² / 4νt)

    Gauss and Hermite's quadrature computes them.

    Args:
      points: pairs (t, x), of shape (n, 2).
      viscosity: ν > 0.

    References:
      Cole, "On a quasi-linear parabolic equation occurring in aerodynamics" (1951). Basdevant et
      al., "Spectral and finite difference solutions of the Burgers equation" (1986).

    >>> burgers(np.array([[0.0, 0.5], [0.5, 0.0], [1.0, 1.0]]), 0.01).round(6) + 0.0
    array([-1.,  0.,  0.])
    """
    t, x = np.asarray(points, np.float64).T[..., None]
    nodes, weights = np.polynomial.hermite.hermgauss(_NODES)
    at = np.pi * (x - np.sqrt(4 * viscosity * t) * nodes)
    exponent = -np.cos(at) / (2 * np.pi * viscosity)
    w = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -np.sum(np.sin(at) * w, axis=1) / np.sum(w, axis=1)


def burgers_points(grid: tuple[int, int] = _GRID) -> tuple[Split, Split]:
    """Points (t, x) to train on, and a grid to test on; the values are zeros.

    The training points are Halton's sequence, so that the first n of them are spread evenly for
    every n. Half of them, which are spread as evenly, are moved towards x = 0 by x ← x³, because
    the solution is steep there.

    Args:
      grid: numbers of times and places of the grid.
    """
    numbers = np.arange(1, _LARGEST + 1)
    t, x, choice = (_radical_inverse(numbers, base) for base in (2, 3, 5))
    x = 2 * x - 1
    x = np.where(choice < 0.5, x**3, x)
    nodes = np.meshgrid(np.linspace(0, 1, grid[0]), np.linspace(-1, 1, grid[1]))
    parts = np.stack([t, x], axis=1), np.stack([a.ravel() for a in nodes], axis=1)
    train, test = (Split(part, np.zeros(len(part))) for part in parts)
    return train, test


def _radical_inverse(numbers: np.ndarray, base: int) -> np.ndarray:
    """The digits of the numbers, mirrored at the point."""
    found, scale = np.zeros(len(numbers)), 1.0
    while numbers.any():
        numbers, digit = np.divmod(numbers, base)
        scale /= base
        found += scale * digit
    return found
