"""A loop of two parts that packs its scalars into one or two vectors.

The time of a small problem depends on the number of kernels, not on the arithmetic. XLA takes a
kernel and a copy for each scalar that a loop carries from turn to turn. A vector of the scalars,
written as a chain of selects over its positions, takes one kernel together with the arithmetic
before it. Branches take and return the same vectors.

In a batch the scalars are vectors already, so ``jax.vmap`` uses the plain loop. Forward-mode
differentiation does too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from gradxform.kernels import unless_batched, vector

Carry = TypeVar("Carry")
Seen = TypeVar("Seen")
_Leaves: TypeAlias = list[jax.Array]
_Packed: TypeAlias = tuple[_Leaves, _Leaves]  # the leaves that are not scalars, and the vectors


def alternate(
    look: Callable[[Carry], tuple[Carry, Seen]],
    move: Callable[[Carry, Seen], Carry],
    goes_on: Callable[[Carry], jax.Array],
    carry: Carry,
    *,
    branch: bool,
) -> Carry:
    """Calls ``look`` and ``move`` in turns until one of them ends the loop.

    Args:
      look: (carry) → (new carry, anything else).
      move: (carry, anything else) → new carry.
      goes_on: (carry) → whether the loop continues, after ``look`` and after ``move``.
      carry: a pytree of arrays.
      branch: True skips ``move`` if ``look`` ends the loop, which takes a branch in every turn.
        With False the last ``move`` is made too; it must not restart the loop.
    """
    leaves, structure = jax.tree.flatten(carry)
    count, seen = len(leaves), []

    def flat_look(*leaves: jax.Array) -> _Leaves:
        after, found = look(jax.tree.unflatten(structure, leaves))
        seen.append(jax.tree.structure(found))
        return [*jax.tree.leaves(after), *jax.tree.leaves(found)]

    def flat_move(*leaves: jax.Array) -> _Leaves:
        found = jax.tree.unflatten(seen[0], leaves[count:])
        return jax.tree.leaves(move(jax.tree.unflatten(structure, leaves[:count]), found))

    def flat_goes_on(*leaves: jax.Array) -> jax.Array:
        return goes_on(jax.tree.unflatten(structure, leaves))

    looked = jax.make_jaxpr(flat_look)(*leaves)
    moved = jax.make_jaxpr(flat_move)(*looked.out_avals)
    parts = {
        "look": looked.jaxpr,
        "move": moved.jaxpr,
        "goes_on": jax.make_jaxpr(flat_goes_on)(*leaves),
        "constants": (len(looked.consts), len(moved.consts)),
    }
    arguments = (*looked.consts, *moved.consts, *leaves)
    if looked.effects or moved.effects:  # effects such as jax.debug.print's must happen once
        ended = _plain(*arguments, **parts, branch=True)
    else:
        loop = functools.partial(_packed, **parts, branch=branch)
        lanes = functools.partial(_plain, **parts, branch=branch)
        ended = unless_batched(loop, lanes, *arguments, out_avals=moved.out_avals)
    return jax.tree.unflatten(structure, ended)


class _Word(NamedTuple):
    """How a scalar is written to a vector of another dtype, and read back.

    64-bit numbers have a vector of their own, because TPUs cannot reinterpret their bits.
    """

    kind: str
    write: Callable[[jax.Array], jax.Array]
    read: Callable[[jax.Array], jax.Array]


_bits = jax.lax.bitcast_convert_type
_WORDS = {
    np.dtype("float64"): _Word("float64", lambda x: x, lambda x: x),
    np.dtype("float32"): _Word(
        "int32", lambda x: _bits(x, jnp.int32), lambda x: _bits(x, jnp.float32)
    ),
    np.dtype("int32"): _Word("int32", lambda x: x, lambda x: x),
    np.dtype("bool"): _Word("int32", lambda x: x.astype(jnp.int32), lambda x: x != 0),
}


def _is_packed(x: jax.Array) -> bool:
    return x.ndim == 0 and x.dtype in _WORDS


class _Parts(NamedTuple):
    """The parts of the loop as functions of lists of leaves."""

    look: Callable[[_Leaves], tuple[_Leaves, _Leaves]]
    move: Callable[[_Leaves, _Leaves], _Leaves]
    goes_on: Callable[[_Leaves], jax.Array]
    carry: _Leaves


def _parts(
    arguments: Sequence[jax.Array],
    look: Jaxpr,
    move: Jaxpr,
    goes_on: ClosedJaxpr,
    constants: tuple[int, int],
) -> _Parts:
    first, second = constants[0], sum(constants)
    seen, moving = arguments[:first], arguments[first:second]
    count = len(goes_on.in_avals)

    def arrays(leaves: Sequence[Any]) -> _Leaves:
        # constants of the program come back as Python numbers
        pairs = zip(leaves[:count], goes_on.in_avals, strict=True)
        return [x if isinstance(x, jax.Array) else jnp.asarray(x, old.dtype) for x, old in pairs]

    def looked(leaves: _Leaves) -> tuple[_Leaves, _Leaves]:
        after = jaxpr_as_fun(ClosedJaxpr(look, seen))(*leaves)
        return arrays(after), list(after[count:])

    return _Parts(
        looked,
        lambda leaves, found: arrays(jaxpr_as_fun(ClosedJaxpr(move, moving))(*leaves, *found)),
        lambda leaves: jaxpr_as_fun(goes_on)(*leaves)[0],
        arrays(arguments[second:]),
    )


def _plain(*arguments: jax.Array, branch: bool, **parameters: Any) -> _Leaves:
    """The loop without packing, for batches."""
    parts = _parts(arguments, **parameters)
    return _loop(parts, lambda leaves: leaves, lambda leaves: leaves, branch)


def _packed(*arguments: jax.Array, branch: bool, **parameters: Any) -> _Leaves:
    parts = _parts(arguments, **parameters)
    kinds: dict[str, list[int]] = {}  # where the scalars of each vector are in the carry
    for i, x in enumerate(parts.carry):
        if _is_packed(x):
            kinds.setdefault(_WORDS[x.dtype].kind, []).append(i)

    def written(x: jax.Array) -> jax.Array:
        return _WORDS[x.dtype].write(x)

    def pack(leaves: _Leaves) -> _Packed:
        vectors = [vector([written(leaves[i]) for i in group]) for group in kinds.values()]
        return [x for x in leaves if not _is_packed(x)], vectors

    def unpack(packed: _Packed) -> _Leaves:
        alone, vectors = packed
        rest = iter(alone)
        words = {
            i: words[k]
            for group, words in zip(kinds.values(), vectors, strict=True)
            for k, i in enumerate(group)
        }
        return [
            _WORDS[x.dtype].read(words[i]) if i in words else next(rest)
            for i, x in enumerate(parts.carry)
        ]

    return _loop(parts, pack, unpack, branch)


def _loop(
    parts: _Parts, pack: Callable[[_Leaves], Any], unpack: Callable[[Any], _Leaves], branch: bool
) -> _Leaves:
    def body(packed: Any) -> Any:
        leaves, found = parts.look(unpack(packed))
        if not branch:
            return pack(parts.move(leaves, found))
        return jax.lax.cond(
            parts.goes_on(leaves),
            lambda packed, found: pack(parts.move(unpack(packed), found)),
            lambda packed, _: packed,
            pack(leaves),
            found,
        )

    ended = jax.lax.while_loop(
        lambda packed: parts.goes_on(unpack(packed)), body, pack(parts.carry)
    )
    return unpack(ended)
