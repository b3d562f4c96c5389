"""``forward_mode``: derivatives by forward mode alone, for functions that JAX cannot reverse."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gradxform.hyperparameters import checked


@checked
def forward_mode(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with all its derivatives computed by forward mode.

    JAX cannot reverse a ``jax.lax.while_loop``, nor a ``jax.custom_jvp`` whose rule has one. So
    ``jax.grad`` of a simulation with adaptive steps raises an error, and so does
    :func:`gradxform.minimize`. This function returns the same function in a form for which they
    work, and ``jax.vjp``, ``jax.hessian``, Hessian-vector products, ``jax.vmap`` and ``jax.jit``
    too, in any nesting.

    **Cost.** A derivative takes one forward pass for each entry of the arguments that it is taken
    for, all in one batch: a gradient of n parameters costs n passes, a Hessian or a Hessian-vector
    product n². Arguments without derivatives, such as data, cost nothing. So this is for few
    parameters. If ``fn`` can be reversed, ``jax.grad`` of ``fn`` itself is cheaper.

    Call it once, outside of loops: :func:`gradxform.minimize` keeps one compiled program for each
    function that it returns.

    Args:
      fn: any function of pytrees. It may return a pytree, for instance a pair of value and ``aux``,
        and may close over arrays. Arrays of integers have no derivative.

    Returns:
      A function with the arguments and the result of ``fn``.

    Raises:
      TypeError: ``fn`` is not a function.

    >>> import jax, jax.numpy as jnp, gradxform as gx
    >>> def root(a):  # Heron's method
    ...     is_rough = lambda x: jnp.abs(x * x - a) > 1e-5 * a
    ...     return jax.lax.while_loop(is_rough, lambda x: (x + a / x) / 2, a)
    >>> round(float(jax.grad(gx.forward_mode(root))(4.0)), 4)  # 1 / (2 √4)
    0.25
    """

    @functools.wraps(fn, updated=())
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tracer)]
        if not places:  # no derivative is taken, unless of something that fn closes over
            result = fn(*args, **kwargs)
            if not any(isinstance(x, Tracer) for x in jax.tree.leaves(result)):
                return result
        structures = []

        def of_traced(*traced: jax.Array) -> list[Any]:
            filled = dict(enumerate(leaves)) | dict(zip(places, traced, strict=True))
            args, kwargs = jax.tree.unflatten(structure, filled.values())
            outputs, out = jax.tree.flatten(fn(*args, **kwargs))
            structures.append(out)
            return outputs

        traced = [leaves[i] for i in places]
        program = jax.make_jaxpr(of_traced)(*traced)
        # the arrays that fn closes over become arguments, because they may have derivatives too
        closed_over = len(program.consts)

        def of_arrays(*arrays: jax.Array) -> list[jax.Array]:
            bound = ClosedJaxpr(program.jaxpr, arrays[:closed_over])
            return list(jaxpr_as_fun(bound)(*arrays[closed_over:]))

        outputs = _by_jacobians(of_arrays)(*program.consts, *traced)
        return jax.tree.unflatten(structures[0], outputs)

    return forward


def _by_jacobians(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, a function of arrays, whose derivative is a product with its Jacobian matrix.

    Reverse mode transposes the product. The Jacobian is such a function again, so that it has
    derivatives of its own.
    """

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]
        directions = [part for i in moving for part in _real_parts(tangents[i])]
        pair = _by_jacobians(functools.partial(_value_and_jacobians, f, tuple(moving)))
        values, jacobians = pair(*primals)
        rows = iter(jacobians)
        outputs, structure = jax.tree.flatten(values)
        changes = [
            _change(y, next(rows), directions) if _is_smooth(y) else _none(y) for y in outputs
        ]
        return values, jax.tree.unflatten(structure, changes)

    call = jax.custom_jvp(f)
    call.defjvp(rule, symbolic_zeros=True)
    return call


def _value_and_jacobians(
    f: Callable[..., Any], moving: tuple[int, ...], *arrays: jax.Array
) -> tuple[Any, list[tuple[jax.Array, ...]]]:
    """``f(*arrays)``, and for each floating-point output its Jacobians in the ``moving`` arrays.

    A complex array counts as two, its real and its imaginary part.
    """

    def of_parts(*parts: jax.Array) -> tuple[list[jax.Array], Any]:
        filled, rest = dict(enumerate(arrays)), iter(parts)
        for i in moving:
            real = next(rest)
            filled[i] = jax.lax.complex(real, next(rest)) if jnp.iscomplexobj(arrays[i]) else real
        values = f(*filled.values())
        return [y for y in jax.tree.leaves(values) if _is_smooth(y)], values

    parts = [part for i in moving for part in _real_parts(arrays[i])]
    differentiated = jax.jacfwd(of_parts, argnums=tuple(range(len(parts))), has_aux=True)
    jacobians, values = differentiated(*parts)
    return values, jacobians


def _real_parts(x: jax.Array) -> list[jax.Array]:
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _is_smooth(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _none(x: jax.Array) -> np.ndarray:
    """The tangent of an array of integers."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def _change(
    value: jax.Array, jacobians: Sequence[jax.Array], directions: Sequence[jax.Array]
) -> jax.Array:
    total = jnp.zeros_like(value)
    for jacobian, t in zip(jacobians, directions, strict=True):
        t = t.astype(jacobian.dtype)
        total += jnp.tensordot(jacobian, t, t.ndim, precision=jax.lax.Precision.HIGHEST)
    return total
