"""Preconditioners: an approximate inverse of the curvature, from products with it."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradxform import leaves, tree
from gradxform.curvature import Product
from gradxform.hyperparameters import Fraction, Scalar, Seed, Size, UpToOne, checked, scalar, shown
from gradxform.sharding import sharded_like


class Request(NamedTuple):
    """What a method tells a preconditioner in each update."""

    product: Product  #: v ↦ (C + λI) v, with the curvature C and the damping λ
    g: tree.PyTree  #: the gradient, or a multiple of it, in at least float32
    count: jax.Array  #: updates made so far
    damping: jax.Array  #: λ
    params: tree.PyTree  #: the parameters θ
    value_fn: Any  #: the objective


class RunningPreconditioner(NamedTuple):
    """A preconditioner with a memory, which the method carries in its state."""

    init: Callable[[tree.PyTree], tree.PyTree]  #: parameters → the first memory
    refresh: Callable[[Request, tree.PyTree], tuple[Product, jax.typing.ArrayLike, tree.PyTree]]
    """(request, memory) → (approximate inverse, products it took, next memory)"""


#: (damped product, gradient, update count) → (approximate inverse, number of products it took)
Preconditioner: TypeAlias = (
    Annotated[
        Callable[[Product, tree.PyTree, jax.Array], tuple[Product, int]],
        "a function of the damped product, the gradient and the update count, for instance "
        "gx.hutchinson_diagonal()",
    ]
    | Annotated[RunningPreconditioner, "gx.kronecker_inverse()"]
)


def first_memory(preconditioner: Preconditioner | None, params: tree.PyTree) -> tree.PyTree:
    """What the method's state holds for the preconditioner: nothing, unless it has a memory."""
    return preconditioner.init(params) if isinstance(preconditioner, RunningPreconditioner) else ()


def checked_inverse(
    method: str, preconditioner: Preconditioner | None, request: Request, memory: tree.PyTree
) -> tuple[Product, jax.typing.ArrayLike, tree.PyTree]:
    """The approximate inverse, the products it took, and the next memory.

    The inverse is the identity for ``None``.

    Raises:
      ValueError: when the inverse is called, if it returns another structure or other shapes.
    """
    if preconditioner is None:
        return lambda r: r, 0, memory
    g = request.g
    if isinstance(preconditioner, RunningPreconditioner):
        inverse, made, memory = preconditioner.refresh(request, memory)
    else:
        inverse, made = preconditioner(request.product, g, request.count)

    def checked(r: tree.PyTree) -> tree.PyTree:
        z = inverse(r)
        if leaves.difference(z, g, dtypes=False) is not None:
            found, expected = (shown(jax.tree.map(jnp.shape, x)) for x in (z, g))
            raise ValueError(
                f"{method}(preconditioner=…): the approximate inverse must return a pytree like "
                f"the parameters, of shapes {expected}; it returned {found}"
            )
        return jax.tree.unflatten(jax.tree.structure(g), jax.tree.leaves(z))

    return checked, made, memory


@checked
def hutchinson_diagonal(
    samples: Size = 8, *, power: UpToOne = 1.0, floor: Fraction = 1e-2, seed: Seed = 0
) -> Preconditioner:
    """A diagonal preconditioner, estimated from products with random signs.

    From s products of the curvature C with random vectors zᵢ of signs ±1, it computes::

        D = 1/s Σᵢ zᵢ ⊙ C zᵢ
        v ↦ v / max(|D|, φ maxⱼ |Dⱼ|)^ξ      (entry by entry)

    The signs are new in each update. If C is diagonal, one sample is exact. Use it if the
    parameters have different scales. It is sharded like the parameters.

    Args:
      samples: s ≥ 1, number of products in each update.
      power: ξ in [0, 1]. A value below 1 trusts the estimate less.
      floor: φ in [0, 1), the smallest entry relative to the largest.
      seed: seed of the random signs.

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
            # an entry of 0 counts as the largest; if all are 0 or not finite, it is the identity
            return tree.reciprocal(jnp.where(size > 0, size, most)) ** scalar(power)

        inverse = tree.map(inverse_of, diagonal)
        return lambda v: tree.map(jnp.multiply, v, inverse), samples

    return build


@checked
def nystrom(rank: Size = 10, *, seed: Seed = 0) -> Preconditioner:
    """A preconditioner from the largest eigenvalues, estimated from a random sketch.

    Ω is a random orthonormal matrix of r columns, new in each update. U Λ Uᵀ is the
    eigendecomposition of the Nyström approximation of the curvature C::

        U Λ Uᵀ = (CΩ) (ΩᵀCΩ)⁻¹ (CΩ)ᵀ
        v ↦ λ_r U Λ⁻¹ Uᵀ v + (v − U Uᵀ v)

    Use it for a damped, positive semi-definite curvature with a few large eigenvalues, such as the
    Gauss–Newton matrix of a deep net. If the curvature is indefinite, it is the identity. While CG
    runs, every device holds r vectors of the size of all parameters.

    Args:
      rank: r ≥ 1, number of products in each update; at most the number of parameters.
      seed: seed of the random sketch.

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
        factor = jnp.linalg.cholesky(_dot(omega.T, y))  # NaN if the curvature is indefinite
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
