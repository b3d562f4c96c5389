"""The sweep: trains many hyperparameters and seeds of an optimiser in one compiled program."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.lab.data.sets import Dataset
from gradxform.lab.experiment.experiment import Experiment
from gradxform.lab.experiment.grid import Member, Table
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.load import require_sweep, sweep_members
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.experiment.schema import Config, SurfaceConfig, TaskConfig
from gradxform.lab.tasks.surfaces import SURFACES, Surface
from gradxform.lab.tasks.task import Examples, Task
from gradxform.lab.training.batching import Order, steps_per_epoch
from gradxform.lab.training.blocks import (
    Block,
    Firsts,
    Group,
    Row,
    Vary,
    advance,
    check_memory,
    compile_epoch,
    first_blocks,
    first_states,
    groups_of,
    metrics_of,
    programs_of,
    regroup,
    restored,
    snapshot_of,
)
from gradxform.lab.training.checkpoints import OnState, Snapshot, of_this_version
from gradxform.lab.training.epoch import METRICS, evaluate, to_every_device
from gradxform.lab.training.processes import mesh_of, read
from gradxform.lab.training.race import (
    Settings,
    collecting,
    precision_of,
    ran_away,
    settings_of,
    task_of,
)
from gradxform.lab.training.records import check_sweep
from gradxform.minimization import minimize
from gradxform.solution import Status
from gradxform.tree import PyTree

OnEpoch = Callable[[str, int, Mapping[int, Row]], None]

_SOLVED = 1e-3  # tolerance above a surface's minimum; its saddles and plateaus are higher
_RESERVED = (
    *("optimizer", "seed", "epochs", "steps", "diverged", "dropped", "seconds", "cost"),
    *("x0", "y0", "x", "y", "value", "evaluations", "curvature_products", "work", "status"),
)


class SweepResult(NamedTuple):
    """The results of all members of a sweep."""

    name: str
    measure: Literal["validation_loss", "train_loss", "work"]  #: the metric that compares members
    unit: str  #: unit of the measure, in words
    members: tuple[Member, ...]
    rows: tuple[Row, ...]
    """one row per member: ``optimizer``, its hyperparameters, ``seed``, the ``epochs`` and
    ``steps`` that it ran, ``diverged``, ``dropped``, its share of the ``seconds``, the ``cost`` of
    its last epoch, and the final metrics. For a surface see :func:`sweep_on_surface`.
    ``pandas.DataFrame(result.rows)`` is a tidy table"""
    costs: np.ndarray
    """training cost of every epoch, (members, epochs), NaN for epochs that did not run; there are
    no epochs on a surface"""
    seconds: float  #: training time, without compilation and evaluation
    compile_seconds: float


class Point(NamedTuple):
    """All runs with the same hyperparameters."""

    label: str  #: label of the optimiser
    values: Mapping[str, float]  #: hyperparameters, by dotted path in the optimiser's table
    numbers: tuple[int, ...]  #: numbers of its members
    rows: tuple[Row, ...]  #: rows of its members
    failures: int  #: members that diverged or, on a surface, were not solved
    mean: float
    """mean of the measure over its members, on a surface over the solved ones; infinite if a member
    diverged, or none was solved"""

    @property
    def dropped(self) -> bool:
        """Whether a rung ended it early because other points were better."""
        return any(row.get("dropped") for row in self.rows)


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
    run = at(kind_of(given).sweep)
    with precision_of(given):
        return run(given, data, on_epoch, on_state=on_state, resume=resume)


def sweep_over_surface(
    config: SurfaceConfig, data: None = None, on_epoch: OnEpoch | None = None, **_: Any
) -> SweepResult:
    """The sweep of a config whose task is a surface; see :func:`sweep`."""
    table, surface = require_sweep(config).model_dump(), SURFACES[config.task.surface]
    starts = table["starts"] or [config.task.start or surface.start]
    return sweep_on_surface(
        surface,
        config.optimizers,
        sweep_members(config),
        starts=grid_of_starts(surface, **starts) if isinstance(starts, dict) else starts,
        max_steps=config.training.steps,
        tol=table["tol"],
        on_epoch=on_epoch,
    )


def sweep_on_data(
    config: TaskConfig,
    data: Dataset | None = None,
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> SweepResult:
    """The sweep of a config whose task is a net on data; see :func:`sweep`."""
    table, members = require_sweep(config), sweep_members(config)
    if data is None:
        raise ValueError(f"sweep needs data=load({config.task.dataset!r})")
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
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    mesh = mesh_of("member", jax.devices())
    parts = {name: to_every_device(part, mesh) for name, part in splits.items() if part is not None}
    size = parts["train"].size
    common = Settings(epochs, batch_size, order, math.inf)
    settings = settings_of(common, overrides or {}, tables, size)
    measure = "validation_loss" if "validation" in parts else "train_loss"
    rows: dict[int, Row] = {}
    costs = np.full((len(members), max(s.epochs for s in settings.values())), np.nan)
    seconds = compile_seconds = 0.0

    problems: list[Problem | str] = []
    groups, programs = tuple(groups_of(tables, members)), []
    started = time.perf_counter()
    seeds = sorted({0, *(member.seed for member in members)})
    firsts = first_states(task, [seed + number for number in seeds], mesh)
    compile_seconds += time.perf_counter() - started
    for group in groups:
        with collecting(problems, f"optimizers.{group.label}"):
            own = settings[group.label]
            programs.append(programs_of(task, group, own, mesh, seeds, firsts, vary))
            check_memory(programs[-1], group, parts["train"], mesh)
    if problems:
        raise ConfigError(task.name, problems)

    first_losses = _first_losses(task, firsts, parts["train"])
    start_of = {n: first_losses[0 if vary == "order" else i] for i, n in enumerate(seeds)}
    first = done = lanes = 0
    blocks: list[Block] = []
    if resume is not None:
        with of_this_version():
            firsts_of = [first_row(member) for member in members]
            lasts = [settings[group.label].epochs for group in groups]
            own = [group.members for group in groups]
            rows |= check_sweep(
                resume.told, firsts_of, own, lasts, _metric_columns(task, parts, firsts.params)
            )
            state = parts["train"], mesh, costs, block_size
            costs, lanes, blocks = restored(resume, groups, programs, members, *state)
            first, done = (resume.told[name] for name in ("group", "epoch"))
            seconds, compile_seconds = (resume.told[n] for n in ("seconds", "compile_seconds"))

    for i, (group, program) in list(enumerate(zip(groups, programs, strict=True)))[first:]:
        if not blocks:
            started = time.perf_counter()
            lanes, blocks = first_blocks(program, group, members, parts["train"], mesh, block_size)
            compile_seconds += time.perf_counter() - started
            rows |= {number: first_row(members[number]) for number in group.members}
        last = settings[group.label].epochs
        steps = steps_per_epoch(size, settings[group.label].batch_size)
        for epoch in range(done + 1, last + 1):
            compile_seconds += compile_epoch(program, blocks, parts["train"])
            started = time.perf_counter()
            for j, block in enumerate(blocks):
                blocks[j], cost = advance(program, block, parts["train"])
                costs[block.members[block.members >= 0], epoch - 1] = cost
            elapsed = time.perf_counter() - started
            seconds += elapsed
            training = [int(n) for block in blocks for n in block.members if n >= 0]
            for number in training:
                _count(rows[number], costs[number, epoch - 1], steps, elapsed / len(training))
            if epoch == last or epoch in rungs:
                for block in blocks:
                    for number, found in metrics_of(program, block, parts).items():
                        rows[number] |= {"dropped": epoch != last, **found}
                        start = start_of[members[number].seed]
                        rows[number]["diverged"] |= ran_away(found["train_loss"], start)
            if on_epoch is not None:
                on_epoch(group.label, epoch, {number: rows[number] for number in training})
            if epoch != last and epoch in rungs:
                kept = _better_points(members, rows, training, measure, keep)
                blocks = regroup(program, blocks, kept, lanes, mesh)
            if on_state is not None:
                told = {"group": i, "epoch": epoch, "rows": rows}
                told |= {"seconds": seconds, "compile_seconds": compile_seconds}
                number = sum(settings[earlier.label].epochs for earlier in groups[:i]) + epoch
                going_on = blocks if epoch != last else []
                take = functools.partial(snapshot_of, number, told, costs, program, going_on)
                on_state(number, take)
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
    """Minimises a surface with every member; members of one optimiser share a vmapped program.

    A row contains ``optimizer``, its hyperparameters, the start ``x0``, ``y0``, and the best point
    ``x``, ``y`` of :func:`gradxform.minimize` with its ``value``. Then come the ``steps``,
    ``evaluations`` and ``curvature_products``, ``work`` (the sum of the latter two), the
    ``status``, and ``solved``: whether it converged to a minimum of the surface, not to a saddle.

    Args:
      surface: the function.
      tables: the tables of the optimisers, as in a config, by label.
      members: the runs, see :func:`gradxform.lab.experiment.grid.members`; a member's seed is the
        number of its start.
      starts: pairs of numbers.
      max_steps: the largest number of updates.
      tol: a run has converged when no gradient entry exceeds this.
      on_epoch: see :func:`sweep`.

    Returns:
      The result; members are compared by their work.

    Raises:
      ConfigError: an optimiser cannot be built or fails on a point.

    >>> from gradxform.lab.experiment.grid import Member
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
    groups, programs = tuple(groups_of(tables, members)), []
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
    """Starts on a square grid over the ``bounds`` of a surface, in the middles of equal cells.

    Args:
      surface: the surface.
      points: points per side.

    >>> grid_of_starts(SURFACES["saddle"], 2)
    ((-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
    """
    x, y = (
        [low + (high - low) * (i + 0.5) / points for i in range(points)]
        for low, high in surface.bounds
    )
    return tuple((a, b) for b in y for a in x)


def points_of(result: SweepResult) -> dict[str, tuple[Point, ...]]:
    """The points of each optimiser by label, in the order of their members."""
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
    """The best point of each optimiser, best first.

    On data the point with the lowest mean over the seeds is best. Points that were dropped, or that
    diverged with some seed, do not count; an optimiser with no other points is left out. On a
    surface the fewest failures come first, then the least work.
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
    surface: Surface, group: Group, max_steps: int, tol: float
) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    def solve(values: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
        tx = group.built(values)
        solution = minimize(surface.fn, start, tx, tol=tol, max_steps=max_steps)
        names = ("value", "steps", "evaluations", "curvature_products", "status")
        x, y = solution.params
        return {"x": x, "y": y} | {name: getattr(solution, name) for name in names}

    return solve


def _columns(member: Member) -> Row:
    """The columns of a member's hyperparameters; a name that is taken gets a prefix."""
    return {"optimizer": member.label} | {
        f"optimizer.{path}" if path in _RESERVED else path: value
        for path, value in member.values.items()
    }


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
    return {f"{part}_{name}" for part in parts for name in METRICS if name in shapes[part]}


def first_row(member: Member) -> Row:
    """The row of a member before its first epoch."""
    nothing = {"epochs": 0, "steps": 0, "diverged": False, "dropped": False}
    nothing |= {"seconds": 0.0, "cost": math.nan}
    return _columns(member) | {"seed": member.seed} | nothing


def _count(row: Row, cost: float, steps: int, seconds: float) -> None:
    """Adds an epoch to a row in place."""
    row["seconds"] += seconds
    row["diverged"] = not math.isfinite(cost)
    if not row["diverged"]:
        row["cost"] = float(cost)
        row["epochs"] += 1
        row["steps"] += steps


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
