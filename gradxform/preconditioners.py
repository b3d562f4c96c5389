"""Preconditioners: from products of the curvature to a map near its inverse."""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp

from gradxform import leaves, tree
from gradxform.curvature import Product
from gradxform.hyperparameters import Fraction, Scalar, Seed, Size, UpToOne, checked, scalar, shown
from gradxform.sharding import sharded_like

#: From a damped product, the gradient and the update count to a map near the inverse, and to the
#: number of products that it took.
Preconditioner: TypeAlias = Annotated[
    Callable[[Product, tree.PyTree, jax.Array], tuple[Product, int]],
    "a function of the damped product, the gradient and the update count, for instance "
    "gx.hutchinson_diagonal()",
]


def checked_inverse(
    method: str,
    preconditioner: Preconditioner | None,
    product: Product,
    g: tree.PyTree,
    count: jax.Array,
) -> tuple[Product, int]:
    """The approximate inverse, the identity for None, and the products that making it took.

    Raises:
      ValueError: when called, if it returns something of another structure or shape.
    """
    if preconditioner is None:
        return lambda r: r, 0
    inverse, made = preconditioner(product, g, count)

    def checked(r: tree.PyTree) -> tree.PyTree:
        z = inverse(r)
        if leaves.difference(z, g, dtypes=False) is not None:
            found, expected = (shown(jax.tree.map(jnp.shape, x)) for x in (z, g))
            raise ValueError(
                f"{method}(preconditioner=…): the approximate inverse must return a pytree like "
                f"the parameters, of shapes {expected}; it returned {found}"
            )
        return jax.tree.unflatten(jax.tree.structure(g), jax.tree.leaves(z))

    return checked, made


@checked
def hutchinson_diagonal(
    samples: Size = 8, *, power: UpToOne = 1.0, floor: Fraction = 1e-2, seed: Seed = 0
) -> Preconditioner:
    r"""Preconditions by the diagonal, estimated from products with random signs.

    .. math::
        D = \frac{1}{s} \sum_{i=1}^{s} z_i \odot C z_i, \qquad
        v \mapsto v \oslash \max(|D|, \phi \max_j |D_j|)^\xi

    with new signs z in each update. Exact, from one sample, where the curvature C is diagonal;
    right where parameters differ in scale. It is sharded like the parameters.

    Args:
      samples: s ≥ 1, products that each update makes.
      power: ξ in [0, 1]; below 1 where the estimate is not to be trusted wholly.
      floor: φ in [0, 1).
      seed: of the signs.

    Returns:
      The preconditioner, an argument of :func:`gradxform.newton_cg` and
      :func:`gradxform.hessian_free`.

    References:
      Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix", Appl. Numer. Math.
      57:1214 (2007). Martens (2010), section 4.7, for ξ = 3/4.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> product = lambda v: jnp.asarray([1.0, 4.0]) * v
    >>> inverse, made = gx.hutchinson_diagonal(1)(product, jnp.ones(2), 0)
    >>> inverse(jnp.ones(2)), made
    (Array([1.  , 0.25], dtype=float32), 1)
    """

    def build(product: Product, like: tree.PyTree, count: jax.Array) -> tuple[Product, int]:
        def add(total: tree.PyTree, key: jax.Array) -> tuple[tree.PyTree, None]:
            z = _random_like(jax.random.rademacher, key, like)
            return tree.map(lambda t, z, cz: t + z * cz / samples, total, z, product(z)), None

        zeros = jax.tree.map(jnp.zeros_like, like)
        diagonal, _ = jax.lax.scan(add, zeros, jax.random.split(_key(seed, count), samples))
        most = tree.max_abs(diagonal)
        least = scalar(floor) * most

        def inverse_of(d: jax.Array) -> jax.Array:
            size = jnp.maximum(jnp.abs(d), least)
            # an estimate of 0 counts as the largest; all 0, or not finite, is the identity
            return tree.reciprocal(jnp.where(size > 0, size, most)) ** scalar(power)

        inverse = tree.map(inverse_of, diagonal)
        return lambda v: tree.map(jnp.multiply, v, inverse), samples

    return build


@checked
def nystrom(rank: Size = 10, *, seed: Seed = 0) -> Preconditioner:
    r"""Preconditions by the largest eigenvalues, from a random sketch of the curvature.

    With a random orthonormal Ω of r columns, and :math:`U \Lambda U^T` the eigenvalues and vectors
    of :math:`(C \Omega) (\Omega^T C \Omega)^{-1} (C \Omega)^T`,

    .. math::
        v \mapsto \lambda_r\, U \Lambda^{-1} U^T v + (v - U U^T v)

    with a new Ω in each update. Right for a positive semi-definite curvature, damped, with a few
    large eigenvalues, as Gauss–Newton's of a deep net; of an indefinite one it is the identity. It
    keeps r vectors, ravelled and whole on every device, while CG runs.

    Args:
      rank: r ≥ 1, products that each update makes; at most the parameters.
      seed: of the sketch.

    Returns:
      The preconditioner, an argument of :func:`gradxform.newton_cg` and
      :func:`gradxform.hessian_free`.

    References:
      Frangella, Tropp & Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl.
      44:718 (2023), Algorithm 2.1 and eq. 1.3.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> product = lambda v: jnp.asarray([1.0, 4.0]) * v
    >>> inverse, made = gx.nystrom(2)(product, jnp.ones(2), 0)
    >>> inverse(jnp.ones(2)).round(3), made
    (Array([1.  , 0.25], dtype=float32), 2)
    """

    def build(product: Product, like: tree.PyTree, count: jax.Array) -> tuple[Product, int]:
        flat, unravel = tree.ravel(like)
        r = min(rank, flat.size)
        normal = jax.random.normal(_key(seed, count), (flat.size, r), flat.dtype)
        omega, _ = jnp.linalg.qr(normal)
        y = jax.lax.map(lambda column: tree.ravel(product(unravel(column)))[0], omega.T).T
        shift = jnp.finfo(flat.dtype).eps * jnp.linalg.norm(y)
        y = y + shift * omega
        factor = jnp.linalg.cholesky(_dot(omega.T, y))  # NaN of an indefinite curvature
        b = jax.scipy.linalg.solve_triangular(factor, y.T, lower=True).T
        u, root, _ = jnp.linalg.svd(b, full_matrices=False)
        eigenvalues = jnp.square(root) - shift
        usable = jnp.isfinite(u).all() & (eigenvalues[-1] > 0)
        weight = jnp.where(usable, eigenvalues[-1] / eigenvalues - 1, 0)
        u = jnp.where(usable, u, 0)

        def inverse(v: tree.PyTree) -> tree.PyTree:
            x, _ = tree.ravel(v)
            return unravel(x + _dot(u, weight * _dot(x, u)))

        return inverse, r

    return build


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _key(seed: Scalar, count: jax.typing.ArrayLike) -> jax.Array:
    return jax.random.fold_in(jax.random.key(jnp.asarray(seed).astype(jnp.uint32)), count)


def _random_like(draw: Callable[..., jax.Array], key: jax.Array, like: tree.PyTree) -> tree.PyTree:
    flat, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(flat))
    drawn = [draw(key, x.shape, x.dtype) for key, x in zip(keys, flat, strict=True)]
    return sharded_like(jax.tree.unflatten(structure, drawn), like)
