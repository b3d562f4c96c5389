"""L-BFGS-B: the step of L-BFGS within bounds.

Byrd, Lu, Nocedal & Zhu (1995), with the projection of Morales & Nocedal (2011). B is the L-BFGS
estimate of the Hessian, and P(x) the closest point within the bounds::

    m(z) = gᵀz + ½ zᵀB z              the model of f(x + z) − f(x)
    z(t) = P(x − t g) − x             the path of the projected gradient
    t ← a minimum of m(z(t))          the generalised Cauchy point
    A ← the entries of x + z(t) at a bound;  F ← the other ones
    p ← the minimum of m(p) with p_A = z_A(t)
    d ← P(x + p) − x
    if gᵀd ≥ 0:  d ← z(t) + α (p − z(t)) with the largest α ≤ 1 within the bounds
    x ← x + t d                       t by a line search, up to the first bound

The products with B and the minimum p come from one small matrix. With the pairs s, y as columns of
S and Y, D the diagonal and R the upper triangle of SᵀY, γ = sᵀy / yᵀy of the newest pair, and
θ = 1/γ::

    U = (√θ S, √γ Y)
    N(A) = [ θ S_AᵀS_A      S_AᵀY_A − R     ]
           [ Y_AᵀS_A − Rᵀ   −D − γ Y_FᵀY_F  ]
    B = θ (I − U N⁻¹ Uᵀ)                            with N for all entries
    N(A) e = γ U_Fᵀ g_F − U_Aᵀ z_A
    p_F = −γ g_F − U_F e

Without an entry in A, p is the step −H g of L-BFGS. The breakpoints of the path are not sorted:
Newton's method, kept in a bracket, finds the piece of the path that has the minimum.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradxform import tree
from gradxform.bounds import Box, longest, project, projected_gradient, reaches
from gradxform.second_order.pairs import Pair
from gradxform.sharding import varying_like, whole

# the part of the decrease to first order that the model has at least at the Cauchy point
_DECREASE = 0.01
_MOST_TURNS = 60


class Model(NamedTuple):
    """The pairs; empty slots are 0."""

    s: tree.PyTree  #: changes of x, with a leading axis of m slots
    y: tree.PyTree  #: changes of g, with a leading axis of m slots
    gram: jax.Array  #: the inner products of all s and y, 2m × 2m
    gamma: jax.Array  #: γ
    age: jax.Array  #: the age of the pair in each slot, the smaller the older


def bounded_step(model: Model, box: Box, x: tree.PyTree, g: tree.PyTree) -> tree.PyTree:
    """The step d to the minimum of the model within the bounds; NaN if the model is singular.

    All trees have the layout of ``x`` and are in at least float32.
    """
    g = projected_gradient(box, x, g)
    inner = _scaled(model, model.gram)
    path = _path(box, x, g)
    # t only decides which entries are held, and JAX cannot reverse the loop
    t = _cauchy_length(*jax.lax.stop_gradient((model, inner, box, x, path)))
    z = _displacement(box, x, path, t)
    held = jax.tree.map(
        lambda x, u, end, low, high: (end <= t) | ((u == 0) & ((x <= low) | (x >= high))),
        *(x, path.unit, path.ends, box.low, box.high),
    )

    v = jax.tree.map(lambda held, z, g: jnp.where(held, -z, model.gamma * g), held, z, g)
    row = jax.tree.map(lambda v: v[None], v)
    matrix = _matrix(model, inner, _scaled(model, _gram_of(model, held)))
    e = jnp.linalg.solve(matrix, _times(model, row)[:, 0])
    p = jax.tree.map(lambda held, v, c: -v - jnp.where(held, 0, c), held, v, _combined(model, e, x))

    projected = jax.tree.map(jnp.subtract, project(box, jax.tree.map(jnp.add, x, p)), x)
    beyond = jax.tree.map(jnp.subtract, p, z)
    alpha = jnp.minimum(longest(box, jax.tree.map(jnp.add, x, z), beyond), 1)
    truncated = jax.tree.map(lambda z, beyond: z + alpha * beyond, z, beyond)
    return tree.select(tree.vdot(g, projected) < 0, projected, truncated)


# -- products with U and the small matrices


def _times(model: Model, v: tree.PyTree) -> jax.Array:
    """Uᵀv for each row v of ``v``, as columns."""
    return _scales(model)[:, None] * _products(model.s, model.y, v)


def _scales(model: Model) -> jax.Array:
    """The factors of the columns of S and Y in U."""
    root = jnp.sqrt(model.gamma)
    return jnp.repeat(jnp.stack([1 / root, root]), model.age.size)


def _scaled(model: Model, gram: jax.Array) -> jax.Array:
    scales = _scales(model)
    return scales[:, None] * scales[None, :] * gram


def _products(s: tree.PyTree, y: tree.PyTree, v: tree.PyTree) -> jax.Array:
    """The inner products of all s and y with each row of ``v``."""
    return jnp.concatenate([_inner(s, v), _inner(y, v)])


def gram_after(
    gram: jax.Array, s: tree.PyTree, y: tree.PyTree, pair: Pair, slot: jax.Array
) -> jax.Array:
    """The inner products of all s and y, after ``pair`` was put into a slot of them.

    ``slot`` marks it; it marks none if the pair is skipped.
    """
    columns = _products(s, y, jax.tree.map(lambda *rows: jnp.stack(rows), pair.s, pair.y))
    no_slot = jnp.zeros_like(slot)
    for column, place in ((columns[:, 0], (slot, no_slot)), (columns[:, 1], (no_slot, slot))):
        is_new = jnp.concatenate(place)
        gram = jnp.where(is_new[:, None], column[None, :], gram)
        gram = jnp.where(is_new[None, :], column[:, None], gram)
    return gram


def _inner(a: tree.PyTree, b: tree.PyTree) -> jax.Array:
    """The inner products of the rows of ``a`` and those of ``b``."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = tuple(range(1, a.ndim))
        return jnp.tensordot(
            a,
            b,
            (axes, axes),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=whole(a),
        )

    return sum(jax.tree.leaves(jax.tree.map(product, a, b)), start=jnp.zeros(()))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _combined(model: Model, e: jax.Array, like: tree.PyTree) -> tree.PyTree:
    """U e."""
    of_s, of_y = jnp.split(_scales(model) * e, 2)
    return jax.tree.map(
        lambda s, y, x: (jnp.tensordot(of_s, s, 1) + jnp.tensordot(of_y, y, 1)).astype(x.dtype),
        *(model.s, model.y, like),
    )


def _gram_of(model: Model, held: tree.PyTree) -> jax.Array:
    """The inner products of all s and y, of the entries where ``held``."""

    def of_held(slots: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(lambda x, held: jnp.where(held, x, 0), slots, held)

    s, y = of_held(model.s), of_held(model.y)
    sy = _inner(s, model.y)
    return jnp.block([[_inner(s, model.s), sy], [sy.T, _inner(y, model.y)]])


def _matrix(model: Model, inner: jax.Array, held: jax.Array) -> jax.Array:
    """N(A) from ``inner`` = UᵀU and ``held`` = U_AᵀU_A."""
    m = model.age.size
    sy, yy = inner[:m, m:], inner[m:, m:]
    upper = jnp.where(model.age[:, None] <= model.age[None, :], sy, 0)
    rest = jnp.block([[jnp.zeros_like(sy), -upper], [-upper.T, -jnp.diag(jnp.diag(sy)) - yy]])
    empty = (jnp.diag(inner) == 0).astype(inner.dtype)
    return held + rest + jnp.diag(empty)


def _factor(model: Model, inner: jax.Array) -> jax.Array:
    """V of B = θ (I + U Vᵀ E V Uᵀ), with E = −1 for the first m rows of V and 1 for the others.

    Byrd, Nocedal & Schnabel (1994), eq. 2.26: a Cholesky factor without any difference.
    """
    m = model.age.size
    ss, sy = inner[:m, :m], inner[:m, m:]
    d = jnp.diag(sy)
    lower = jnp.where(model.age[:, None] > model.age[None, :], sy, 0)
    lower_by_d = tree.divide(lower, d[None, :])
    k = ss + jnp.matmul(lower_by_d, lower.T, precision=jax.lax.Precision.HIGHEST)
    # dependent pairs make K singular, and rounding may make it indefinite
    floor = jnp.where(d > 0, m * jnp.finfo(k.dtype).eps * jnp.diag(k), 1)
    j = jnp.linalg.cholesky(k + jnp.diag(floor))
    first = jax.scipy.linalg.solve_triangular(
        j, jnp.concatenate([jnp.eye(m, dtype=k.dtype), lower_by_d], 1), lower=True
    )
    root = jnp.diag(tree.divide(jnp.ones_like(d), tree.sqrt(d)))
    return jnp.concatenate([first, jnp.concatenate([jnp.zeros_like(root), root], 1)])


# -- the Cauchy point


class _Path(NamedTuple):
    """The path z(t) = P(x − t u) − x, with u the gradient divided by its largest entry.

    So the squares of its entries do not underflow.
    """

    unit: tree.PyTree  # u
    scale: jax.Array  # u = scale g
    ends: tree.PyTree  # the t at which each entry meets a bound


def _path(box: Box, x: tree.PyTree, g: tree.PyTree) -> _Path:
    scale = tree.reciprocal(tree.max_abs(g))
    unit = tree.scale(scale, g)
    return _Path(unit, scale, reaches(box, x, jax.tree.map(jnp.negative, unit)))


def _displacement(box: Box, x: tree.PyTree, path: _Path, t: jax.Array) -> tree.PyTree:
    """z(t); an entry that has met its bound is exactly the way there."""
    return jax.tree.map(
        lambda x, u, end, low, high: jnp.where(
            end <= t, jnp.where(u > 0, low - x, high - x), -t * u
        ),
        *(x, path.unit, path.ends, box.low, box.high),
    )


class _Piece(NamedTuple):
    """The model at a point of the path, and the piece of the path between two breakpoints."""

    slope: jax.Array  # of m(z(t)), to the right of t
    curvature: jax.Array
    is_low: jax.Array  # whether the model has decreased enough
    left: jax.Array
    right: jax.Array


class _Bracket(NamedTuple):
    """The model falls to the left of ``low``, and rises to the right of ``high``."""

    low: jax.Array
    high: jax.Array
    t: jax.Array  # the next point to look at, or the minimum
    is_found: jax.Array
    turns: jax.Array


def _cauchy_length(
    model: Model,
    inner: jax.Array,
    box: Box,
    x: tree.PyTree,
    path: _Path,
) -> jax.Array:
    """The t of the Cauchy point."""
    unit, ends = path.unit, path.ends
    theta = path.scale / model.gamma
    factor = _factor(model, inner)
    m = model.age.size
    most = tree.largest(inner.dtype)

    def look(t: jax.Array) -> _Piece:
        speed = jax.tree.map(lambda g, end: jnp.where(t < end, -g, 0), unit, ends)
        z = _displacement(box, x, path, t)
        vectors = jax.tree.map(lambda *rows: jnp.stack(rows), speed, z)
        flat, linear = _inner(vectors, vectors), tree.vdot(unit, z)
        rows = factor @ _times(model, vectors)
        bent = theta * (flat + _dot(rows[m:].T, rows[m:]) - _dot(rows[:m].T, rows[:m]))
        left, right = _neighbours(ends, t)
        return _Piece(
            slope=bent[0, 1] - flat[0, 0],
            curvature=jnp.maximum(bent[0, 0], jnp.finfo(t.dtype).eps * theta * flat[0, 0]),
            is_low=linear + 0.5 * bent[1, 1] <= _DECREASE * linear,
            left=left,
            right=right,
        )

    zero = jnp.zeros((), inner.dtype)
    start = _Bracket(zero, zero + most, zero, jnp.array(False), jnp.array(0, jnp.int32))
    end = jax.lax.while_loop(
        lambda bracket: ~bracket.is_found & (bracket.turns < _MOST_TURNS),
        lambda bracket: _narrowed(bracket, look(bracket.t)),
        varying_like(start, unit),
    )
    return jnp.where(end.is_found, end.t, end.low)


def _neighbours(ends: tree.PyTree, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last breakpoint up to t, or 0, and the first one beyond, or the largest number."""
    most = tree.largest(t.dtype)

    def of_leaf(end: jax.Array) -> jax.Array:
        both = jnp.stack([jnp.where(end <= t, end, 0), jnp.where(end > t, -end, -most)])
        return jnp.max(both, axis=tuple(range(1, both.ndim)))

    found = [of_leaf(end) for end in jax.tree.leaves(ends) if jnp.size(end)]
    left, right = functools.reduce(jnp.maximum, found)
    return left, -right


def _narrowed(bracket: _Bracket, piece: _Piece) -> _Bracket:
    """The bracket after a look at ``bracket.t``."""
    newton = bracket.t - tree.divide(piece.slope, piece.curvature)
    rises = ~piece.is_low | (piece.slope >= 0)
    low = jnp.where(rises, bracket.low, piece.right)
    high = jnp.where(rises, piece.left, bracket.high)
    is_minimum = piece.is_low & (piece.left <= newton) & (newton <= piece.right)
    is_break = low >= high  # the minimum is a breakpoint
    inside = (low < newton) & (newton < high) & (bracket.turns % 3 != 2)
    t = jnp.where(inside, newton, low + 0.5 * (high - low))
    return _Bracket(
        low=low,
        high=high,
        t=jnp.where(is_minimum, newton, jnp.where(is_break, low, t)),
        is_found=is_minimum | is_break,
        turns=bracket.turns + 1,
    )
