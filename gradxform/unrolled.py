"""A loop of bounded length that can be differentiated in reverse.

Reverse mode goes back through the turns and needs what each of them computed. To save memory only
the states before √N blocks of √N turns are kept. Each block is computed again when its turn comes.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax

Carry = TypeVar("Carry")
Seen = TypeVar("Seen")


def alternate_at_most(
    turns: int,
    look: Callable[[Carry], tuple[Carry, Seen]],
    move: Callable[[Carry, Seen], Carry],
    goes_on: Callable[[Carry], jax.Array],
    carry: Carry,
) -> Carry:
    """Calls ``look`` and ``move`` in turns until one of them ends the loop.

    See :func:`gradxform.packed_loop.alternate`.

    Args:
      turns: an upper bound of the number of turns, up to which the loop ends by itself.
    """

    def turn(carry: Carry) -> Carry:
        carry, seen = look(carry)
        return jax.lax.cond(goes_on(carry), move, lambda carry, _: carry, carry, seen)

    def at_most(turns: int, body: Callable[[Carry], Carry], carry: Carry) -> Carry:
        def step(carry: Carry, _: None) -> tuple[Carry, None]:
            # nothing is computed after the end
            return jax.lax.cond(goes_on(carry), body, lambda carry: carry, carry), None

        return jax.lax.scan(step, carry, length=turns)[0]

    block = math.isqrt(turns - 1) + 1
    blocks = -(-turns // block)
    return at_most(blocks, jax.checkpoint(lambda carry: at_most(block, turn, carry)), carry)
