"""The state of a sweep in a checkpoint, member by member, so that other devices can resume it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gradxform.lab.experiment.grid import Member
from gradxform.lab.tasks.task import Examples
from gradxform.lab.training.blocks import Block, first_blocks
from gradxform.lab.training.checkpoints import Snapshot, fit
from gradxform.lab.training.epoch import TrainState
from gradxform.lab.training.outcomes import Row
from gradxform.lab.training.processes import put_all, read
from gradxform.lab.training.programs import Group, Programs


def snapshot_of(
    number: int,
    record: Row,
    costs: np.ndarray,
    program: Programs,
    blocks: Sequence[Block],
) -> Snapshot:
    """The state of a sweep; without blocks the next program is about to start.

    The arrays are stored member by member, so the sweep can resume on other devices. Every process
    must call this function.
    """
    if not blocks:
        record = record | {"group": record["group"] + 1, "epoch": 0, "members": []}
        return Snapshot(number, record, (costs.astype(np.float32), []))
    training = [block.members >= 0 for block in blocks]

    def of_members(*parts: jax.Array) -> np.ndarray:
        read_parts = (read(x)[who] for x, who in zip(parts, training, strict=True))
        return np.concatenate(list(read_parts))

    numbers = np.concatenate([block.members for block in blocks])
    record = record | {"members": numbers[numbers >= 0].tolist()}
    each = jax.tree.map(of_members, *(_of_members(program, block) for block in blocks))
    return Snapshot(number, record, (costs.astype(np.float32), [each, _of_all(program, blocks[0])]))


def restored(
    snapshot: Snapshot,
    groups: Sequence[Group],
    programs: Sequence[Programs],
    members: Sequence[Member],
    train: Examples,
    mesh: Mesh,
    costs: np.ndarray,
    block_size: int | None,
) -> tuple[np.ndarray, int, list[Block]]:
    """The costs, the number of lanes and the blocks in a snapshot."""
    record, kept = snapshot.record, snapshot.record["members"]
    if not kept:
        found, _ = fit(snapshot.arrays, (costs.astype(np.float32), []))
        return np.array(found, np.float64), 0, []
    program, group = programs[record["group"]], groups[record["group"]]
    lanes, blocks = first_blocks(program, group, members, train, mesh, block_size, kept)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(kept), *x.shape[1:]), x.dtype),
        _of_members(program, blocks[0]),
    )
    like = [shapes, _of_all(program, blocks[0])]
    found, (each, common) = fit(snapshot.arrays, (costs.astype(np.float32), like))
    restored = []
    for i, block in enumerate(blocks):
        at = np.where(block.members >= 0, i * lanes + np.arange(lanes), 0)
        own = put_all(jax.tree.map(lambda x, at=at: x[at], each), mesh, PartitionSpec("member"))
        epoch, key = put_all(common, mesh)  # copies for each block, because they are donated
        state = TrainState(own[1], own[2], epoch, own[3] if program.has_own_key else key)
        restored.append(block._replace(alive=own[0] & block.alive, state=state))
    return np.array(found, np.float64), lanes, restored


def _of_members(program: Programs, block: Block) -> tuple[Any, ...]:
    """The arrays of a block that differ between members."""
    state = block.state
    return block.alive, state.params, state.opt_state, state.key if program.has_own_key else ()


def _of_all(program: Programs, block: Block) -> tuple[Any, ...]:
    """The arrays that all members share."""
    return block.state.epoch, () if program.has_own_key else block.state.key
