"""Conjugate gradients (CG): a single iteration, and JAX's ``cg`` with its products counted.

For Ax = b with a preconditioner M, starting from r = Ax − b and d = −Mr, an iteration is::

    t = rᵀMr / dᵀAd
    x ← x + t d
    r' = r + t Ad
    d ← (r'ᵀMr' / rᵀMr) d − Mr'

:func:`step` makes one iteration, for the loops of Steihaug's trust region and of Hessian-free
optimisation. Methods that need only the solution use :func:`counted_cg`.

``jax.scipy.sparse.linalg.cg`` returns only the solution. Only the operator v ↦ Av can see how many
products are made and whether one meets negative curvature. It reports both through the vectors: one
more leaf holds a row of *marks*, all 0 at first.

* In the j-th product the operator sets the j-th mark to τ vᵀAv / vᵀv. CG multiplies it by its step
  γ / vᵀAv, so the residual receives τγ / vᵀv, which is at most τ in any unit of A. From there the
  mark enters the next direction, where the operator counts the marks. With the next step it enters
  the solution. τ² is far below rounding, so the marks do not change CG's inner products.
* To stop CG early, the operator returns a curvature so large that the step is below rounding. One
  more step of this kind carries the last marks into the solution. Then the operator returns an
  infinite curvature: the residual becomes NaN, and JAX's CG stops.

The right-hand side, the preconditioner and the operator are first scaled to size 1, so the units do
not matter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.scipy.sparse.linalg import cg

from gradxform import tree
from gradxform.curvature import Product
from gradxform.hyperparameters import Scalar, scalar
from gradxform.kernels import vdots
from gradxform.sharding import is_explicit, varying_like

_MOST_ITERATIONS = 1000
_ENDED, _CARRIED, _LOW = -1, -2, -3  # positions of the other marks, after those of the products
_Marked: TypeAlias = tuple[tree.PyTree, jax.Array]
_Leaves: TypeAlias = list[jax.Array]


# -- one iteration


class Iterate(NamedTuple):
    """The state of CG between two iterations for Ax = b."""

    x: tree.PyTree  #: the approximate solution
    r: tree.PyTree  #: the residual Ax − b
    d: tree.PyTree  #: the direction of the next iteration
    rz: jax.Array  #: rᵀMr


def first_iterate(x: tree.PyTree, r: tree.PyTree, inverse: Product | None = None) -> Iterate:
    """CG started at ``x``, where the residual is ``r``. Without ``inverse``, M = I."""
    z = inverse(r) if inverse else r
    return Iterate(x, r, jax.tree.map(jnp.negative, z), tree.vdot(r, z))


def products_at(
    at: Iterate, pairs: list[tuple[tree.PyTree, tree.PyTree]], inverse: Product | None
) -> tuple[list[jax.Array], jax.Array]:
    """The inner products of ``pairs``, and rᵀMr, in one round of communication between devices."""
    # With sharded parameters ``at.rz`` is a prediction that lacks a digit or two.
    if inverse is not None or jax.device_count() == 1:
        return vdots(*pairs), at.rz
    *found, rr = vdots(*pairs, (at.r, at.r))
    return found, rr


def step(
    at: Iterate, ad: tree.PyTree, t: jax.Array, rz: jax.Array, inverse: Product | None = None
) -> Iterate:
    """The next iterate, after a step ``t`` along d; ``ad`` is Ad and ``rz`` is rᵀMr."""
    x = tree.map(lambda x, d: x + t * d, at.x, at.d)
    r = tree.map(lambda r, ad: r + t * ad, at.r, ad)
    if inverse is None:
        z, next_rz = r, tree.next_square(at.r, t, ad, r)
    else:
        z = inverse(r)
        next_rz = tree.vdot(r, z)
    d = tree.map(lambda d, z: tree.divide(next_rz, rz) * d - z, at.d, z)
    return Iterate(x, r, d, next_rz)


# -- JAX's cg, with its products counted


class CgSolution(NamedTuple):
    """What :func:`counted_cg` returns."""

    x: tree.PyTree  #: the approximate solution
    products: jax.Array  #: products made with A
    low: jax.Array  #: whether CG stopped at a direction of too little curvature
    first_step: jax.Array  #: length of the first step for a curvature of ‖Ap‖/‖p‖
    usable: jax.Array  #: whether the first product was finite and not 0


def of_constants(
    product: Product, like: tree.PyTree
) -> tuple[Callable[..., tree.PyTree], list[jax.Array]]:
    """``product`` with the arrays it closes over as explicit arguments, and these arrays.

    Unlike ``jax.closure_convert`` this takes out integers and booleans too. ``like`` is a vector
    that ``product`` can take.
    """
    leaves, structure = jax.tree.flatten(like)

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(product(jax.tree.unflatten(structure, leaves)))

    # on flat lists, because JAX refuses pytree nodes that hold arrays as metadata
    closed = jax.make_jaxpr(flat)(*leaves)
    jaxpr = closed.jaxpr

    def converted(v: tree.PyTree, *consts: jax.Array) -> tree.PyTree:
        found = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(v))
        return jax.tree.unflatten(structure, found)

    return converted, closed.consts


def as_solution(
    product: Callable[..., tree.PyTree], consts: list[jax.Array], b: tree.PyTree, x: tree.PyTree
) -> tree.PyTree:
    """``x``, with the derivatives of the exact solution of Ax = b.

    The derivatives solve A dx = db − dA x, by conjugate gradients up to rounding.

    Args:
      product: (v, *consts) ↦ Av, symmetric.
      consts: the arrays that A depends on.
      b: the right-hand side.
      x: close to A⁻¹b; its own derivatives are ignored.
    """
    structure, dtype, steps = jax.tree.structure(b), jnp.result_type(*jax.tree.leaves(b)), _most(b)

    @jax.custom_jvp
    def solution(b: _Leaves, consts: list[jax.Array], x: _Leaves) -> _Leaves:
        return x

    def solve(operator: Callable[[_Leaves], _Leaves], b: _Leaves) -> _Leaves:
        return cg(operator, b, tol=float(jnp.finfo(dtype).eps), maxiter=steps)[0]

    @solution.defjvp
    def _(primals: Any, tangents: Any) -> tuple[_Leaves, _Leaves]:
        (b, consts, x), (db, d_consts, _) = primals, tangents

        def flat_product(v: _Leaves, consts: list[jax.Array]) -> _Leaves:
            cast = jax.tree.unflatten(structure, tree.cast_like(v, b))
            return [av.astype(dtype) for av in jax.tree.leaves(product(cast, *consts))]

        _, change = jax.jvp(lambda consts: flat_product(x, consts), (consts,), (d_consts,))
        rest = [d.astype(dtype) - c for d, c in zip(db, change, strict=True)]
        # cg itself cannot be reversed, because its start depends on the tangents
        dx: Any = jax.lax.custom_linear_solve(
            lambda v: flat_product(v, consts), rest, solve, solve, symmetric=True
        )
        return x, tree.cast_like(dx, x)

    return jax.tree.unflatten(structure, solution(jax.tree.leaves(b), consts, jax.tree.leaves(x)))


class _Start(NamedTuple):
    """CG's first direction p and its product Ap, all scaled to size 1."""

    b: tree.PyTree  # b / ‖b‖
    p: tree.PyTree  # the first direction
    ap: tree.PyTree  # Ap / κ, so that ‖ap‖ = ‖p‖
    size: jax.Array  # ‖b‖
    kappa: jax.Array  # κ = ‖Ap‖ / ‖p‖, or 1 if that is 0 or not finite
    unit: jax.Array  # 1 / bᵀMb, the scale of the preconditioner
    usable: jax.Array  # whether ‖Ap‖ / ‖p‖ is finite and not 0


def norm(x: tree.PyTree) -> jax.Array:
    """‖x‖, without overflow or underflow of the squares."""
    unit = tree.reciprocal(tree.max_abs(x))
    scaled = tree.scale(unit, x)
    return scalar(tree.sqrt(tree.vdot(scaled, scaled)) / unit)


def counted_cg(
    product: Product,
    b: tree.PyTree,
    *,
    tol: jax.Array,
    maxiter: Scalar,
    inverse: Product | None = None,
    least: Scalar | None = None,
) -> CgSolution:
    """The solution x of Ax = b by ``jax.scipy.sparse.linalg.cg``, started at 0.

    It stops when ‖Ax − b‖ ≤ ``tol`` ‖b‖, after ``maxiter`` products, before a direction of zero
    curvature, and when a product is not finite.

    Args:
      product: v ↦ Av, symmetric.
      b: the right-hand side, in at least float32.
      tol: the relative residual; 1 or more returns without any product.
      maxiter: at least 1. It is never more than 1000, nor twice the number of entries of b.
      inverse: the preconditioner M, positive definite and close to a multiple of A⁻¹; ``None`` for
        none.
      least: CG also stops before a direction v with vᵀAv < ``least`` vᵀv, as Nocedal & Wright's
        Algorithm 7.1 does at negative curvature. With ``None`` it uses the absolute curvature and
        continues.
    """
    dtype = jnp.result_type(*jax.tree.leaves(b))  # CG needs one dtype for all leaves
    most = _most(b)
    if isinstance(maxiter, int | float | np.number):
        most = min(most, int(maxiter))

    wanted = tol < 1
    begin = _start(product, b, inverse, wanted)
    stop = least is not None
    floor = scalar(least if stop else 0) / begin.kappa
    _, flat, low = _curvature(begin.p, begin.ap, floor)
    is_single = flat | (low & stop)  # the first direction is also the last
    limit = jnp.where(wanted & begin.usable & ~is_single, jnp.minimum(scalar(maxiter), most), 0)
    limit = limit.astype(jnp.int32)

    def scaled_inverse(marked: _Marked) -> _Marked:
        r, marks = marked
        assert inverse is not None
        z = tree.scale(begin.unit, inverse(tree.cast_like(r, b)))
        return jax.tree.map(lambda z: z.astype(dtype), z), marks

    vector = jax.tree.map(lambda x: x.astype(dtype), begin.b)
    x, marks = _jax_cg(
        _operator(product, begin, b, limit, floor, stop),
        (vector, varying_like(jnp.zeros(most + 3, dtype), b)),
        None if inverse is None else scaled_inverse,
        tol,
        jnp.where(limit > 0, limit + 1, 0),
    )
    made = jnp.sum(marks[:-3] != 0, dtype=jnp.int32)
    ended = marks[_ENDED] != 0
    # if no mark says that CG was stopped, its last product is not in the solution yet
    products = jnp.where(ended, made, jnp.minimum(made + 1, limit))
    length = norm(begin.p)
    single = tree.scale(tree.divide(scalar(1), length**2), begin.p)
    x = tree.select(is_single & begin.usable, single, tree.cast_like(x, b))
    return CgSolution(
        x=tree.scale(begin.size / begin.kappa, x),
        products=jnp.where(limit > 0, products, wanted.astype(jnp.int32)),
        low=jnp.where(is_single, low & stop, marks[_LOW] != 0),
        first_step=tree.divide(begin.size / begin.kappa, length),
        usable=begin.usable,
    )


def _most(b: tree.PyTree) -> int:
    return min(2 * tree.count(b), _MOST_ITERATIONS)


def _start(product: Product, b: tree.PyTree, inverse: Product | None, wanted: jax.Array) -> _Start:
    size = norm(b)
    one = tree.scale(tree.reciprocal(size), b)
    p, unit = one, scalar(1)
    if inverse is not None:
        p = inverse(one)
        unit = tree.reciprocal(scalar(tree.vdot(one, p)))
        p = tree.scale(unit, p)
    zeros = jax.tree.map(jnp.zeros_like, b)
    ap = jax.lax.cond(wanted, lambda: tree.cast_like(product(p), b), lambda: zeros)
    kappa = tree.divide(norm(ap), norm(p))
    usable = (kappa > 0) & jnp.isfinite(kappa)
    kappa = jnp.where(usable, kappa, 1)
    ap = tree.select(usable, tree.scale(1 / kappa, ap), zeros)
    return _Start(one, p, ap, size, kappa, unit, usable)


def _curvature(
    v: tree.PyTree, av: tree.PyTree, floor: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """vᵀAv; whether it is not finite or 0 up to rounding; whether it is below ``floor`` vᵀv.

    A is scaled to size 1.
    """
    bend, length = tree.vdot(v, av), tree.vdot(v, v)
    sizes = (jax.tree.map(jnp.abs, x) for x in (v, av))
    eps = jnp.finfo(bend.dtype).eps
    # with a curvature of 0, rounding errors in v give one of eps²
    rounding = jnp.maximum(eps * tree.vdot(*sizes), eps**2 * length)
    flat = ~((jnp.abs(bend) > rounding) & jnp.isfinite(bend))
    return bend, flat, bend < floor.astype(bend.dtype) * length - rounding


def _operator(
    product: Product,
    begin: _Start,
    like: tree.PyTree,
    limit: jax.Array,
    floor: jax.Array,
    stop: bool,
) -> Callable[[_Marked], _Marked]:
    """v ↦ Av/κ, with the sign flipped where the curvature is negative, and with the marks."""

    def operator(marked: _Marked) -> _Marked:
        v, marks = marked
        eps = jnp.finfo(marks.dtype).eps
        tau, huge = eps**2, 1 / eps**1.5
        made = jnp.sum(marks[:-3] != 0, dtype=jnp.int32)
        ended, carried = marks[_ENDED] != 0, marks[_CARRIED] != 0
        length = tree.vdot(v, v)
        first = made == 0
        idle = (length == 0) | ended | (made >= limit)  # CG starts with a product with 0
        av = jax.lax.cond(
            idle | first,
            lambda: tree.scale((first & ~idle).astype(length.dtype), begin.ap),
            lambda: tree.scale(1 / begin.kappa, product(tree.cast_like(v, like))),
        )
        bend, flat, low = _curvature(v, av, floor)
        low &= stop
        ending = ~idle & (flat | low)
        short = ending | (idle & (length > 0))

        # CG's step is γ / vᵀAv. With negative curvature, flipping the sign of Av flips that of the
        # step too: the residual changes as before, but the solution goes downhill.
        def turned(v: jax.Array, av: jax.Array) -> jax.Array:
            infinite = jnp.where(v > 0, jnp.inf, jnp.where(v < 0, -jnp.inf, 0))
            curved = jnp.where(bend < 0, -av, av)
            return jnp.where(carried, infinite, jnp.where(short, huge * v, curved)).astype(v.dtype)

        place = jnp.arange(-len(marks), 0, dtype=jnp.int32)
        sent = (place + len(marks) == made) & ~idle
        sent |= (place == _ENDED) & ending
        sent |= (place == _LOW) & ending & low
        sent |= (place == _CARRIED) & ended & ~carried
        weight = tau * jnp.where(short, huge, tree.divide(jnp.abs(bend), length))
        mark = jnp.where(sent, weight, 0).astype(marks.dtype)
        return jax.tree.map(turned, v, av), mark

    return operator


def _jax_cg(
    operator: Callable[[_Marked], _Marked],
    b: _Marked,
    inverse: Callable[[_Marked], _Marked] | None,
    tol: jax.Array,
    maxiter: jax.Array,
) -> _Marked:
    """``jax.scipy.sparse.linalg.cg`` from 0, in automatic mode if the mesh has explicit axes.

    JAX's ``cg`` takes inner products that explicit axes do not allow. The operator and the
    preconditioner still see the explicit mesh.
    """

    def solve(a: Any, m: Any, b: _Marked, tol: Any, maxiter: jax.Array) -> _Marked:
        leaves, structure = jax.tree.flatten(b)

        def found(leaves: _Leaves, tol: Any, maxiter: jax.Array) -> _Leaves:
            b = jax.tree.unflatten(structure, leaves)
            return jax.tree.leaves(cg(a, b, tol=tol, maxiter=maxiter, M=m)[0])

        # One program, so that jax_debug_nans does not see the NaN that stops CG. On flat leaves,
        # because JAX cannot find programs by pytree nodes that hold arrays as metadata.
        return jax.tree.unflatten(structure, jax.jit(found)(leaves, tol, maxiter))

    divided = [jax.typeof(x).sharding for x in jax.tree.leaves(b) if is_explicit(x)]
    if not divided:
        return solve(operator, inverse, b, tol, maxiter)
    mesh, specs = divided[0].mesh, jax.tree.map(lambda x: jax.typeof(x).sharding.spec, b)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    a, m = (
        f and jax.sharding.explicit_axes(f, axes=axes, in_sharding=(specs,))
        for f in (operator, inverse)
    )
    automatic: Any = jax.sharding.auto_axes(
        functools.partial(solve, a, m), axes=axes, out_sharding=specs
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return automatic(b, tol, maxiter)
