"""Several inner products at once."""

import jax
import jax.numpy as jnp

from gradxform import tree

_SMALL = 4096  # entries; a pass over so few costs less than its launch


def vdots(*pairs: tuple[tree.PyTree, tree.PyTree]) -> list[jax.Array]:
    """``tree.vdot`` of each pair, all of the same structure; in one pass where leaves are small.

    >>> x, y = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 4.0])
    >>> [float(s) for s in vdots((x, x), (x, y))]
    [5.0, 11.0]
    """
    leaves = zip(*(jax.tree.leaves(x) for pair in pairs for x in pair), strict=True)
    total = [jnp.zeros((), jnp.result_type(float))] * len(pairs)
    for leaf in leaves:
        x = [tree.promote(y) for y in leaf]
        terms = [a * b for a, b in zip(x[::2], x[1::2], strict=True)]
        if terms[0].size <= _SMALL and not tree.is_explicit(terms[0]):
            sums = jnp.sum(jnp.stack(terms), axis=range(1, terms[0].ndim + 1))
            sums = [sums[i] for i in range(len(terms))]
        else:
            sums = [jnp.sum(x) for x in terms]
        total = [a + b for a, b in zip(total, sums, strict=True)]
    return total
