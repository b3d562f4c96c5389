"""Blocks of members: what a sweep trains together, in one call of one program on all devices.

A block holds members of one group, which share their programs.
"""

import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradxform.lab.experiment.grid import Member
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.tasks.task import Examples
from gradxform.lab.training.epoch import TrainState, in_order
from gradxform.lab.training.outcomes import Row
from gradxform.lab.training.processes import least_of, put, read
from gradxform.lab.training.programs import Group, Programs
from gradxform.tree import PyTree

# Members per device in one call. On a CPU more are no faster, because one net already fills the
# vector units. An accelerator is fastest with as many as fit.
_BLOCK = {"cpu": 32}
_LARGEST_BLOCK = 1024
_MEMORY = 0.8  # fraction of the memory that a sweep may use


class Block(NamedTuple):
    """Members that one call trains together."""

    members: np.ndarray  # numbers of the members; −1 is filling
    values: jax.Array  # (block, hyperparameters)
    alive: jax.Array  # (block,)
    state: TrainState


# -- memory


def check_memory(program: Programs, group: Group, train: Examples, mesh: Mesh) -> None:
    """Raises an error if the members do not fit into memory or the optimiser fails."""
    lanes = mesh.devices.size
    values = jax.ShapeDtypeStruct((lanes, len(group.paths)), jnp.float32)
    seeds = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    state = jax.eval_shape(program.start, values, seeds)
    alive = jax.ShapeDtypeStruct((lanes,), jnp.bool_)
    jax.eval_shape(
        program.epoch, values, alive, state, train
    )  # finds errors of the update before any run
    each = _bytes(state) / lanes
    share, limit = len(group.members) / lanes, _memory(mesh)
    if share * each > limit:
        raise ValueError(
            f"sweep: {len(group.members)} members of {each / 2**20:.3g} MiB each do not fit into "
            f"{limit * lanes / 2**30:.3g} GiB of memory: sweep fewer at once, or a smaller model"
        )


def _memory(mesh: Mesh) -> float:
    """Bytes that a device may use: the minimum over processes, so that all decide the same."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return least_of(_MEMORY * stats["bytes_limit"])
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return least_of(_MEMORY * pages / len(mesh.local_devices))


def _bytes(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def first_blocks(
    program: Programs,
    group: Group,
    members: Sequence[Member],
    train: Examples,
    mesh: Mesh,
    block_size: int | None,
    kept: Sequence[int] | None = None,
) -> tuple[int, list[Block]]:
    """The number of lanes in a block, and the blocks of a group before the first epoch.

    ``kept`` limits the blocks to some of the members.
    """
    devices = mesh.devices.size
    usual = _BLOCK.get(mesh.devices.flat[0].platform, _LARGEST_BLOCK) * devices
    numbers = np.asarray(group.members if kept is None else kept)
    lanes = _lanes(len(numbers), block_size or usual, devices)
    while True:
        blocks = [
            _start(program, group, members, numbers[i : i + lanes], lanes, mesh)
            for i in range(0, len(numbers), lanes)
        ]
        first = blocks[0]
        used = program.epoch.lower(first.values, first.alive, first.state, train).compile()
        program.compiled[lanes] = used
        need = _program_bytes(used) + (len(blocks) - 1) * _bytes(first.state) / devices
        if need <= _memory(mesh):
            return lanes, blocks
        if block_size is not None or lanes == devices:
            raise ConfigError(
                "sweep",
                [
                    f"sweep.block_size: {lanes} members at once take {need / 2**30:.3g} GiB on "
                    f"each device, where {_memory(mesh) / 2**30:.3g} GiB can be used: take fewer, "
                    "or a smaller batch or model"
                ],
            )
        lanes = _lanes(lanes // 2, lanes // 2, devices)


def _lanes(members: int, wanted: int, devices: int) -> int:
    """Lanes in a block: a multiple of the number of devices, with little filling."""
    return -(-min(members, max(wanted, 1)) // devices) * devices


def _program_bytes(program: Any) -> float:
    """Bytes of memory on each device while a compiled program runs."""
    used = program.memory_analysis()
    if used is None:
        return 0.0
    arguments = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return arguments + used.temp_size_in_bytes


# -- blocks


def _start(
    program: Programs,
    group: Group,
    members: Sequence[Member],
    numbers: np.ndarray,
    lanes: int,
    mesh: Mesh,
) -> Block:
    """A block before its first epoch."""
    filled = _fill(numbers, lanes)
    in_block = [members[i] for i in np.where(filled >= 0, filled, numbers[0])]
    values = [[member.values[path] for path in group.paths] for member in in_block]
    spec = PartitionSpec("member")
    values = put(np.asarray(values, np.float32).reshape(lanes, len(group.paths)), mesh, spec)
    seeds = put(np.asarray([member.seed for member in in_block], np.int32), mesh, spec)
    return Block(filled, values, put(filled >= 0, mesh, spec), program.start(values, seeds))


def _fill(numbers: np.ndarray, lanes: int) -> np.ndarray:
    return np.pad(numbers, (0, lanes - len(numbers)), constant_values=-1)


def compile_epoch(program: Programs, blocks: Sequence[Block], train: Examples) -> float:
    """Compiles missing programs and returns the seconds it took."""
    started = time.perf_counter()
    for block in blocks:
        if len(block.members) not in program.compiled:
            lowered = program.epoch.lower(block.values, block.alive, block.state, train)
            program.compiled[len(block.members)] = lowered.compile()
    return time.perf_counter() - started


def advance(program: Programs, block: Block, train: Examples) -> tuple[Block, np.ndarray]:
    """The block after one more epoch, and the cost of each of its members."""
    run = program.compiled[len(block.members)]
    alive, state, cost = run(block.values, block.alive, block.state, train)
    block = block._replace(alive=alive, state=state)
    return block, read(cost)[block.members >= 0]


def metrics_of(program: Programs, block: Block, parts: Mapping[str, Examples]) -> dict[int, Row]:
    """Each member's metrics at the parameters to evaluate."""
    every = program.metrics(block.state, parts)
    means = {
        f"{part}_{name}": read(every[part][name])
        for part in parts
        for name in in_order(every[part])
    }
    return {
        int(number): {name: float(values[lane]) for name, values in means.items()}
        for lane, number in enumerate(block.members)
        if number >= 0
    }


def regroup(
    program: Programs, blocks: Sequence[Block], kept: np.ndarray, lanes: int, mesh: Mesh
) -> list[Block]:
    """The members that continue, in as few blocks as possible."""
    order = np.concatenate([block.members for block in blocks])
    lane_of = {number: lane for lane, number in enumerate(order)}
    lanes = _lanes(len(kept), lanes, mesh.devices.size)
    sharding = NamedSharding(mesh, PartitionSpec("member"))

    @functools.partial(jax.jit, out_shardings=sharding)
    def picked(parts: Sequence[PyTree], at: np.ndarray) -> PyTree:
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[at], *parts)

    regrouped = []
    for i in range(0, len(kept), lanes):
        numbers = _fill(kept[i : i + lanes], lanes)
        at = np.asarray([lane_of[n] for n in np.where(numbers >= 0, numbers, kept[0])])
        states = [block.state for block in blocks]
        alive = picked([block.alive for block in blocks], at) & put(
            numbers >= 0, mesh, PartitionSpec("member")
        )
        params, opt_state = picked([state[:2] for state in states], at)
        # copies for each block, because they are donated
        epoch, key = jnp.copy(states[0].epoch), jnp.copy(states[0].key)
        key = picked([s.key for s in states], at) if program.has_own_key else key
        values = picked([block.values for block in blocks], at)
        state = TrainState(params, opt_state, epoch, key)
        regrouped.append(Block(numbers, values, alive, state))
    return regrouped
