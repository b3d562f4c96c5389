"""Complex parameters as pairs of real ones, for the methods that work on real numbers.

A second-order method, or one that looks at signs, treats a complex leaf z = x + iy as two real
leaves x and y. The gradient of z is ∂f/∂x + i ∂f/∂y, the conjugate of what ``jax.grad`` returns;
its parts are the gradients of x and y.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradxform.objective import substituted
from gradxform.tree import Array, PyTree, is_complex


class Parts(NamedTuple):
    """A complex leaf as two real ones."""

    real: Array
    imag: Array


def _is_parts(node: Any) -> bool:
    return isinstance(node, Parts)


def to_real(params: PyTree) -> PyTree:
    """``params`` with :class:`Parts` for each complex leaf; other leaves stay as they are.

    >>> to_real({"z": jnp.complex64(1 + 2j), "n": 3})
    {'n': 3, 'z': Parts(real=Array(1., dtype=float32), imag=Array(2., dtype=float32))}
    """
    split = lambda x: Parts(jnp.real(x), jnp.imag(x)) if is_complex(x) else x
    return jax.tree.map(split, params)


def to_complex(params: PyTree) -> PyTree:
    """The tree that :func:`to_real` got.

    >>> to_complex(Parts(jnp.float32(1), jnp.float32(2)))
    Array(1.+2.j, dtype=complex64)
    """
    join = lambda x: jax.lax.complex(*x) if _is_parts(x) else x
    return jax.tree.map(join, params, is_leaf=_is_parts)


def has_parts(params: PyTree) -> bool:
    """Whether :func:`to_real` has changed anything."""
    return any(map(_is_parts, jax.tree.leaves(params, is_leaf=_is_parts)))


def of_real(value_fn: Callable[..., Any]) -> Callable[..., Any]:
    """``value_fn`` as a function of real trees; an objective of ``gx.compose`` stays one."""
    return substituted(value_fn, to_complex)


def update_of_real(update: Callable[..., tuple[PyTree, Any]]) -> Callable[..., tuple[PyTree, Any]]:
    """``update`` of a method for real parameters, as one for complex parameters."""

    def of_complex(
        grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        for name, change in (("grad", to_real), ("value_fn", of_real)):
            if extra_args.get(name) is not None:
                extra_args[name] = change(extra_args[name])
        updates, state = update(to_real(grads), state, to_real(params), **extra_args)
        return to_complex(updates), state

    return of_complex


def evaluated_as_real(
    evaluate: Callable[[Any, PyTree], PyTree],
) -> Callable[[Any, PyTree], PyTree]:
    """A function for ``gx.eval_params``, of a state that stores real trees."""

    @functools.wraps(evaluate)
    def of_any(state: Any, params: PyTree) -> PyTree:
        if not any(map(is_complex, jax.tree.leaves(params))):
            return evaluate(state, params)
        return to_complex(evaluate(state, to_real(params)))

    return of_any
