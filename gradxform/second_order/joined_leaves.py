"""Trees with their small leaves joined to one vector, for shorter programs.

Each sum over each leaf is a kernel that has to be compiled. The joined form has the same sums.
"""

import jax
import jax.numpy as jnp

from gradxform import tree

_SMALL = 2**15  # entries: to copy more takes longer than it saves


def joined(of: tree.PyTree) -> list[jax.Array]:
    """The leaves of a tree, those with few entries joined to one vector of each dtype.

    With several devices the leaves stay as they are, because they may be sharded.

    >>> sum(x.size for x in joined({"b": jnp.ones(3), "w": jnp.ones((2, 2))}))
    7
    """
    leaves = jax.tree.leaves(of)
    if jax.device_count() > 1:
        return leaves
    small: dict[jnp.dtype, list[jax.Array]] = {}
    for leaf in leaves:
        if leaf.size < _SMALL:
            small.setdefault(leaf.dtype, []).append(leaf)
    vectors = [jnp.concatenate([x.ravel() for x in own]) for own in small.values()]
    return vectors + [leaf for leaf in leaves if leaf.size >= _SMALL]
