"""Sums of squares: an objective made of residuals, and robust losses.

With z = (r/c)² for a residual r and the scale c of the loss::

    J(θ) = ½ Σ c² ρ(z),    ρ(z) = z for plain squares

A robust ρ grows slower than z, so outliers count less.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradxform import tree
from gradxform.complex_leaves import to_real
from gradxform.hyperparameters import Positive, checked, shown
from gradxform.objective import Composed

Loss: TypeAlias = Literal["linear", "huber", "soft_l1", "cauchy", "arctan"]


def _huber(z: jax.Array) -> jax.Array:
    is_small = z <= 1
    return jnp.where(is_small, z, 2 * jnp.sqrt(jnp.where(is_small, 1, z)) - 1)


_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda z: z,
    "huber": _huber,
    "soft_l1": lambda z: 2 * z / (1 + jnp.sqrt(1 + z)),
    "cauchy": jnp.log1p,
    "arctan": jnp.arctan,
}
# the corrected weight of a residual is at least this part of the plain one
_LEAST = 0.1


class SumOfSquares(NamedTuple):
    """The loss part of :func:`sum_of_squares`: a function of the residuals."""

    name: str

    def __call__(self, residuals: tree.PyTree, *, loss_scale: jax.typing.ArrayLike) -> jax.Array:
        total = jnp.zeros((), jnp.result_type(float))
        for r in _real_leaves(residuals):
            scale = jnp.asarray(loss_scale, r.dtype)
            z = jnp.square(r / scale)
            total = total + jnp.sum(jnp.square(scale) * _LOSSES[self.name](z))
        return 0.5 * total


@checked
def sum_of_squares(
    residuals: Callable[..., tree.PyTree],
    *,
    loss: Loss = "linear",
    loss_scale: Positive = 1.0,
) -> Composed:
    """The objective ½ Σ r² of a function that returns residuals r, or a robust one.

    The result is a function of the parameters like that of :func:`gradxform.compose`: the residuals
    are its model, and its loss is with z = (r/c)²::

        ½ Σ c² ρ(z)

    ==============  ============================  ===============================================
    ``loss``        ρ(z)                          effect of an outlier
    ==============  ============================  ===============================================
    ``"linear"``    z                             plain squares: full
    ``"soft_l1"``   2 (√(1 + z) − 1)              bounded, smooth
    ``"huber"``     z up to 1, then 2 √z − 1      bounded; exact squares for small residuals
    ``"cauchy"``    ln(1 + z)                     falls to zero
    ``"arctan"``    arctan(z)                     falls to zero; the loss itself is bounded
    ==============  ============================  ===============================================

    Args:
      residuals: a function of the parameters, and of data by name, that returns the residuals: any
        pytree of arrays. A complex residual counts as two real ones.
      loss: the name of ρ. The last two have several minima where plain squares have one, so start
        them from a good point.
      loss_scale: c > 0, the size, in units of the residuals, from which a residual is an outlier.

    Returns:
      The objective. :func:`gradxform.levenberg_marquardt` finds the residuals in it, and
      :func:`gradxform.gauss_newton` their Jacobian.

    References:
      Triggs et al., "Bundle adjustment: a modern synthesis" (2000), §4.3. Huber, *Robust
      Statistics* (1981).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> objective = gx.sum_of_squares(lambda x: x - jnp.asarray([1.0, 2.0, 30.0]), loss="huber")
    >>> float(gx.minimize(objective, 0.0, gx.bfgs()).params)  # the mean would be 11
    2.0
    """
    if isinstance(residuals, Composed):
        raise TypeError(
            f"sum_of_squares(residuals={shown(residuals)}): this is an objective already; pass the "
            "function that returns the residuals"
        )
    scale = loss_scale if isinstance(loss_scale, jax.Array) else np.asarray(loss_scale, float)[()]
    return Composed(SumOfSquares(loss), residuals, {"loss_scale": scale})


class Residuals(NamedTuple):
    """Weighted residuals at a point, and their Jacobian as a linear map."""

    r: jax.Array  #: residuals in one vector; Jᵀr is the gradient
    push: Callable[[tree.PyTree], jax.Array]  #: v ↦ J v
    pull: Callable[[jax.Array], tree.PyTree]  #: w ↦ Jᵀ w


def squares_of(value_fn: Any) -> SumOfSquares | None:
    """The loss of an objective of :func:`sum_of_squares`; None of any other objective."""
    loss = inspect.unwrap(value_fn.loss) if isinstance(value_fn, Composed) else None
    return loss if isinstance(loss, SumOfSquares) else None


def linearised(value_fn: Composed, params: tree.PyTree) -> Residuals:
    """The residuals of a :func:`sum_of_squares`, weighted such that JᵀJ is its Gauss–Newton matrix.

    Triggs's correction for one residual r with ρ' and ρ'' at z = (r/c)²::

        w = √(ρ' + 2 z ρ''),    J ← w J,    r ← (ρ' / w) r

    The expression under the root may be negative, where the loss is not convex. It is at least a
    tenth of ρ'.
    """
    loss = squares_of(value_fn)
    assert loss is not None
    params = jax.tree.map(tree.promote, params)
    _, model = value_fn.parts()
    r, push = jax.linearize(lambda p: flat_residuals(model(p)), params)
    pull = jax.linear_transpose(push, params)
    if loss.name == "linear":
        return Residuals(r, push, lambda w: pull(w)[0])
    z = jnp.square(r / jnp.asarray(value_fn.data["loss_scale"], r.dtype))
    slope = jax.grad(lambda z: jnp.sum(_LOSSES[loss.name](z)))
    first, second = jax.jvp(slope, (z,), (jnp.ones_like(z),))  # entry by entry
    w = jnp.sqrt(jnp.maximum(first + 2 * z * second, _LEAST * first))
    return Residuals(tree.divide(first, w) * r, lambda v: w * push(v), lambda u: pull(w * u)[0])


def flat_residuals(residuals: tree.PyTree) -> jax.Array:
    """All residuals as one real vector in at least float32."""
    leaves = _real_leaves(residuals)
    if not leaves:
        raise ValueError("least_squares: residuals returned no arrays: return at least one number")
    return tree.ravel(leaves)[0]


def _real_leaves(residuals: tree.PyTree) -> list[jax.Array]:
    return [tree.promote(x) for x in jax.tree.leaves(to_real(residuals))]
