"""Trees with their small leaves joined to one vector, for shorter programs.

Each operation on each leaf is a kernel that has to be compiled. The joined form has the same sums
and takes the same entry by entry operations as the tree.
"""

import itertools

import jax
import jax.numpy as jnp

from gradxform import tree

_SMALL = 2**15  # entries: to copy more takes longer than it saves


def joined(of: tree.PyTree) -> list[jax.Array]:
    """The leaves of a tree, those with few entries joined to one vector of each dtype.

    With several devices the leaves stay as they are, because they may be sharded.

    >>> [x.shape for x in joined({"b": jnp.ones(3), "w": jnp.ones((2, 2))})]
    [(7,)]
    """
    leaves = jax.tree.leaves(of)
    return [
        leaves[own[0]] if len(own) == 1 else jnp.concatenate([leaves[i].ravel() for i in own])
        for own in _groups(leaves)
    ]


def apart(parts: list[jax.Array], like: tree.PyTree) -> tree.PyTree:
    """The tree that was joined, which has the shapes of ``like``.

    >>> apart([jnp.arange(3.0)], {"a": jnp.ones(1), "b": jnp.ones(2)})["b"].tolist()
    [1.0, 2.0]
    """
    leaves, structure = jax.tree.flatten(like)
    found = {}
    for part, own in zip(parts, _groups(leaves), strict=True):
        ends = itertools.accumulate((leaves[i].size for i in own), initial=0)
        for i, end in zip(own, ends, strict=False):
            shape, size = leaves[i].shape, leaves[i].size
            found[i] = part[end : end + size].reshape(shape) if len(own) > 1 else part
    return jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])


def _groups(leaves: list[jax.Array]) -> list[list[int]]:
    """Which leaves are joined."""
    groups: dict[object, list[int]] = {}
    for i, leaf in enumerate(leaves):
        is_small = leaf.size < _SMALL and jax.device_count() == 1
        groups.setdefault(leaf.dtype if is_small else i, []).append(i)
    return list(groups.values())
