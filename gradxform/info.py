"""The diagnostics that methods report in ``info``, with one vocabulary for all.

The fields of a state hold what the algorithm needs. What it reports is in a field ``info``, a
NamedTuple marked by :func:`diagnostics`. A loop that logs, counts or stops looks only for marked
tuples, so parameters and other fields may have any name.

Integers are totals over all updates; they survive when a search gives its method a new state.
Booleans and floating-point numbers describe the last update. These names have one meaning:

=======================  ==========================================================================
``evaluations``          evaluations of ``value_fn`` made inside ``update``
``curvature_products``   products with the curvature; a dense matrix of n columns counts n
``gradient_equivalents`` the cost of both in gradients of ``value_fn``, if a method knows it
``accepted``             points accepted
``rejected``             trial points, or updates, rejected
``non_finite``           updates that met a NaN or an infinity and stepped back from it
``skipped``              updates that were zero, or curvature pairs that were not used
``indefinite``           updates that saw a loss that is not convex in the outputs of the model
``fallbacks``            updates along the gradient instead of the method's direction
``value``                the objective at the accepted point, if the loop holds a trial point
``grad_norm``            the largest absolute gradient entry at the accepted point
``expected``             the decrease of the objective that the method expects of its step
``relative_step``        the length of its full step, which no radius cuts, over the parameters'
``stalled``              whether the method can make no further progress on a fixed objective
=======================  ==========================================================================

A method that reports ``non_finite`` recovers from NaN and infinity. :func:`gradxform.minimize`
stops any other method at the first one.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from gradxform.tree import PyTree

T = TypeVar("T", bound=type)

# Optax's own line searches report too; they count within the last update.
_MARKED: set[type] = {
    state.__annotations__["info"]
    for state in (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
}


def diagnostics(cls: T) -> T:
    """Marks a NamedTuple class as the diagnostics of a method.

    >>> from typing import NamedTuple
    >>> import jax.numpy as jnp
    >>> @diagnostics
    ... class MyInfo(NamedTuple):
    ...     evaluations: jax.Array
    >>> int(total({"method": MyInfo(jnp.asarray(3)), "evaluations": jnp.asarray(5)}, "evaluations"))
    3
    """
    _MARKED.add(cls)
    return cls


def _is_marked(node: Any) -> bool:
    return type(node) in _MARKED


def infos(state: PyTree) -> list[Any]:
    """All marked tuples in a state, at any depth."""
    return [x for x in jax.tree.leaves(state, is_leaf=_is_marked) if _is_marked(x)]


def reported(state: PyTree, name: str) -> list[jax.Array]:
    """The values of the field ``name`` in all marked tuples of a state."""
    return [getattr(info, name) for info in infos(state) if hasattr(info, name)]


def total(state: PyTree, name: str) -> jax.Array:
    """The sum of the field ``name`` over all marked tuples; 0 if no tuple has it."""
    counts = (jnp.sum(jnp.asarray(x, jnp.int32), dtype=jnp.int32) for x in reported(state, name))
    return sum(counts, start=jnp.zeros((), jnp.int32))


def carry_totals(fresh: PyTree, old: PyTree) -> PyTree:
    """``fresh``, a new state of a method, with the totals from ``old``."""

    def carried(new: Any, old: Any) -> Any:
        if not _is_marked(new):
            return new
        keep = lambda x, y: y if jnp.issubdtype(jnp.result_type(x), jnp.integer) else x
        return jax.tree.map(keep, new, old)

    return jax.tree.map(carried, fresh, old, is_leaf=_is_marked)
