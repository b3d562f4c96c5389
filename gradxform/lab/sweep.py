"""The sweep: many hyperparameters and seeds of an optimiser, trained by one compiled program."""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradxform import tree
from gradxform.evaluation import eval_params
from gradxform.lab import optimizers
from gradxform.lab.batching import Order
from gradxform.lab.grid import Member, Table, substitute
from gradxform.lab.optimizers import ConfigError, Problem
from gradxform.lab.tasks import Task
from gradxform.lab.train import (
    METRICS,
    Examples,
    Settings,
    TrainState,
    collecting,
    evaluate,
    init_state,
    make_epoch,
    settings_of,
)
from gradxform.tree import PyTree

Vary = Literal["initialisation", "order", "both"]
OnEpoch = Callable[[str, int, int], None]

# Members that one call trains, on each device: more are no faster on a CPU, where a net that is
# worth sweeping fills the vector units alone; an accelerator wants as many as fit.
_BLOCK = {"cpu": 32}
_LARGEST_BLOCK = 1024
_MEMORY = 0.8  # of what there is


class SweepResult(NamedTuple):
    """How all members of a sweep did."""

    name: str
    measure: Literal["validation_loss", "train_loss"]  #: what members are compared by
    unit: str  #: of it, in words
    members: tuple[Member, ...]
    rows: tuple[dict[str, Any], ...]
    """one a member: ``optimizer``, its hyperparameters, ``seed``, ``epochs`` that it ran,
    ``diverged``, ``dropped``, ``cost`` of its last epoch, and the metrics after it:
    ``pandas.DataFrame(result.rows)`` is a tidy table"""
    costs: np.ndarray  #: training cost of every epoch, (members, epochs), NaN where it did not run
    seconds: float  #: of training, compilation and evaluation apart
    compile_seconds: float


class _Group(NamedTuple):
    """Members that one program can train: they differ in numbers that can be traced."""

    label: str
    table: Table  # of the optimiser, the other numbers in their places
    paths: tuple[str, ...]  # of the traced ones
    members: tuple[int, ...]


class _Block(NamedTuple):
    """What one call trains."""

    members: np.ndarray  # their numbers; −1 fills the block up
    values: jax.Array  # (block, hyperparameters)
    alive: jax.Array  # (block,)
    state: TrainState


def sweep_on_task(
    task: Task,
    tables: Mapping[str, Table],
    members: Sequence[Member],
    *,
    epochs: int,
    batch_size: int | Literal["full"] = 128,
    order: Order = "reshuffle",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    vary: Vary = "initialisation",
    block_size: int | None = None,
    rungs: Sequence[int] = (),
    keep: float = 0.5,
    on_epoch: OnEpoch | None = None,
) -> SweepResult:
    """Trains a task's model by every member, in as few compiled programs as can be.

    Members of one optimiser that differ in numbers alone are one program, which builds the
    optimiser from traced numbers and is vmapped over a block of members; the members of a block are
    divided among all devices, which hold the data once. All see the same batches, which are
    gathered once for a block, unless ``vary`` says otherwise.

    A member whose cost or parameters are not finite keeps the last finite ones and is marked. After
    the epochs in ``rungs`` only the better points of a program go on: a point is all seeds of the
    same hyperparameters, and the mean of the measure over them what counts.

    Args:
      task: model, loss and data.
      tables: of the optimisers, as in a config, by label.
      members: the runs, see :func:`gradxform.lab.grid.members`.
      epochs: passes over the training part.
      batch_size: examples of a batch, or ``"full"`` for all.
      order: how batches are drawn.
      overrides: by label, those of the three before that are different for it.
      seed: that of seed 0: of initial parameters, batches and dropout, as in a race.
      vary: what another seed changes: initial parameters; batches and dropout; or both.
      block_size: members that are trained together; as many as memory and speed want if not given.
      rungs: epochs after which members are dropped.
      keep: the part of the points that goes on, above 0 and below 1.
      on_epoch: called with the optimiser's label, the epoch, and how many members it trained.

    Returns:
      The result; members are compared by validation loss, or by training loss where there is no
      validation part.

    Raises:
      ConfigError: an optimiser cannot be built or does not fit the task, or the members do not fit
        into memory.

    >>> from gradxform.lab.data import load
    >>> from gradxform.lab.grid import Axis, members
    >>> from gradxform.lab.tasks import make_task
    >>> task = make_task(load("digits"), "logistic", validation_split=0.2)
    >>> tables = {"sgd": {"method": "sgd", "learning_rate": 0.1}}
    >>> runs = members(tables, {"learning_rate": Axis((0.001, 0.1))}, {})
    >>> result = sweep_on_task(task, tables, runs, epochs=2)
    >>> result.rows[1]["validation_loss"] < result.rows[0]["validation_loss"]
    True
    """
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    mesh = Mesh(np.asarray(jax.devices()), ("member",))
    parts = {
        name: Examples(_put(split.x, mesh, PartitionSpec()), _put(split.y, mesh, PartitionSpec()))
        for name, split in splits.items()
        if split is not None
    }
    size = len(task.train.x)
    common = Settings(epochs, batch_size, order, math.inf)
    settings = settings_of(common, overrides or {}, tables, size)
    measure = "validation_loss" if "validation" in parts else "train_loss"
    rows: dict[int, dict[str, Any]] = {}
    costs = np.full((len(members), max(s.epochs for s in settings.values())), np.nan)
    seconds = compile_seconds = 0.0

    problems: list[Problem | str] = []
    groups, programs = tuple(_groups(tables, members)), []
    for group in groups:
        with collecting(problems, f"optimizers.{group.label}"):
            programs.append(_programs(task, group, settings[group.label], mesh, seed, vary))
            _check_memory(programs[-1], group, parts["train"], mesh)
    if problems:
        raise ConfigError(task.name, problems)

    for group, program in zip(groups, programs, strict=True):
        started = time.perf_counter()
        lanes, blocks = _first_blocks(program, group, members, parts["train"], mesh, block_size)
        compile_seconds += time.perf_counter() - started
        last = settings[group.label].epochs
        for epoch in range(1, last + 1):
            started = time.perf_counter()
            for i, block in enumerate(blocks):
                blocks[i], cost = _advance(program, block, parts["train"])
                costs[block.members[block.members >= 0], epoch - 1] = cost
            seconds += time.perf_counter() - started
            training = [n for block in blocks for n in block.members if n >= 0]
            if on_epoch is not None:
                on_epoch(group.label, epoch, len(training))
            if epoch != last and epoch not in rungs:
                continue
            for block in blocks:
                for number, found in _metrics(program, block, parts).items():
                    ran = costs[number][np.isfinite(costs[number])]
                    rows[number] = {
                        "optimizer": group.label,
                        **members[number].values,
                        "seed": members[number].seed,
                        "epochs": len(ran),
                        "diverged": found.pop("diverged"),
                        "dropped": epoch != last,
                        "cost": float(ran[-1]) if len(ran) else math.nan,
                        **found,
                    }
            if epoch != last:
                kept = _better_points(members, rows, training, measure, keep)
                blocks = _regroup(program, blocks, kept, lanes, mesh)
    ordered = tuple(rows[i] for i in range(len(members)))
    return SweepResult(
        task.name, measure, task.unit, tuple(members), ordered, costs, seconds, compile_seconds
    )


def _groups(tables: Mapping[str, Table], members: Sequence[Member]) -> Iterator[_Group]:
    """The members by optimiser and by the numbers that set shapes."""
    found: dict[Any, list[int]] = {}
    for number, member in enumerate(members):
        shapes = optimizers.numbers(tables[member.label])
        static = tuple((path, v) for path, v in member.values.items() if shapes.get(path))
        traced = tuple(path for path in member.values if not shapes.get(path))
        found.setdefault((member.label, static, traced), []).append(number)
    for (label, static, traced), numbers in found.items():
        yield _Group(label, substitute(tables[label], dict(static)), traced, tuple(numbers))


class _Programs(NamedTuple):
    """What is compiled for a group; all but the data are of a block of members."""

    start: Callable[[jax.Array, jax.Array], TrainState]  #: values, seeds -> state
    epoch: Any  #: values, alive, state, data -> alive, state, cost; jitted, state donated
    metrics: Callable[[TrainState, Mapping[str, Examples]], dict[str, dict[str, jax.Array]]]
    has_own_key: bool  #: whether each member has a random key of its own
    compiled: dict[int, Any]  #: ``epoch`` for blocks of so many lanes


def _programs(
    task: Task, group: _Group, settings: Settings, mesh: Mesh, seed: int, vary: Vary
) -> _Programs:
    has_own_key = vary != "initialisation"
    state_axes: Any = TrainState(*cast(Any, (0, 0, None, 0 if has_own_key else None)))

    def build(values: jax.Array) -> Any:
        traced = dict(zip(group.paths, values, strict=True))
        return optimizers.build(substitute(group.table, traced), f"optimizers.{group.label}")

    def start(values: jax.Array, number: jax.Array) -> TrainState:
        own, first = (jax.random.split(jax.random.key(seed + n)) for n in (number, 0))
        params = task.init(first[0] if vary == "order" else own[0])
        return init_state(build(values), params, own[1] if has_own_key else first[1])

    def epoch(
        values: jax.Array, alive: jax.Array, state: TrainState, train: Examples
    ) -> tuple[jax.Array, TrainState, jax.Array]:
        one = make_epoch(task, build(values), batch_size=settings.batch_size, order=settings.order)
        new, result = one(state, train)
        alive = alive & result.finite
        kept = tree.select(alive, new[:2], state[:2])
        cost = jnp.where(alive, result.cost, jnp.nan)
        return alive, TrainState(kept[0], kept[1], new.epoch, new.key), cost

    def metrics(state: TrainState, parts: Mapping[str, Examples]) -> dict[str, Any]:
        params = eval_params(state.opt_state, state.params)
        return {name: evaluate(task, params, part) for name, part in parts.items()}

    def across(f: Callable[..., Any], in_axes: Any, out_axes: Any, **options: Any) -> Any:
        """``f`` of a block of members, divided among the devices."""

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

    return _Programs(
        across(start, (0, 0), state_axes),
        across(epoch, (0, 0, state_axes, None), (0, state_axes, 0), donate_argnums=2),
        across(metrics, (state_axes, None), 0),
        has_own_key,
        {},
    )


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec("member")


def _put(x: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """``x`` on the devices, those of other processes included."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda at: x[at])


def _read(x: jax.Array) -> np.ndarray:
    """``x`` on the host, the parts of other processes included."""
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


# -- memory


def _check_memory(program: _Programs, group: _Group, train: Examples, mesh: Mesh) -> None:
    """Raises an error if the states of all members do not fit, or the optimiser does not."""
    lanes = mesh.devices.size
    values = jax.ShapeDtypeStruct((lanes, len(group.paths)), jnp.float32)
    seeds = jax.ShapeDtypeStruct((lanes,), jnp.int32)
    state = jax.eval_shape(program.start, values, seeds)
    alive = jax.ShapeDtypeStruct((lanes,), jnp.bool_)
    jax.eval_shape(
        program.epoch, values, alive, state, train
    )  # errors in the update, before any run
    each = _bytes(state) / lanes
    share, limit = len(group.members) / lanes, _memory(mesh)
    if share * each > limit:
        raise ValueError(
            f"sweep: {len(group.members)} members of {each / 2**20:.3g} MiB each do not fit into "
            f"{limit * lanes / 2**30:.3g} GiB of memory: sweep fewer at once, or a smaller model"
        )


def _memory(mesh: Mesh) -> float:
    """Bytes that a device may use."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return _MEMORY * stats["bytes_limit"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _MEMORY * pages / len(mesh.local_devices)


def _bytes(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _first_blocks(
    program: _Programs,
    group: _Group,
    members: Sequence[Member],
    train: Examples,
    mesh: Mesh,
    block_size: int | None,
) -> tuple[int, list[_Block]]:
    """The members of a group in blocks before the first epoch, and how many lanes a block has."""
    devices = mesh.devices.size
    usual = _BLOCK.get(mesh.devices.flat[0].platform, _LARGEST_BLOCK) * devices
    lanes = _lanes(len(group.members), block_size or usual, devices)
    numbers = np.asarray(group.members)
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
    """Lanes of a block: not more than there are members, a multiple of the devices."""
    return -(-min(members, max(wanted, 1)) // devices) * devices


def _program_bytes(program: Any) -> float:
    """Memory on each device while a compiled program runs."""
    used = program.memory_analysis()
    if used is None:
        return 0.0
    arguments = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return arguments + used.temp_size_in_bytes


# -- blocks


def _start(
    program: _Programs,
    group: _Group,
    members: Sequence[Member],
    numbers: np.ndarray,
    lanes: int,
    mesh: Mesh,
) -> _Block:
    """A block before its first epoch."""
    filled = _fill(numbers, lanes)
    in_block = [members[i] for i in np.where(filled >= 0, filled, numbers[0])]
    values = [[member.values[path] for path in group.paths] for member in in_block]
    spec = PartitionSpec("member")
    values = _put(np.asarray(values, np.float32).reshape(lanes, len(group.paths)), mesh, spec)
    seeds = _put(np.asarray([member.seed for member in in_block], np.int32), mesh, spec)
    return _Block(filled, values, _put(filled >= 0, mesh, spec), program.start(values, seeds))


def _fill(numbers: np.ndarray, lanes: int) -> np.ndarray:
    return np.pad(numbers, (0, lanes - len(numbers)), constant_values=-1)


def _advance(program: _Programs, block: _Block, train: Examples) -> tuple[_Block, np.ndarray]:
    """The block after one more epoch, and the cost of each of its members."""
    lanes = len(block.members)
    if lanes not in program.compiled:
        lowered = program.epoch.lower(block.values, block.alive, block.state, train)
        program.compiled[lanes] = lowered.compile()
    run = program.compiled[lanes]
    alive, state, cost = run(block.values, block.alive, block.state, train)
    block = block._replace(alive=alive, state=state)
    return block, _read(cost)[block.members >= 0]


def _metrics(
    program: _Programs, block: _Block, parts: Mapping[str, Examples]
) -> dict[int, dict[str, Any]]:
    """Whether each member diverged, and its metrics at the parameters to evaluate."""
    means = {
        f"{part}_{name}": _read(found[name])
        for part, found in program.metrics(block.state, parts).items()
        for name in METRICS
        if name in found
    }
    alive = _read(block.alive)
    return {
        int(number): {"diverged": not alive[lane]}
        | {name: float(values[lane]) for name, values in means.items()}
        for lane, number in enumerate(block.members)
        if number >= 0
    }


def _better_points(
    members: Sequence[Member],
    rows: Mapping[int, Mapping[str, Any]],
    training: Sequence[int],
    measure: str,
    keep: float,
) -> np.ndarray:
    """The members of the better points among those that are training."""
    points: dict[Any, list[int]] = {}
    for number in training:
        points.setdefault(tuple(members[number].values.items()), []).append(number)

    def score(point: Any) -> float:
        values = [math.inf if rows[n]["diverged"] else rows[n][measure] for n in points[point]]
        mean = float(np.mean(values))
        return mean if math.isfinite(mean) else math.inf

    best = sorted(points, key=score)[: max(1, math.ceil(keep * len(points)))]
    return np.sort([number for point in best for number in points[point]])


def _regroup(
    program: _Programs, blocks: Sequence[_Block], kept: np.ndarray, lanes: int, mesh: Mesh
) -> list[_Block]:
    """The members that go on, in as few blocks as can be."""
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
        alive = picked([block.alive for block in blocks], at) & _put(
            numbers >= 0, mesh, PartitionSpec("member")
        )
        params, opt_state = picked([state[:2] for state in states], at)
        key = picked([s.key for s in states], at) if program.has_own_key else states[0].key
        values = picked([block.values for block in blocks], at)
        state = TrainState(params, opt_state, states[0].epoch, key)
        regrouped.append(_Block(numbers, values, alive, state))
    return regrouped
