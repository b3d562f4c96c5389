"""Derivatives through updates, where JAX needs help."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gradxform.tree import PyTree, max_abs


def forward_only(method: str, values: PyTree) -> PyTree:
    """``values`` unchanged; reverse-mode differentiation raises an error that names ``method``.

    JAX cannot reverse a loop whose length depends on data, and its own error names no method.
    """

    def mark(x: jax.Array) -> jax.Array:
        return _forward_only.bind(x, method=method) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(mark, values)


def _refuse(cotangent: Any, _: Any, *, method: str) -> Any:
    raise NotImplementedError(
        f"{method} contains a loop whose length depends on data, and JAX cannot reverse such a "
        "loop: use forward mode through its updates (jax.jvp, jax.jacfwd), or minimize with its "
        'default, derivative="implicit"'
    )


_forward_only = Primitive("forward_only")
_forward_only.def_impl(lambda x, *, method: x)
_forward_only.def_abstract_eval(lambda x, *, method: x)
mlir.register_lowering(_forward_only, lambda _, x, *, method: [x])
batching.defvectorized(_forward_only)
ad.deflinear2(_forward_only, _refuse)


@jax.custom_jvp
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors, with finite derivatives for equal eigenvalues.

    The eigenvectors of equal eigenvalues may rotate among each other. Functions of the matrix do
    not depend on this rotation, so its derivative is left out.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@eigh.defjvp
def _(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    values, vectors = eigh(*primals)
    (d_matrix,) = tangents
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    d_values, turn = turn_of(values, dot(vectors.T, dot(d_matrix, vectors)))
    return (values, vectors), (d_values, dot(vectors, turn))


def turn_of(values: jax.Array, change: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How eigenvalues and eigenvectors V move when the matrix changes by V ``change`` Vᵀ.

    Returns the change of the values and the T with dV = V T. T is 0 among equal values.
    """
    gap = values[None, :] - values[:, None]
    distinct = jnp.abs(gap) > jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    turn = jnp.where(distinct, change / jnp.where(distinct, gap, 1), 0)
    return jnp.diagonal(change), turn


def constant_size(values: PyTree) -> jax.Array:
    """The largest absolute entry, without a derivative.

    Dividing by a common size keeps squares in range. The results do not depend on the size, so its
    derivative (undefined at 0) is left out.
    """
    return jax.lax.stop_gradient(max_abs(values))
