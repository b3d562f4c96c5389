"""``by_rows``: residuals whose Jacobian is computed one example after the other, in one batch."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from gradxform import tree
from gradxform.hyperparameters import checked


@checked
def by_rows(residual: Callable[..., Any]) -> Callable[..., Any]:
    """The residuals of many examples, from the ``residual`` of one, with a cheap Jacobian.

    Let rᵢ(θ) be the residual of example i. It depends on the parameters θ and on example i alone,
    so each row of the Jacobian is the gradient of one residual::

        r(θ) = (r₁(θ), …, rₘ(θ)),    row i of J = ∇rᵢ(θ)ᵀ

    All m rows together take about the time of two gradients of the loss, because each is a backward
    pass through one example. Without this, :func:`gradxform.least_squares` computes J column by
    column, and each of the n columns takes a pass through all examples. Use it for models with many
    parameters, for instance nets. A gradient of the loss does not need the rows, and takes about
    twice the time through this function.

    Args:
      residual: a function of the parameters and of one example, which may be several arguments. It
        returns a scalar, an array or a pytree of arrays.

    Returns:
      A function of the parameters and of many examples: each argument has one more leading axis.
      Its values are those of ``jax.vmap``. All derivatives work, in any nesting.

    Raises:
      TypeError: ``residual`` is not a function, or the examples are missing.

    >>> import jax.numpy as jnp, gradxform as gx
    >>> decay = lambda p, t, y: p["a"] * jnp.exp(-p["b"] * t) - y  # one measurement
    >>> t = jnp.linspace(0.0, 2.0, 20)
    >>> start, data = {"a": 1.0, "b": 1.0}, (t, 3 * jnp.exp(-0.5 * t))
    >>> fit = gx.least_squares(gx.by_rows(decay), start, args=data)
    >>> {name: round(float(value), 3) for name, value in fit.params.items()}
    {'a': 3.0, 'b': 0.5}
    """
    signature = inspect.signature(residual)

    @functools.partial(jax.custom_jvp)
    def rows(params: tree.PyTree, examples: tuple[Any, ...]) -> Any:
        return jax.vmap(residual, (None, *(0 for _ in examples)))(params, *examples)

    @functools.partial(rows.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        params, examples = primals
        moves, shifts = map(_without_symbols, primals, tangents)
        flat, unravel = ravel_pytree(params)
        shift = None if shifts is None else jax.tree.map(_as_tangent, examples, shifts)

        def row(example: tuple[Any, ...], shift: Any) -> tuple[jax.Array, jax.Array, Any]:
            """Residual and row of J of one example, and what its own shift adds."""
            at = lambda flat: ravel_pytree(residual(unravel(flat), *example))[0]
            value, pull = jax.vjp(at, flat)
            (jacobian,) = jax.vmap(pull)(jnp.eye(value.size, dtype=value.dtype))
            if shift is None:
                return value, jacobian, jnp.zeros_like(value)
            of_example = lambda *example: ravel_pytree(residual(params, *example))[0]
            return value, jacobian, jax.jvp(of_example, example, shift)[1]

        in_axes = (0, None if shift is None else 0)
        values, jacobian, own = jax.vmap(row, in_axes)(examples, shift)
        change = own if moves is None else own + jacobian @ ravel_pytree(moves)[0]
        like = jax.eval_shape(lambda: residual(params, *jax.tree.map(lambda x: x[0], examples)))
        restore = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))[1]
        return jax.vmap(restore)(values), jax.vmap(restore)(change)

    @functools.wraps(residual, updated=())
    def residuals(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        params, *examples = given.args
        if given.kwargs or not jax.tree.leaves(examples):
            raise TypeError(
                "by_rows: the function takes the parameters and then arrays of examples, by "
                f"position or by name; got {len(examples)} arguments with examples"
            )
        return rows(params, jax.tree.map(jnp.asarray, tuple(examples)))

    return residuals


def _without_symbols(primals: Any, tangents: Any) -> Any:
    """The tangents as arrays, or None if all of them are zero."""
    is_zero = lambda x: isinstance(x, SymbolicZero)
    leaves, structure = jax.tree.flatten(tangents, is_leaf=is_zero)
    if all(map(is_zero, leaves)):
        return None
    arrays = [
        jnp.zeros_like(x) if is_zero(t) else t
        for x, t in zip(jax.tree.leaves(primals), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def _as_tangent(x: jax.Array, shift: jax.Array) -> Any:
    """JAX wants tangents of integers to have the type float0."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return shift
    return jnp.zeros(x.shape, jax.dtypes.float0)
