"""Test functions of two variables, for walks and pictures."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform.lab.experiment.registry import find, in_own_words
from gradxform.lab.tasks.models import ModelError


class Surface(NamedTuple):
    """A function of two variables, with its start, its minima and the range to draw."""

    name: str
    fn: Callable[[jax.Array], jax.Array]  #: vector of length 2 -> scalar
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]  #: global minima, the one nearest to the start first
    bounds: tuple[tuple[float, float], tuple[float, float]]  #: ranges of x and y in a plot
    formula: str  #: formula in LaTeX, without dollar signs

    @property
    def minimum(self) -> tuple[float, float] | None:
        """The global minimum nearest to the start."""
        return self.minima[0] if self.minima else None

    @property
    def lowest(self) -> float:
        """The value at the minima; infinite if there are none."""
        values = (float(self.fn(jnp.asarray(x, jnp.float32))) for x in self.minima)
        return min(values, default=math.inf)


def quadratic(x: jax.Array) -> jax.Array:
    """A long narrow valley: curvature 1 along (0.8, 0.6) and 100 across it.

    It is rotated against the axes, so methods that treat each coordinate separately gain nothing.

    >>> float(quadratic(jnp.array([0.8, 0.6]))), float(quadratic(jnp.array([-0.6, 0.8])))
    (0.5, 50.0)
    """
    along = 0.8 * x[0] + 0.6 * x[1]
    across = 0.8 * x[1] - 0.6 * x[0]
    return 0.5 * (along**2 + 100.0 * across**2)


def rosenbrock(x: jax.Array) -> jax.Array:
    """Rosenbrock's curved valley, for vectors of length n >= 2; the minimum 0 is at ones.

    >>> rosenbrock(jnp.ones(5))
    Array(0., dtype=float32)
    """
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def beale(x: jax.Array) -> jax.Array:
    """Beale's function: flat far out, with steep edges; the minimum 0 is at (3, 0.5).

    >>> beale(jnp.array([3.0, 0.5]))
    Array(0., dtype=float32)
    """
    residuals = (
        1.5 - x[0] * (1.0 - x[1]),
        2.25 - x[0] * (1.0 - x[1] ** 2),
        2.625 - x[0] * (1.0 - x[1] ** 3),
    )
    return jnp.sum(jnp.stack(residuals) ** 2)


def saddle(x: jax.Array) -> jax.Array:
    """A saddle at the origin between two minima of -1 at (0, ±√2).

    >>> saddle(jnp.array([1.0, 0.0]))
    Array(1., dtype=float32)
    """
    return x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4


SURFACES: dict[str, Surface] = {
    surface.name: surface
    for surface in (
        Surface(
            name="quadratic",
            fn=quadratic,
            start=(-4.6, -2.2),
            minima=((0.0, 0.0),),
            bounds=((-6.0, 6.0), (-5.0, 5.0)),
            formula=r"\frac{1}{2}\,[(0.8x + 0.6y)^2 + 100\,(0.8y - 0.6x)^2]",
        ),
        Surface(
            name="rosenbrock",
            fn=rosenbrock,
            start=(-1.2, 1.0),
            minima=((1.0, 1.0),),
            bounds=((-2.0, 2.0), (-1.0, 3.0)),
            formula=r"100\,(y - x^2)^2 + (1 - x)^2",
        ),
        Surface(
            name="beale",
            fn=beale,
            start=(1.0, 1.0),
            minima=((3.0, 0.5),),
            bounds=((-4.5, 4.5), (-4.5, 4.5)),
            formula=r"(1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2",
        ),
        Surface(
            name="saddle",
            fn=saddle,
            # Next to the ridge. On the ridge the gradient leads straight into the saddle.
            start=(1.5, 0.01),
            minima=((0.0, math.sqrt(2.0)), (0.0, -math.sqrt(2.0))),
            bounds=((-2.0, 2.0), (-2.0, 2.0)),
            formula=r"x^2 - y^2 + \frac{1}{4}\,y^4",
        ),
    )
}


def is_surface(name: str) -> bool:
    """Whether there is a surface of this name."""
    return name in SURFACES or find("surface", name) is not None


def surface_of(name: str) -> Surface:
    """The surface of a name: one of :data:`SURFACES`, or one that a user registered.

    >>> surface_of("beale").minimum
    (3.0, 0.5)
    """
    entry = find("surface", name)
    if entry is None:
        return SURFACES[name]
    try:
        value = jax.eval_shape(lambda x: jnp.asarray(entry.make(x)), jnp.zeros(2))
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"should return one real number, found {value}")
    except Exception as error:  # what a user's function raises is unknown
        raise ModelError(f"surface {name}: {in_own_words(error, entry.make)}") from error
    return Surface(name, entry.make, **entry.facts)
