"""Curvature as a value: what turns a function and a point into a symmetric linear map."""

import functools
from collections.abc import Callable
from typing import Annotated, TypeAlias

import jax

from gradxform import tree
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
    r"""The Hessian, :math:`v \mapsto \nabla^2 J(\theta)\, v`.

    Calling the result with a function and parameters linearises the gradient there, once. For a
    multilayer net every product after that costs 1 to 2 gradients: 1 for the layer that reads the
    data, 2 for those behind it, 1.4 for 784-500-300-10. Functions and products are computed in at
    least float32, whatever the dtype of the parameters.

    Returns:
      The curvature: of ``(value_fn, params)``, a map from and to pytrees like ``params`` in at
      least float32. ``value_fn`` must allow forward-mode differentiation, so no
      ``jax.custom_vjp``.

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
    r"""The generalised Gauss–Newton matrix, :math:`v \mapsto J^T H_L J v`.

    Of :math:`L(f(\theta))`, a loss L of a model f: J is the Jacobian of f at θ and :math:`H_L` the
    Hessian of L at its outputs. Positive semi-definite whenever L is convex in the outputs, however
    curved f is. It is the Hessian where f is linear, or where the loss has no slope left.

    It is the Fisher information matrix :math:`E[\nabla \log p\, \nabla \log p^T]`, the expectation
    over labels drawn from the model, whenever the loss is the negative log likelihood of an
    exponential family in its natural parameters: squared error (half of it, of unit variance),
    cross-entropy of logits by softmax or sigmoid. It is not the "empirical Fisher" of the gradients
    of the labels in the data.

    Model and loss are linearised once. For a multilayer net every product after that costs 1 to 4/3
    gradients, 1.1 for 784-500-300-10. They are computed in at least float32, whatever the dtype of
    the parameters.

    Returns:
      The curvature: of ``(value_fn, params)``, a map from and to pytrees like ``params`` in at
      least float32. ``value_fn`` must come from :func:`gradxform.compose`.

    Raises:
      ValueError: when called, if ``value_fn`` does not come from :func:`gradxform.compose`.

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
    """:func:`gauss_newton` as a part of ``method``, which its error names."""

    def linearise(value_fn: ValueFn, params: tree.PyTree) -> Product:
        if not isinstance(value_fn, Composed):
            raise ValueError(
                f"{method} needs to know which part of value_fn is the loss and which is the "
                "model, to make the Gauss-Newton matrix: give value_fn=gx.compose(loss, model), "
                "where loss(model(params)) is the value, or take curvature=gx.hessian()"
            )
        loss, model = value_fn.parts()
        outputs, push = jax.linearize(lambda p: jax.tree.map(tree.promote, model(p)), params)
        _, bend = jax.linearize(jax.grad(loss), outputs)
        pull = jax.linear_transpose(push, params)
        return lambda v: pull(bend(push(v)))[0]

    return functools.partial(_curvature, linearise)


def _curvature(linearise: Curvature, value_fn: ValueFn, params: tree.PyTree) -> Product:
    """The product in at least float32, chunk by chunk where ``value_fn`` recomputes them."""
    params = jax.tree.map(tree.promote, params)
    if isinstance(value_fn, Composed) and value_fn.chunks > 1 and value_fn.recompute:
        product = lambda v: value_fn.mean_over_chunks(lambda chunk: linearise(chunk, params)(v))
    else:
        product = linearise(value_fn, params)
    # left to itself the compiler may keep CG's vectors whole on every device, to send less
    return lambda v: sharded_like(product(varying_like(v, params)), params)
