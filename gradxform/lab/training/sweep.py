"""The sweep: trains many hyperparameters and seeds of an optimiser in one compiled program."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gradxform.lab.data.sets import Dataset
from gradxform.lab.experiment.experiment import Experiment
from gradxform.lab.experiment.grid import Member, Table
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.load import require_sweep, sweep_members
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.experiment.schema import Config, TaskConfig
from gradxform.lab.tasks.task import Examples, Task
from gradxform.lab.training.batching import Order, steps_per_epoch
from gradxform.lab.training.blocks import (
    Block,
    advance,
    check_memory,
    compile_epoch,
    first_blocks,
    metrics_of,
    regroup,
)
from gradxform.lab.training.checkpoints import OnState, Snapshot, of_this_version
from gradxform.lab.training.epoch import evaluate, in_order, to_every_device
from gradxform.lab.training.members import better_points, count_epoch, first_row
from gradxform.lab.training.outcomes import Row, SweepResult, ran_away
from gradxform.lab.training.processes import mesh_of, read
from gradxform.lab.training.programs import (
    Firsts,
    Group,
    Programs,
    Vary,
    first_states,
    groups_of,
    programs_of,
)
from gradxform.lab.training.race import precision_of, task_of
from gradxform.lab.training.records import check_sweep
from gradxform.lab.training.settings import Settings, collecting, settings_of
from gradxform.lab.training.sweep_states import restored, snapshot_of
from gradxform.tree import PyTree

OnEpoch = Callable[[str, int, Mapping[int, Row]], None]


def sweep(
    config: Config | Experiment,
    data: Dataset | None = None,
    on_epoch: OnEpoch | None = None,
    *,
    on_state: OnState | None = None,
    resume: Snapshot | None = None,
) -> SweepResult:
    """Runs the members of a config's ``[sweep]`` on its task.

    Args:
      config: the config, or the experiment that was prepared from it.
      data: for a task on data, its data set, see :func:`gradxform.lab.data.sets.load`.
      on_epoch: called with an optimiser's label, the epoch, and by number the rows of the members
        that trained in it. The rows have metrics after rungs and after the last epoch. On a surface
        it is called once per program.
      on_state: see :func:`sweep_on_task`; ignored on a surface.
      resume: see :func:`sweep_on_task`; ignored on a surface.

    Raises:
      ConfigError: ``[sweep]`` is missing, an optimiser cannot be built or does not fit the task, or
        the members do not fit into memory.
      CheckpointError: ``resume`` belongs to another sweep.
      ModelError: the model does not fit the data.
      DataError: the validation split leaves nothing to train on or to validate with.

    >>> from gradxform.lab.experiment.load import parse_config
    >>> config = parse_config({
    ...     "name": "walk", "task": {"kind": "surface", "surface": "saddle", "start": [1, 0.5]},
    ...     "training": {"steps": 100}, "optimizers": {"a": {"method": "sgd", "learning_rate": 1}},
    ...     "sweep": {"axes": {"learning_rate": [0.01, 0.1]}},
    ... })
    >>> [(row["learning_rate"], row["status"]) for row in sweep(config).rows]
    [(0.01, 'max_steps'), (0.1, 'converged')]
    """
    given = config.config if isinstance(config, Experiment) else config
    require_sweep(given)  # some kinds have none
    run = at(kind_of(given).sweep or "")
    with precision_of(given):
        return run(given, data, on_epoch, on_state=on_state, resume=resume)


def sweep_on_data(
    config: TaskConfig,
    data: Dataset | None = None,
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> SweepResult:
    """The sweep of a config whose task is a net on data; see :func:`sweep`."""
    table, members = require_sweep(config), sweep_members(config)
    training = config.training.model_dump(exclude_none=True)
    return sweep_on_task(
        task_of(config, data),
        config.optimizers,
        members,
        seed=config.seed,
        on_epoch=on_epoch,
        **options,
        **{key: training[key] for key in ("epochs", "batch_size", "order", "overrides")},
        **table.model_dump(include={"vary", "block_size", "rungs", "keep"}),
    )


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
    on_state: OnState | None = None,
    resume: Snapshot | None = None,
) -> SweepResult:
    """Trains a task's model with every member, in as few compiled programs as possible.

    Members of one optimiser that differ only in traced numbers share a program. The program builds
    the optimiser from these numbers and is vmapped over a block of members. All devices share the
    members of a block, and each device holds the data once. All members see the same batches,
    unless ``vary`` says otherwise.

    If the cost or parameters of a member are not finite, it keeps the last finite ones and is
    marked as diverged. After the epochs in ``rungs`` only the better points of a program continue.
    A point is all seeds of the same hyperparameters, and the mean of the measure ranks it.

    Args:
      task: model, loss and data.
      tables: the tables of the optimisers, as in a config, by label.
      members: the runs, see :func:`gradxform.lab.experiment.grid.members`.
      epochs: passes over the training part.
      batch_size: examples in a batch, or ``"full"`` for all.
      order: how batches are drawn.
      overrides: by label, different values of the three arguments above.
      seed: the seed of member seed 0, for initial parameters, batches and dropout, as in a race.
      vary: what another seed changes: initial parameters; batches and dropout; or both.
      block_size: members that train together; if not given, chosen by memory and speed.
      rungs: epochs after which the worse points are dropped.
      keep: the fraction of points that continue, above 0 and below 1.
      on_epoch: see :func:`sweep`.
      on_state: called after each epoch of a program, for checkpoints.
      resume: a snapshot of an interrupted sweep with the same arguments, on any devices.

    Returns:
      The result. Members are compared by validation loss, or by training loss without a validation
      part.

    Raises:
      ConfigError: an optimiser cannot be built or does not fit the task, or the members do not fit
        into memory.
      CheckpointError: ``resume`` belongs to another sweep.

    >>> from gradxform.lab.data.sets import load
    >>> from gradxform.lab.experiment.grid import Axis, members
    >>> from gradxform.lab.tasks.task import make_task
    >>> task = make_task(load("digits"), "logistic", validation_split=0.2)
    >>> tables = {"sgd": {"method": "sgd", "learning_rate": 0.1}}
    >>> runs = members(tables, {"learning_rate": Axis((0.001, 0.1))}, {})
    >>> result = sweep_on_task(task, tables, runs, epochs=2)
    >>> result.rows[1]["validation_loss"] < result.rows[0]["validation_loss"]
    True
    """
    mesh = mesh_of("member", jax.devices())
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    parts = {name: to_every_device(part, mesh) for name, part in splits.items() if part is not None}
    common = Settings(epochs, batch_size, order, math.inf)
    settings = settings_of(common, overrides or {}, tables, parts["train"].size)
    measure = "validation_loss" if "validation" in parts else "train_loss"
    most = max(own.epochs for own in settings.values())
    tally = _Tally({}, np.full((len(members), most), np.nan))

    started = time.perf_counter()
    seeds = sorted({0, *(member.seed for member in members)})
    firsts = first_states(task, [seed + number for number in seeds], mesh)
    tally.compile_seconds += time.perf_counter() - started
    groups = tuple(groups_of(tables, members))
    make = lambda group: programs_of(task, group, settings[group.label], mesh, seeds, firsts, vary)
    programs = _checked_programs(task, groups, make, parts["train"], mesh)
    losses = _first_losses(task, firsts, parts["train"])
    first_loss = {n: losses[0 if vary == "order" else i] for i, n in enumerate(seeds)}
    plan = _Plan(
        *(tuple(members), groups, programs, settings, parts, mesh),
        *(first_loss, measure, block_size, tuple(rungs), keep),
    )
    begun = _Begun(0, 0, 0, [])
    if resume is not None:
        begun = _resumed(plan, tally, resume, _metric_columns(task, parts, firsts.params))
    for number in range(begun.group, len(groups)):
        _train(plan, tally, begun._replace(group=number), on_epoch, on_state)
        begun = _Begun(number + 1, 0, 0, [])
    ordered = tuple(tally.rows[i] for i in range(len(members)))
    times = tally.seconds, tally.compile_seconds
    return SweepResult(task.name, measure, task.unit, plan.members, ordered, tally.costs, *times)


class _Plan(NamedTuple):
    """What does not change while a sweep trains."""

    members: tuple[Member, ...]
    groups: tuple[Group, ...]
    programs: Sequence[Programs]  # one for each group
    settings: Mapping[str, Settings]  # by label
    parts: Mapping[str, Examples]  # of the data, by name
    mesh: Mesh
    first_loss: Mapping[int, float]  # the loss at the start, by seed
    measure: str
    block_size: int | None
    rungs: tuple[int, ...]
    keep: float


@dataclasses.dataclass
class _Tally:
    """The results so far."""

    rows: dict[int, Row]  # by number of the member
    costs: np.ndarray  # (members, epochs)
    seconds: float = 0.0
    compile_seconds: float = 0.0


class _Begun(NamedTuple):
    """Where the training of a group continues."""

    group: int
    epoch: int  # finished epochs
    lanes: int  # members that train together
    blocks: list[Block]  # empty before the first epoch


def _checked_programs(
    task: Task,
    groups: Sequence[Group],
    make: Callable[[Group], Programs],
    train: Examples,
    mesh: Mesh,
) -> list[Programs]:
    """The programs of all groups; one error tells everything that is wrong with them."""
    problems: list[Problem | str] = []
    programs = []
    for group in groups:
        with collecting(problems, f"optimizers.{group.label}"):
            programs.append(make(group))
            check_memory(programs[-1], group, train, mesh)
    if problems:
        raise ConfigError(task.name, problems)
    return programs


def _resumed(plan: _Plan, tally: _Tally, snapshot: Snapshot, metrics: set[str]) -> _Begun:
    """Where a snapshot continues; fills the tally with its results."""
    with of_this_version():
        firsts = [first_row(member) for member in plan.members]
        lasts = [plan.settings[group.label].epochs for group in plan.groups]
        members = [group.members for group in plan.groups]
        record = snapshot.record
        tally.rows |= check_sweep(record, firsts, members, lasts, metrics)
        tally.costs, lanes, blocks = restored(
            snapshot,
            plan.groups,
            plan.programs,
            plan.members,
            plan.parts["train"],
            plan.mesh,
            tally.costs,
            plan.block_size,
        )
        tally.seconds, tally.compile_seconds = record["seconds"], record["compile_seconds"]
        return _Begun(record["group"], record["epoch"], lanes, blocks)


def _train(
    plan: _Plan,
    tally: _Tally,
    begun: _Begun,
    on_epoch: OnEpoch | None,
    on_state: OnState | None,
) -> None:
    """Trains the members of one group to the end."""
    number, done, lanes, blocks = begun
    group, program, train = plan.groups[number], plan.programs[number], plan.parts["train"]
    if not blocks:
        started = time.perf_counter()
        at = (train, plan.mesh, plan.block_size)
        lanes, blocks = first_blocks(program, group, plan.members, *at)
        tally.compile_seconds += time.perf_counter() - started
        tally.rows |= {member: first_row(plan.members[member]) for member in group.members}
    last = plan.settings[group.label].epochs
    before = sum(plan.settings[earlier.label].epochs for earlier in plan.groups[:number])
    for epoch in range(done + 1, last + 1):
        training = _train_epoch(plan, tally, number, blocks, epoch)
        is_rung = epoch != last and epoch in plan.rungs
        if epoch == last or is_rung:
            _measure(plan, tally, program, blocks, is_rung)
        if on_epoch is not None:
            on_epoch(group.label, epoch, {member: tally.rows[member] for member in training})
        if is_rung:
            kept = better_points(plan.members, tally.rows, training, plan.measure, plan.keep)
            blocks = regroup(program, blocks, kept, lanes, plan.mesh)
        if on_state is not None:
            record = {"group": number, "epoch": epoch, "rows": tally.rows}
            record |= {"seconds": tally.seconds, "compile_seconds": tally.compile_seconds}
            next_blocks = blocks if epoch != last else []
            state = before + epoch, record, tally.costs, program, next_blocks
            on_state(before + epoch, functools.partial(snapshot_of, *state))


def _train_epoch(
    plan: _Plan, tally: _Tally, number: int, blocks: list[Block], epoch: int
) -> list[int]:
    """Trains all blocks of a group for one epoch, in place; returns the members that trained."""
    group, program, train = plan.groups[number], plan.programs[number], plan.parts["train"]
    steps = steps_per_epoch(train.size, plan.settings[group.label].batch_size)
    tally.compile_seconds += compile_epoch(program, blocks, train)
    started = time.perf_counter()
    for j, block in enumerate(blocks):
        blocks[j], cost = advance(program, block, train)
        tally.costs[block.members[block.members >= 0], epoch - 1] = cost
    elapsed = time.perf_counter() - started
    tally.seconds += elapsed
    training = [int(n) for block in blocks for n in block.members if n >= 0]
    for member in training:
        cost = tally.costs[member, epoch - 1]
        count_epoch(tally.rows[member], cost, steps, elapsed / len(training))
    return training


def _measure(
    plan: _Plan, tally: _Tally, program: Programs, blocks: Sequence[Block], is_rung: bool
) -> None:
    """Adds the metrics to the rows of all members that are training."""
    for block in blocks:
        for member, found in metrics_of(program, block, plan.parts).items():
            row = tally.rows[member]
            row |= {"dropped": is_rung, **found}
            first = plan.first_loss[plan.members[member].seed]
            row["diverged"] |= ran_away(found["train_loss"], first)


def _first_losses(task: Task, firsts: Firsts, train: Examples) -> list[float]:
    """The initial training loss of each seed."""

    @jax.jit
    def losses(params: PyTree, train: Examples) -> jax.Array:
        return jax.lax.map(lambda own: evaluate(task, own, train)["loss"], params)

    return read(losses(firsts.params, train)).tolist()


def _metric_columns(task: Task, parts: Mapping[str, Examples], params: PyTree) -> set[str]:
    """The columns of a member after its evaluation."""
    one = jax.tree.map(lambda x: x[0], params)
    shapes = {
        name: jax.eval_shape(lambda p, x: evaluate(task, p, x), one, x) for name, x in parts.items()
    }
    return {f"{part}_{name}" for part in parts for name in in_order(shapes[part])}
