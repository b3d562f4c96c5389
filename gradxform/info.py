"""What methods report in ``info``: one vocabulary, found by type.

A state keeps what an algorithm needs in its own fields and what it reports in a field ``info``, a
NamedTuple marked by :func:`diagnostics`. A loop that logs, counts or stops looks for marked tuples
alone, so a parameter or a field of a state may have any name.

Integers are totals over all updates, and survive when a search begins again with a new state.
Booleans and floating-point numbers describe the last update. These names mean the same everywhere:

=======================  ==========================================================================
``evaluations``          evaluations of ``value_fn`` made inside ``update``
``curvature_products``   products with the curvature; a dense matrix of n columns counts n
``gradient_equivalents`` the cost of both in gradients of ``value_fn``, where a method knows it
``accepted``             points accepted
``rejected``             trial points, or updates, rejected
``non_finite``           updates that met a NaN or an infinity and stepped back from it
``skipped``              updates that moved nothing, or curvature pairs left out
``fallbacks``            updates that took the gradient in place of the method's direction
``value``                the objective at the accepted point, where the loop holds a trial point
``grad_norm``            the largest absolute gradient entry at the accepted point
``stalled``              whether the method can make no further progress on a fixed objective
=======================  ==========================================================================

A method that reports ``non_finite`` survives NaN and infinity; :func:`gradxform.minimize` stops any
other at the first one.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from gradxform.tree import PyTree

T = TypeVar("T", bound=type)

# Optax's own line searches report as well; their counts are of the last update.
_MARKED: set[type] = {
    state.__annotations__["info"]
    for state in (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)
}


def diagnostics(cls: T) -> T:
    """Marks a NamedTuple class as what a method reports.

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
    """What the marked tuples in a state report by this name."""
    return [getattr(info, name) for info in infos(state) if hasattr(info, name)]


def total(state: PyTree, name: str) -> jax.Array:
    """The sum of what is reported by this name; 0 where nothing is."""
    counts = (jnp.sum(jnp.asarray(x, jnp.int32), dtype=jnp.int32) for x in reported(state, name))
    return sum(counts, start=jnp.zeros((), jnp.int32))


def carry_totals(fresh: PyTree, old: PyTree) -> PyTree:
    """``fresh``, the first state of a method, with the totals that ``old`` has reported."""

    def carried(new: Any, old: Any) -> Any:
        if not _is_marked(new):
            return new
        keep = lambda x, y: y if jnp.issubdtype(jnp.result_type(x), jnp.integer) else x
        return jax.tree.map(keep, new, old)

    return jax.tree.map(carried, fresh, old, is_leaf=_is_marked)
