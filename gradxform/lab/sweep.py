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
from gradxform.lab.batching import Order, steps_per_epoch
from gradxform.lab.checkpoints import CheckpointError, OnState, Snapshot, fit
from gradxform.lab.config import Config, SurfaceConfig, require_sweep, sweep_members
from gradxform.lab.data import Dataset
from gradxform.lab.grid import Member, Table, substitute
from gradxform.lab.optimizers import ConfigError, Problem
from gradxform.lab.surfaces import SURFACES, Surface
from gradxform.lab.tasks import Task, make_task
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
from gradxform.minimization import Status, minimize
from gradxform.tree import PyTree

Vary = Literal["initialisation", "order", "both"]
Row = dict[str, Any]
OnEpoch = Callable[[str, int, Mapping[int, Row]], None]

# Members that one call trains, on each device: more are no faster on a CPU, where a net that is
# worth sweeping fills the vector units alone; an accelerator wants as many as fit.
_BLOCK = {"cpu": 32}
_LARGEST_BLOCK = 1024
_MEMORY = 0.8  # of what there is
_SOLVED = 1e-3  # above the value of a surface's minimum; its saddles and plateaus are higher
_RESERVED = (
    *("optimizer", "seed", "epochs", "steps", "diverged", "dropped", "seconds", "cost"),
    *("x0", "y0", "x", "y", "value", "evaluations", "curvature_products", "work", "status"),
)


class SweepResult(NamedTuple):
    """How all members of a sweep did."""

    name: str
    measure: Literal["validation_loss", "train_loss", "work"]  #: what members are compared by
    unit: str  #: of it, in words
    members: tuple[Member, ...]
    rows: tuple[Row, ...]
    """one a member: ``optimizer``, its hyperparameters, ``seed``, the ``epochs`` and ``steps`` that
    it ran, ``diverged``, ``dropped``, its share of the ``seconds``, ``cost`` of its last epoch, and
    the metrics after it; or what :func:`sweep_on_surface` tells. ``pandas.DataFrame(result.rows)``
    is a tidy table"""
    costs: np.ndarray
    """training cost of every epoch, (members, epochs), NaN where it did not run; no epochs on a
    surface"""
    seconds: float  #: of training, compilation and evaluation apart
    compile_seconds: float


class Point(NamedTuple):
    """All runs of the same hyperparameters."""

    label: str  #: of the optimiser
    values: Mapping[str, float]  #: hyperparameters, by dotted path in the optimiser's table
    numbers: tuple[int, ...]  #: of its members
    rows: tuple[Row, ...]  #: of these
    failures: int  #: members that diverged or, on a surface, were not solved
    mean: float
    """of the measure over all its members, and over those solved on a surface; infinite if one
    diverged, or none was solved"""

    @property
    def dropped(self) -> bool:
        """Whether it was trained for fewer epochs, being among the worse after a rung."""
        return any(row.get("dropped") for row in self.rows)


class _Group(NamedTuple):
    """Members that one program can train: they differ in numbers that can be traced."""

    label: str
    table: Table  # of the optimiser, the other numbers in their places
    paths: tuple[str, ...]  # of the traced ones
    whole: frozenset[str]  # those of them that are integers in every member
    members: tuple[int, ...]

    def built(self, values: jax.Array) -> Any:
        """The optimiser with these numbers, which may be traced."""
        traced = {
            path: value.astype(jnp.int32) if path in self.whole else value
            for path, value in zip(self.paths, values, strict=True)
        }
        return optimizers.build(substitute(self.table, traced), f"optimizers.{self.label}")


class _Block(NamedTuple):
    """What one call trains."""

    members: np.ndarray  # their numbers; −1 fills the block up
    values: jax.Array  # (block, hyperparameters)
    alive: jax.Array  # (block,)
    state: TrainState


def sweep(
    config: Config,
    data: Dataset | None = None,
    on_epoch: OnEpoch | None = None,
    *,
    on_state: OnState | None = None,
    resume: Snapshot | None = None,
) -> SweepResult:
    """Runs the members of a config's ``[sweep]`` on its task.

    Args:
      config: the experiment.
      data: the data set that a task on data names, see :func:`gradxform.lab.data.load`.
      on_epoch: called with an optimiser's label, the epoch, and by number the rows so far of the
        members that trained in it: metrics are there after the last epoch and after rungs. On a
        surface it is called once for each program.
      on_state: see :func:`sweep_on_task`; minimising a surface is too short for it.
      resume: likewise.

    Raises:
      ConfigError: there is no ``[sweep]``; an optimiser cannot be built or does not fit the task;
        or the members do not fit into memory.
      CheckpointError: ``resume`` is of another sweep.
      ModelError: the model does not fit the data.
      DataError: the validation split leaves nothing to train on or to validate with.

    >>> from gradxform.lab.config import parse_config
    >>> config = parse_config({
    ...     "name": "walk", "task": {"kind": "surface", "surface": "saddle", "start": [1, 0.5]},
    ...     "training": {"steps": 100}, "optimizers": {"a": {"method": "sgd", "learning_rate": 1}},
    ...     "sweep": {"axes": {"learning_rate": [0.01, 0.1]}},
    ... })
    >>> [(row["learning_rate"], row["status"]) for row in sweep(config).rows]
    [(0.01, 'max_steps'), (0.1, 'converged')]
    """
    table = require_sweep(config)
    members = sweep_members(config)
    if isinstance(config, SurfaceConfig):
        surface = SURFACES[config.task.surface]
        starts = table.model_dump()["starts"] or [config.task.start or surface.start]
        return sweep_on_surface(
            surface,
            config.optimizers,
            members,
            starts=grid_of_starts(surface, **starts) if isinstance(starts, dict) else starts,
            max_steps=config.training.steps,
            tol=table.model_dump()["tol"],
            on_epoch=on_epoch,
        )
    if data is None:
        raise ValueError(f"sweep needs data=load({config.task.dataset!r})")
    options = config.task.model_dump(exclude={"kind", "dataset", "model"})
    training = config.training.model_dump(exclude_none=True)
    return sweep_on_task(
        make_task(data, config.task.model, **options),
        config.optimizers,
        members,
        seed=config.seed,
        on_epoch=on_epoch,
        on_state=on_state,
        resume=resume,
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
      on_epoch: see :func:`sweep`.
      on_state: called after each epoch of a program, for checkpoints.
      resume: where an interrupted sweep of the same arguments stood, on as many devices.

    Returns:
      The result; members are compared by validation loss, or by training loss where there is no
      validation part.

    Raises:
      ConfigError: an optimiser cannot be built or does not fit the task, or the members do not fit
        into memory.
      CheckpointError: ``resume`` is of another sweep.

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
    rows: dict[int, Row] = {}
    costs = np.full((len(members), max(s.epochs for s in settings.values())), np.nan)
    seconds = compile_seconds = 0.0

    problems: list[Problem | str] = []
    groups, programs = tuple(_groups(tables, members)), []
    started = time.perf_counter()
    seeds = sorted({0, *(member.seed for member in members)})
    firsts = _first_states(task, [seed + number for number in seeds], mesh)
    compile_seconds += time.perf_counter() - started
    for group in groups:
        with collecting(problems, f"optimizers.{group.label}"):
            own = settings[group.label]
            programs.append(_programs(task, group, own, mesh, seeds, firsts, vary))
            _check_memory(programs[-1], group, parts["train"], mesh)
    if problems:
        raise ConfigError(task.name, problems)

    first = done = lanes = 0
    blocks: list[_Block] = []
    if resume is not None:
        costs, blocks = _restored(resume, groups, programs, members, mesh, costs)
        first, done, lanes = (resume.told[name] for name in ("group", "epoch", "lanes"))
        seconds, compile_seconds = (resume.told[n] for n in ("seconds", "compile_seconds"))
        rows |= {int(number): row for number, row in resume.told["rows"].items()}

    for i, (group, program) in list(enumerate(zip(groups, programs, strict=True)))[first:]:
        if not blocks:
            started = time.perf_counter()
            lanes, blocks = _first_blocks(program, group, members, parts["train"], mesh, block_size)
            compile_seconds += time.perf_counter() - started
            rows |= {number: _first_row(members[number]) for number in group.members}
        last = settings[group.label].epochs
        steps = steps_per_epoch(size, settings[group.label].batch_size)
        for epoch in range(done + 1, last + 1):
            compile_seconds += _compile(program, blocks, parts["train"])
            started = time.perf_counter()
            for j, block in enumerate(blocks):
                blocks[j], cost = _advance(program, block, parts["train"])
                costs[block.members[block.members >= 0], epoch - 1] = cost
            elapsed = time.perf_counter() - started
            seconds += elapsed
            training = [int(n) for block in blocks for n in block.members if n >= 0]
            for number in training:
                _count(rows[number], costs[number, epoch - 1], steps, elapsed / len(training))
            if epoch == last or epoch in rungs:
                for block in blocks:
                    for number, found in _metrics(program, block, parts).items():
                        rows[number] |= {"dropped": epoch != last, **found}
            if on_epoch is not None:
                on_epoch(group.label, epoch, {number: rows[number] for number in training})
            if epoch != last and epoch in rungs:
                kept = _better_points(members, rows, training, measure, keep)
                blocks = _regroup(program, blocks, kept, lanes, mesh)
            if on_state is not None:
                told = {"group": i, "epoch": epoch, "lanes": lanes, "rows": rows}
                told |= {"seconds": seconds, "compile_seconds": compile_seconds}
                number = sum(settings[earlier.label].epochs for earlier in groups[:i]) + epoch
                going_on = blocks if epoch != last else []
                on_state(number, functools.partial(_snapshot, number, told, costs, going_on, mesh))
        done, blocks = 0, []
    ordered = tuple(rows[i] for i in range(len(members)))
    return SweepResult(
        task.name, measure, task.unit, tuple(members), ordered, costs, seconds, compile_seconds
    )


def sweep_on_surface(
    surface: Surface,
    tables: Mapping[str, Table],
    members: Sequence[Member],
    *,
    starts: Sequence[Sequence[float]],
    max_steps: int,
    tol: float = 1e-4,
    on_epoch: OnEpoch | None = None,
) -> SweepResult:
    """Minimises a surface by every member, those of one optimiser by one vmapped program.

    A row holds ``optimizer``, its hyperparameters, the start ``x0``, ``y0``, the best point ``x``,
    ``y`` that :func:`gradxform.minimize` found with its ``value``; the ``steps``, ``evaluations``
    and ``curvature_products`` it took, ``work``, the sum of the latter two; ``status``; and whether
    it is ``solved``: converged to one of the surface's minima, not to a saddle.

    Args:
      surface: the function.
      tables: of the optimisers, as in a config, by label.
      members: the runs, see :func:`gradxform.lab.grid.members`; the seed of each is the number of
        its start.
      starts: pairs of numbers.
      max_steps: the most updates of each.
      tol: of the largest entry of the gradient, where it has converged.
      on_epoch: see :func:`sweep`.

    Returns:
      The result; members are compared by their work.

    Raises:
      ConfigError: an optimiser cannot be built or fails on a point.

    >>> from gradxform.lab.grid import Member
    >>> runs = [Member("newton", {}, 0), Member("newton", {}, 1)]
    >>> result = sweep_on_surface(
    ...     SURFACES["quadratic"], {"newton": {"method": "newton"}}, runs,
    ...     starts=[(-4.6, -2.2), (1.0, 1.0)], max_steps=10,
    ... )
    >>> [(row["steps"], row["solved"]) for row in result.rows]
    [(1, True), (1, True)]
    """
    points = jnp.asarray(starts, jnp.float32)
    lows = [float(surface.fn(jnp.asarray(point, jnp.float32))) for point in surface.minima]
    rows: dict[int, Row] = {}
    seconds = compile_seconds = 0.0

    problems: list[Problem | str] = []
    groups, programs = tuple(_groups(tables, members)), []
    for group in groups:
        values = [[members[n].values[path] for path in group.paths] for n in group.members]
        arguments = (
            jnp.asarray(values, jnp.float32).reshape(len(values), len(group.paths)),
            points[jnp.asarray([members[n].seed for n in group.members])],
        )
        with collecting(problems, f"optimizers.{group.label}"):
            program = jax.jit(jax.vmap(_solver(surface, group, max_steps, tol)))
            programs.append((program.trace(*arguments), arguments))
    if problems:
        raise ConfigError(surface.name, problems)

    for group, (traced, arguments) in zip(groups, programs, strict=True):
        started = time.perf_counter()
        program = traced.lower().compile()
        compiled = time.perf_counter()
        found = jax.device_get(jax.block_until_ready(program(*arguments)))
        compile_seconds += compiled - started
        seconds += time.perf_counter() - compiled
        own = {}
        for lane, number in enumerate(group.members):
            end = {name: x[lane].item() for name, x in found.items()}
            status = Status(end.pop("status"))
            solved = status == Status.converged and end["value"] <= min(lows) + _SOLVED
            own[number] = {
                **_columns(members[number]),
                **dict(zip(("x0", "y0"), map(float, starts[members[number].seed]), strict=True)),
                **end,
                "work": end["evaluations"] + end["curvature_products"],
                "status": status.name,
                "solved": solved,
            }
        rows |= own
        if on_epoch is not None:
            on_epoch(group.label, 1, own)
    ordered, costs = tuple(rows[i] for i in range(len(members))), np.empty((len(members), 0))
    unit = "evaluations and curvature products"
    name = surface.name
    return SweepResult(name, "work", unit, tuple(members), ordered, costs, seconds, compile_seconds)


def grid_of_starts(surface: Surface, points: int) -> tuple[tuple[float, float], ...]:
    """Starts in a square grid over what is drawn of a surface, the middles of equal cells.

    Args:
      surface: whose bounds.
      points: a side.

    >>> grid_of_starts(SURFACES["saddle"], 2)
    ((-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
    """
    x, y = (
        [low + (high - low) * (i + 0.5) / points for i in range(points)]
        for low, high in surface.bounds
    )
    return tuple((a, b) for b in y for a in x)


def points_of(result: SweepResult) -> dict[str, tuple[Point, ...]]:
    """The points of each optimiser, in the order of their members, by label."""
    runs: dict[Any, list[int]] = {}
    for number, member in enumerate(result.members):
        runs.setdefault((member.label, tuple(member.values.items())), []).append(number)
    found: dict[str, tuple[Point, ...]] = {}
    for (label, values), numbers in runs.items():
        rows = tuple(result.rows[n] for n in numbers)
        if result.measure == "work":
            good = [row["work"] for row in rows if row["solved"]]
        else:
            good = [row[result.measure] for row in rows if not row["diverged"]]
        failures = len(rows) - len(good)
        counts = good and (result.measure == "work" or not failures)
        mean = float(np.mean(good)) if counts else math.inf
        point = Point(
            label, dict(values), tuple(numbers), rows, failures, mean if mean == mean else math.inf
        )
        found[label] = (*found.get(label, ()), point)
    return found


def best_points(result: SweepResult) -> tuple[Point, ...]:
    """The best point of each optimiser, the best of them first.

    On data the lowest mean over the seeds is best, of points that were not dropped and did not
    diverge with any seed; an optimiser without such a point has none here. On a surface it is the
    least number of failures and then the least work.
    """
    is_surface = result.measure == "work"

    def place(point: Point) -> tuple[float, ...]:
        return (point.failures if is_surface else 0, point.mean)

    best = []
    for points in points_of(result).values():
        able = [p for p in points if math.isfinite(p.mean) and not p.dropped]
        best += [min(able, key=place)] if able else []
    return tuple(sorted(best, key=place))


def _solver(
    surface: Surface, group: _Group, max_steps: int, tol: float
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    def solve(values: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
        tx = group.built(values)
        solution = minimize(surface.fn, start, tx, tol=tol, max_steps=max_steps)
        names = ("value", "steps", "evaluations", "curvature_products", "status")
        x, y = solution.params
        return {"x": x, "y": y} | {name: getattr(solution, name) for name in names}

    return solve


def _columns(member: Member) -> Row:
    """What a row tells of a member itself; a hyperparameter named as another column gets a dot."""
    return {"optimizer": member.label} | {
        f"optimizer.{path}" if path in _RESERVED else path: value
        for path, value in member.values.items()
    }


def _first_row(member: Member) -> Row:
    nothing = {"epochs": 0, "steps": 0, "diverged": False, "dropped": False}
    nothing |= {"seconds": 0.0, "cost": math.nan}
    return _columns(member) | {"seed": member.seed} | nothing


def _count(row: Row, cost: float, steps: int, seconds: float) -> None:
    """Adds an epoch to a row, in place."""
    row["seconds"] += seconds
    row["diverged"] = not math.isfinite(cost)
    if not row["diverged"]:
        row["cost"] = float(cost)
        row["epochs"] += 1
        row["steps"] += steps


def _groups(tables: Mapping[str, Table], members: Sequence[Member]) -> Iterator[_Group]:
    """The members by optimiser and by the numbers that set shapes."""
    found: dict[Any, list[int]] = {}
    for number, member in enumerate(members):
        shapes = optimizers.numbers(tables[member.label])
        static = tuple((path, v) for path, v in member.values.items() if shapes.get(path))
        traced = tuple(path for path in member.values if not shapes.get(path))
        found.setdefault((member.label, static, traced), []).append(number)
    for (label, static, traced), numbers in found.items():
        table = substitute(tables[label], dict(static))
        whole = (p for p in traced if all(type(members[n].values[p]) is int for n in numbers))
        yield _Group(label, table, traced, frozenset(whole), tuple(numbers))


class _Programs(NamedTuple):
    """What is compiled for a group; all but the data are of a block of members."""

    start: Callable[[jax.Array, jax.Array], TrainState]  #: values, seeds -> state
    epoch: Any  #: values, alive, state, data -> alive, state, cost; jitted, state donated
    metrics: Callable[[TrainState, Mapping[str, Examples]], dict[str, dict[str, jax.Array]]]
    has_own_key: bool  #: whether each member has a random key of its own
    compiled: dict[int, Any]  #: ``epoch`` for blocks of so many lanes


class _Firsts(NamedTuple):
    """What the seeds begin with, seed by seed."""

    params: PyTree
    keys: jax.Array  # raw data of the keys that batches and dropout follow from


def _first_states(task: Task, seeds: Sequence[int], mesh: Mesh) -> _Firsts:
    """Made once for all optimisers, as compiling random numbers takes longer than all else."""

    @jax.jit
    def first(seed: jax.Array) -> _Firsts:
        init_key, key = jax.random.split(jax.random.key(seed))
        return _Firsts(task.init(init_key), jax.random.key_data(key))

    found = [jax.device_get(first(jnp.asarray(seed, jnp.int32))) for seed in seeds]
    return jax.tree.map(lambda *xs: _put(np.stack(xs), mesh, PartitionSpec()), *found)


def _programs(
    task: Task,
    group: _Group,
    settings: Settings,
    mesh: Mesh,
    seeds: Sequence[int],
    firsts: _Firsts,
    vary: Vary,
) -> _Programs:
    has_own_key = vary != "initialisation"
    state_axes: Any = TrainState(*cast(Any, (0, 0, None, 0 if has_own_key else None)))

    def start(values: jax.Array, seed: jax.Array, firsts: _Firsts) -> TrainState:
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

    begin = across(start, (0, 0, None), state_axes)
    return _Programs(
        lambda values, seeds: begin(values, seeds, firsts),
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


def _compile(program: _Programs, blocks: Sequence[_Block], train: Examples) -> float:
    """Compiles what is not, and returns the seconds it took."""
    started = time.perf_counter()
    for block in blocks:
        if len(block.members) not in program.compiled:
            lowered = program.epoch.lower(block.values, block.alive, block.state, train)
            program.compiled[len(block.members)] = lowered.compile()
    return time.perf_counter() - started


def _advance(program: _Programs, block: _Block, train: Examples) -> tuple[_Block, np.ndarray]:
    """The block after one more epoch, and the cost of each of its members."""
    run = program.compiled[len(block.members)]
    alive, state, cost = run(block.values, block.alive, block.state, train)
    block = block._replace(alive=alive, state=state)
    return block, _read(cost)[block.members >= 0]


def _metrics(program: _Programs, block: _Block, parts: Mapping[str, Examples]) -> dict[int, Row]:
    """Each member's metrics at the parameters to evaluate."""
    every = program.metrics(block.state, parts)
    means = {
        f"{part}_{name}": _read(every[part][name])
        for part in parts
        for name in METRICS
        if name in every[part]
    }
    return {
        int(number): {name: float(values[lane]) for name, values in means.items()}
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


# -- checkpoints


def _snapshot(
    number: int, told: Row, costs: np.ndarray, blocks: Sequence[_Block], mesh: Mesh
) -> Snapshot:
    """Where a sweep stands; without blocks the next program is to begin."""
    if not blocks:
        told = told | {"group": told["group"] + 1, "epoch": 0}
    lanes = [block.members.tolist() for block in blocks]
    told = told | {"devices": mesh.devices.size, "blocks": lanes}
    states = [(block.alive, block.state) for block in blocks]
    return Snapshot(number, told, (costs.astype(np.float32), states))


def _restored(
    snapshot: Snapshot,
    groups: Sequence[_Group],
    programs: Sequence[_Programs],
    members: Sequence[Member],
    mesh: Mesh,
    costs: np.ndarray,
) -> tuple[np.ndarray, list[_Block]]:
    """The costs and the blocks that a snapshot was made of."""
    told = snapshot.told
    if told.get("devices") != mesh.devices.size:
        raise CheckpointError(f"it is of a sweep on {told.get('devices')} devices")
    blocks = []
    for numbers in map(np.asarray, told["blocks"]):
        program, group = programs[told["group"]], groups[told["group"]]
        blocks.append(_start(program, group, members, numbers[numbers >= 0], len(numbers), mesh))
    like = [(block.alive, block.state) for block in blocks]
    found, states = fit(snapshot.arrays, (costs.astype(np.float32), like))
    states = jax.tree.map(lambda x, start: jax.device_put(x, start.sharding), states, like)
    restored = [
        block._replace(alive=alive, state=state)
        for block, (alive, state) in zip(blocks, states, strict=True)
    ]
    return np.array(found, np.float64), restored
