"""Blocks of members: what a sweep trains together, in one call of one program on all devices.

Members of an optimiser that differ only in traced numbers form a group and share its compiled
programs. The members that one call trains together form a block.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.lab.experiment import catalogue, methods
from gradxform.lab.experiment.grid import Member, Table, substitute
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.tasks.task import Examples, Task
from gradxform.lab.training.checkpoints import Snapshot, fit
from gradxform.lab.training.epoch import METRICS, TrainState, evaluate, init_state, make_epoch
from gradxform.lab.training.processes import least_of, put, put_all, read
from gradxform.lab.training.race import Settings
from gradxform.tree import PyTree

Vary = Literal["initialisation", "order", "both"]
Row = dict[str, Any]

# Members per device in one call. On a CPU more are no faster, because one net already fills the
# vector units. An accelerator is fastest with as many as fit.
_BLOCK = {"cpu": 32}
_LARGEST_BLOCK = 1024
_MEMORY = 0.8  # fraction of the memory that a sweep may use


class Group(NamedTuple):
    """Members that share a program, because they differ only in traced numbers."""

    label: str
    table: Table  # table of the optimiser, with the numbers that are not traced
    paths: tuple[str, ...]  # paths of the traced numbers
    whole: frozenset[str]  # paths whose numbers are integers in every member
    members: tuple[int, ...]

    def built(self, values: jax.Array) -> Any:
        """The optimiser with these numbers, which may be traced."""
        traced = {
            path: value.astype(jnp.int32) if path in self.whole else value
            for path, value in zip(self.paths, values, strict=True)
        }
        return methods.build(substitute(self.table, traced), f"optimizers.{self.label}")


class Block(NamedTuple):
    """Members that one call trains together."""

    members: np.ndarray  # numbers of the members; −1 is filling
    values: jax.Array  # (block, hyperparameters)
    alive: jax.Array  # (block,)
    state: TrainState


def groups_of(tables: Mapping[str, Table], members: Sequence[Member]) -> Iterator[Group]:
    """Groups the members by optimiser and by the numbers that set shapes."""
    found: dict[Any, list[int]] = {}
    shapes_of = {label: catalogue.numbers(table) for label, table in tables.items()}
    for number, member in enumerate(members):
        shapes = shapes_of[member.label]
        static = tuple((path, v) for path, v in member.values.items() if shapes.get(path))
        traced = tuple(path for path in member.values if not shapes.get(path))
        found.setdefault((member.label, static, traced), []).append(number)
    for (label, static, traced), numbers in found.items():
        table = substitute(tables[label], dict(static))
        whole = (p for p in traced if all(type(members[n].values[p]) is int for n in numbers))
        yield Group(label, table, traced, frozenset(whole), tuple(numbers))


class Programs(NamedTuple):
    """The compiled functions of a group; they work on blocks of members."""

    start: Callable[[jax.Array, jax.Array], TrainState]  #: values, seeds -> state
    epoch: Any  #: values, alive, state, data -> alive, state, cost; jitted, state donated
    metrics: Callable[[TrainState, Mapping[str, Examples]], dict[str, dict[str, jax.Array]]]
    has_own_key: bool  #: whether each member has a random key of its own
    compiled: dict[int, Any]  #: ``epoch`` by the number of lanes in a block


class Firsts(NamedTuple):
    """Initial parameters and random keys of each seed."""

    params: PyTree
    keys: jax.Array  # raw data of the keys for batches and dropout


def first_states(task: Task, seeds: Sequence[int], mesh: Mesh) -> Firsts:
    """The starts of all seeds, made once because random numbers are slow to compile."""

    @jax.jit
    def first(seed: jax.Array) -> Firsts:
        init_key, key = jax.random.split(jax.random.key(seed))
        return Firsts(task.init(init_key), jax.random.key_data(key))

    found = [jax.device_get(first(jnp.asarray(seed, jnp.int32))) for seed in seeds]
    return jax.tree.map(lambda *xs: put(np.stack(xs), mesh), *found)


def programs_of(
    task: Task,
    group: Group,
    settings: Settings,
    mesh: Mesh,
    seeds: Sequence[int],
    firsts: Firsts,
    vary: Vary,
) -> Programs:
    """The programs of a group; only shapes and untraceable numbers are fixed in them."""
    has_own_key = vary != "initialisation"
    state_axes: Any = TrainState(*cast(Any, (0, 0, None, 0 if has_own_key else None)))

    def start(values: jax.Array, seed: jax.Array, firsts: Firsts) -> TrainState:
        own, first = (jnp.searchsorted(jnp.asarray(seeds), n) for n in (seed, 0))
        params = jax.tree.map(lambda x: x[first if vary == "order" else own], firsts.params)
        key = jax.random.wrap_key_data(firsts.keys[own if has_own_key else first])
        return init_state(group.built(values), params, key)

    def epoch(
        values: jax.Array, alive: jax.Array, state: TrainState, train: Examples
    ) -> tuple[jax.Array, TrainState, jax.Array]:
        tx = group.built(values)
        one = make_epoch(task, tx, batch_size=settings.batch_size, order=settings.order)
        new, result = one(state, train)
        alive = alive & result.finite
        kept = tree.select(alive, new[:2], state[:2])
        cost = jnp.where(alive, result.cost, jnp.nan)
        return alive, TrainState(kept[0], kept[1], new.epoch, new.key), cost

    def metrics(state: TrainState, parts: Mapping[str, Examples]) -> dict[str, Any]:
        params = eval_params(state.opt_state, state.params)
        return {name: evaluate(task, params, part) for name, part in parts.items()}

    def across(f: Callable[..., Any], in_axes: Any, out_axes: Any, **options: Any) -> Any:
        """``f`` for a block of members that the devices share."""

        def specs(axes: Any) -> Any:
            return jax.tree.map(_spec, axes, is_leaf=lambda axis: axis is None)

        members = jax.vmap(f, in_axes, out_axes)
        sharded = jax.shard_map(
            members,
            mesh=mesh,
            in_specs=specs(in_axes),
            out_specs=specs(out_axes),
            check_vma=False,
        )
        return jax.jit(sharded, **options)

    begin = across(start, (0, 0, None), state_axes)
    return Programs(
        lambda values, seeds: begin(values, seeds, firsts),
        across(epoch, (0, 0, state_axes, None), (0, state_axes, 0), donate_argnums=2),
        across(metrics, (state_axes, None), 0),
        has_own_key,
        {},
    )


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec("member")


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
        for name in METRICS
        if name in every[part]
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


# -- checkpoints


def snapshot_of(
    number: int,
    told: Row,
    costs: np.ndarray,
    program: Programs,
    blocks: Sequence[Block],
) -> Snapshot:
    """The state of a sweep; without blocks the next program is about to start.

    The arrays are stored member by member, so the sweep can resume on other devices. Every process
    must call this function.
    """
    if not blocks:
        told = told | {"group": told["group"] + 1, "epoch": 0, "members": []}
        return Snapshot(number, told, (costs.astype(np.float32), []))
    training = [block.members >= 0 for block in blocks]

    def of_members(*parts: jax.Array) -> np.ndarray:
        read_parts = (read(x)[who] for x, who in zip(parts, training, strict=True))
        return np.concatenate(list(read_parts))

    numbers = np.concatenate([block.members for block in blocks])
    told = told | {"members": numbers[numbers >= 0].tolist()}
    each = jax.tree.map(of_members, *(_of_members(program, block) for block in blocks))
    return Snapshot(number, told, (costs.astype(np.float32), [each, _of_all(program, blocks[0])]))


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
    told, kept = snapshot.told, snapshot.told["members"]
    if not kept:
        found, _ = fit(snapshot.arrays, (costs.astype(np.float32), []))
        return np.array(found, np.float64), 0, []
    program, group = programs[told["group"]], groups[told["group"]]
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
