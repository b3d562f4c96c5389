"""The inverse Hessian that a quasi-Newton method has learnt, as an operator on pytrees."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import default_registry

from gradxform import leaves, tree
from gradxform.complex_leaves import to_complex, to_real
from gradxform.line_search import LineSearchState


@functools.singledispatch
def inverse_product(state: optax.OptState, vector: tree.PyTree, /) -> tree.PyTree | None:
    """H v with the estimate H of the inverse Hessian in ``state``, or None if it has no estimate.

    ``vector`` is like the parameters, real and in at least float32, and so is the result. Leaves
    that a mask hides from the method become ``optax.MaskedNode()``. The state may be nested like
    that of :func:`gradxform.eval_params`.

    To support your own state, write ``@inverse_product.register`` above a function
    ``(state: MyState, vector) -> product``.
    """
    children = default_registry.flatten_one_level(state)
    products = [inverse_product(child, vector) for child in (children[0] if children else ())]
    found = [product for product in products if product is not None]
    return functools.reduce(_joined, found) if found else None


@inverse_product.register
def _(state: LineSearchState, vector: tree.PyTree) -> tree.PyTree | None:
    part, back = in_layout_of("with_line_search", state.direction, vector)
    product = inverse_product(state.inner_state, part)
    return None if product is None else back(product)


def inverse_hessian(state: optax.OptState, params: tree.PyTree, vector: tree.PyTree) -> tree.PyTree:
    """:func:`inverse_product`, checked, with 0 for the leaves that the method does not see."""
    leaves.check_floating(vector, "inverse_hessian: vector")
    if (difference := leaves.difference(params, vector, dtypes=False)) is not None:
        raise ValueError(
            f"inverse_hessian(vector=…): vector must be like the parameters: {difference}; pass a "
            "pytree with the structure and shapes of solution.params"
        )
    wide = jax.tree.map(
        lambda p, v: jnp.asarray(v, tree.wide(jnp.result_type(p))),
        to_real(params),
        to_real(vector),
    )
    product = inverse_product(state, wide)
    if product is None:
        raise ValueError(
            "inverse_hessian: the method of this solution learns no inverse Hessian; those that do "
            "are bfgs, lbfgs, scale_by_bfgs and scale_by_lbfgs. gx.covariance(fn, solution.params) "
            "computes the exact inverse"
        )
    filled = jax.tree.map(
        lambda v, h: jnp.zeros_like(v) if _is_hole(h) else h, wide, product, is_leaf=_is_hole
    )
    return to_complex(tree.cast_like(filled, wide))


def in_layout_of(
    method: str, like: tree.PyTree, vector: tree.PyTree
) -> tuple[tree.PyTree, Callable[[tree.PyTree], tree.PyTree]]:
    """``vector`` in the layout in which a method holds its vectors, and the way back.

    ``like`` is such a vector of the method: one array of all parameters, or a tree like
    ``vector``, in which a mask may have left holes.

    Raises:
      ValueError: ``like`` is one array of a part of the parameters, so the part is not known.
    """
    flat, unravel = tree.ravel(vector)
    shape = getattr(like, "shape", None)
    if shape is not None and shape != getattr(vector, "shape", None):
        if shape != flat.shape:
            raise ValueError(
                f"inverse_hessian: {method} got a part of the parameters in one vector, and its "
                f"state does not say which part: build {method} with ravel=False"
            )
        return flat, lambda product: unravel(product.astype(flat.dtype))
    part = jax.tree.map(lambda x, v: x if _is_hole(x) else v, like, vector, is_leaf=_is_hole)

    def back(product: tree.PyTree) -> tree.PyTree:
        return jax.tree.map(
            lambda x, v: jax.tree.map(lambda _: optax.MaskedNode(), v) if _is_hole(x) else x,
            product,
            vector,
            is_leaf=_is_hole,
        )

    return part, back


def _joined(one: tree.PyTree, other: tree.PyTree) -> tree.PyTree:
    """The products of two methods that see different leaves."""

    def join(x: Any, y: Any) -> Any:
        if not (_is_hole(x) or _is_hole(y)):
            raise ValueError(
                "inverse_hessian: two methods of the chain learn an inverse Hessian of the same "
                "parameters: keep one of them"
            )
        return y if _is_hole(x) else x

    return jax.tree.map(join, one, other, is_leaf=_is_hole)


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
