"""Curvatures: functions that turn an objective and a point into a symmetric linear map."""

import functools
from collections.abc import Callable
from typing import Annotated, TypeAlias

import jax

from gradxform import tree
from gradxform.complex_leaves import of_real, to_complex, to_real
from gradxform.hyperparameters import checked
from gradxform.objective import Composed, ValueFn
from gradxform.sharding import sharded_like, varying_like

Product: TypeAlias = Callable[[tree.PyTree], tree.PyTree]
Curvature: TypeAlias = Annotated[
    Callable[[ValueFn, tree.PyTree], Product],
    "a curvature, for instance gx.hessian() or gx.gauss_newton()",
]


@checked
def hessian() -> Curvature:
    """The Hessian of the objective J: v ↦ ∇²J(θ) v.

    ``gx.hessian()(value_fn, params)`` linearises the gradient once. In a multilayer net each
    product then costs as much as 1 to 2 gradients: 1 for the layer that reads the data, 2 for the
    layers after it, 1.4 in total for a 784-500-300-10 net. Everything is computed in at least
    float32, whatever the dtype of the parameters.

    Returns:
      The curvature: a function of ``(value_fn, params)`` that returns a linear map. The map takes
      and returns pytrees like ``params`` in at least float32. ``value_fn`` must support
      forward-mode differentiation, so it cannot use ``jax.custom_vjp``. A complex parameter counts
      as two real ones.

    References:
      Lecture 7, "Newton's Method". Pearlmutter, "Fast exact multiplication by the Hessian", Neural
      Computation 6:147 (1994).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> product = gx.hessian()(lambda x: x[0] ** 2 * x[1], jnp.asarray([1.0, 3.0]))
    >>> product(jnp.asarray([1.0, 0.0]))
    Array([6., 2.], dtype=float32)
    """

    def linearise(value_fn: ValueFn, params: tree.PyTree) -> Product:
        return jax.linearize(jax.grad(value_fn), params)[1]

    return functools.partial(_curvature, linearise)


@checked
def gauss_newton() -> Curvature:
    """The generalised Gauss–Newton matrix of a loss L of a model f: v ↦ Jᵀ H_L J v.

    The objective is L(f(θ)). J is the Jacobian of f at θ, and H_L is the Hessian of L at the
    outputs. The matrix is positive semi-definite if L is convex in the outputs, however curved f
    is. It equals the Hessian if f is linear, or if the gradient of L is zero.

    It is the Fisher information matrix E[∇log p ∇log pᵀ], with labels drawn from the model, if the
    loss is the negative log likelihood of an exponential family in its natural parameters. That
    holds for half the squared error (unit variance) and for the cross-entropy of softmax or sigmoid
    logits. It is not the "empirical Fisher", which uses the labels in the data.

    Model and loss are linearised once. In a multilayer net each product then costs as much as 1 to
    4/3 gradients, 1.1 for a 784-500-300-10 net. Everything is computed in at least float32,
    whatever the dtype of the parameters.

    Returns:
      The curvature: a function of ``(value_fn, params)`` that returns a linear map. The map takes
      and returns pytrees like ``params`` in at least float32. ``value_fn`` must come from
      :func:`gradxform.compose`.

    Raises:
      ValueError: when the curvature is called, if ``value_fn`` does not come from
        :func:`gradxform.compose`.

    References:
      Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
      Neural Computation 14:1723 (2002). Martens, "New insights and perspectives on the natural
      gradient method", JMLR 21:146 (2020).

    >>> import jax.numpy as jnp, gradxform as gx
    >>> value_fn = gx.compose(lambda y: jnp.sum(y**2), lambda x: x**2)  # the Hessian is 12 x²
    >>> gx.gauss_newton()(value_fn, jnp.asarray([1.0, 2.0]))(jnp.ones(2))
    Array([ 8., 32.], dtype=float32)
    """

    return gauss_newton_of("gauss_newton")


def gauss_newton_of(method: str) -> Curvature:
    """:func:`gauss_newton`, with an error that names ``method``."""

    def linearise(value_fn: ValueFn, params: tree.PyTree) -> Product:
        if not isinstance(value_fn, Composed):
            raise ValueError(
                f"{method} needs to know which part of value_fn is the loss and which is the "
                "model, to compute the Gauss-Newton matrix: pass value_fn=gx.compose(loss, model), "
                "where loss(model(params)) is the value, or take curvature=gx.hessian()"
            )
        loss, model = value_fn.parts()
        outputs, push = jax.linearize(lambda p: jax.tree.map(tree.promote, model(p)), params)
        _, bend = jax.linearize(jax.grad(loss), outputs)
        pull = jax.linear_transpose(push, params)
        return lambda v: pull(bend(push(v)))[0]

    return functools.partial(_curvature, linearise)


def _curvature(linearise: Curvature, value_fn: ValueFn, params: tree.PyTree) -> Product:
    """The product in at least float32, chunk by chunk if ``value_fn`` recomputes its chunks."""
    if any(map(tree.is_complex, jax.tree.leaves(params))):
        of_parts = _curvature(linearise, of_real(value_fn), to_real(params))
        return lambda v: to_complex(of_parts(to_real(v)))
    params = jax.tree.map(tree.promote, params)
    if isinstance(value_fn, Composed) and value_fn.chunks > 1 and value_fn.recompute:
        product = lambda v: value_fn.mean_over_chunks(lambda chunk: linearise(chunk, params)(v))
    else:
        product = linearise(value_fn, params)
    # otherwise the compiler may replicate CG's vectors on every device to communicate less
    return lambda v: sharded_like(product(varying_like(v, params)), params)
