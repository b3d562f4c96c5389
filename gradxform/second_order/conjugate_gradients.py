"""JAX's conjugate gradients, with the count of their products and an eye on the curvature.

``jax.scipy.sparse.linalg.cg`` returns its solution alone. How many products it made, and whether
one of them met negative curvature, only the operator sees. It sends word along with the vectors: a
row of *marks*, all 0 at first, travels as one more leaf.

* The operator adds τ vᵀAv to the mark of its j-th product. CG multiplies by its step γ / vᵀAv, so
  the residual gets τγ in any unit of A. From there the mark enters the next direction, whose marks
  tell the operator how many products came before, and with the next step the solution.
* τ² is below rounding, so marks do not count in CG's inner products.
* To end CG the operator pretends a curvature of 1 / eps², along which a step is below rounding. The
  next step, as short, brings the last marks into the solution. Then an infinite curvature makes the
  residual NaN, which JAX's CG takes for the end.

Right-hand side, inverse and operator are first brought to size 1, so that no unit matters.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.hyperparameters import scalar

MOST_ITERATIONS = 1000

_Marked: TypeAlias = tuple[tree.PyTree, jax.Array]
# the marks behind those of the products: CG is ended, the news is in the solution, the reason
_ENDED, _CARRIED, _NEGATIVE, _EXTRA = -1, -2, -3, 3


class CgSolution(NamedTuple):
    """What :func:`counted_cg` found."""

    x: tree.PyTree
    products: jax.Array  #: products with A
    negative: jax.Array  #: whether CG met negative curvature and ended there
    cauchy: jax.Array  #: ‖b‖ MbᵀMb over ‖AMb‖‖Mb‖: how long the first step is for |curvature| ‖A‖
    usable: jax.Array  #: whether the first product was finite and not 0


def norm(x: tree.PyTree) -> jax.Array:
    """‖x‖, without overflow or underflow of the squares."""
    unit = tree.reciprocal(tree.max_abs(x))
    scaled = tree.scale(unit, x)
    return scalar(jnp.sqrt(tree.vdot(scaled, scaled)) / unit)
