"""The race: trains every optimiser from the same start on the same batches."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from gradxform.lab.data.sets import Dataset
from gradxform.lab.experiment.experiment import Experiment, prepared
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.experiment.schema import Config
from gradxform.lab.tasks.task import Examples, Task
from gradxform.lab.training.batching import Order, steps_per_epoch
from gradxform.lab.training.checkpoints import OnState, Snapshot, of_this_version
from gradxform.lab.training.epoch import (
    Epoch,
    TrainState,
    batch_mesh,
    evaluate,
    in_order,
    init_state,
    make_epoch,
    to_device,
)
from gradxform.lab.training.outcomes import History, RaceResult, Row, ran_away
from gradxform.lab.training.processes import WHOLE, Devices, of_first, put_all
from gradxform.lab.training.race_states import (
    Begun,
    begun,
    ended_snapshot,
    history_of,
    race_snapshot,
)
from gradxform.lab.training.settings import Settings, collecting, settings_of
from gradxform.tree import PyTree

OnRow = Callable[[str, Row], None]
OnEnd = Callable[[str, Callable[[], Snapshot]], None]
Transformations = Mapping[str, optax.GradientTransformation]

QUICK = 0.2  # seconds; a shorter first epoch is mostly start-up time
_SPARE = 2**26  # bytes; a smaller state is kept twice during the first epoch


_COLUMNS = ("epoch", "step", "seconds", "gradients", "cost", "steps_per_second")


def race(
    config: Config | Experiment,
    data: Dataset | Task | None = None,
    on_row: OnRow | None = None,
    *,
    on_state: OnState | None = None,
    on_end: OnEnd | None = None,
    resume: Snapshot | None = None,
    ended: Mapping[str, Snapshot] | None = None,
    devices: Devices | None = None,
) -> RaceResult:
    """Runs a config's optimisers on its task.

    Args:
      config: the config, or the experiment that was prepared from it.
      data: for a task on data, its data set (see :func:`gradxform.lab.data.sets.load`), or the task
        that :func:`task_of` makes, with its data on the host or on the same ``devices``.
      on_row: called with the optimiser's label and each new row of its metrics.
      on_state: see :func:`race_on_task`; ignored on a surface, as are the next four.
      on_end: see :func:`race_on_task`.
      resume: see :func:`race_on_task`.
      ended: see :func:`race_on_task`.
      devices: see :func:`race_on_task`.

    Raises:
      ConfigError: optimisers cannot be built or do not fit the task. The error lists all problems.
      CheckpointError: ``resume`` belongs to another race.
      ModelError: the model does not fit the data.
      DataError: the validation split leaves nothing to train on or to validate with.

    >>> from gradxform.lab.experiment.load import parse_config
    >>> config = parse_config({
    ...     "name": "walk", "task": {"kind": "surface", "surface": "saddle", "start": [1, 0]},
    ...     "training": {"steps": 2}, "optimizers": {"a": {"method": "sgd", "learning_rate": 0.25}},
    ... })
    >>> race(config).histories[0].rows[-1]
    {'step': 2, 'value': 0.0625, 'x0': 0.25, 'x1': 0.0}
    """
    given = config.config if isinstance(config, Experiment) else config
    run = at(kind_of(given).race)
    with precision_of(given):
        experiment = prepared(config)
        states = {"on_state": on_state, "on_end": on_end, "resume": resume, "ended": ended}
        return run(experiment, data, on_row, **states, devices=devices)


def precision_of(config: Config) -> contextlib.AbstractContextManager[None]:
    """float64 for an equation, whose solution is wanted to many digits; otherwise as JAX is set."""
    return jax.enable_x64(True) if kind_of(config).is_float64 else contextlib.nullcontext()


def race_on_data(
    experiment: Experiment,
    data: Dataset | Task | None = None,
    on_row: OnRow | None = None,
    **options: Any,
) -> RaceResult:
    """The race of a config whose task is a net on data; see :func:`race`."""
    config: Any = experiment.config
    training = config.training.model_dump(exclude_none=True)
    return race_on_task(
        data if isinstance(data, Task) else task_of(config, data),
        experiment.transformations,
        seed=config.seed,
        on_row=on_row,
        **options,
        **training,
    )


def task_of(config: Config, data: Dataset | None = None) -> Task:
    """The task of a config.

    Args:
      config: a config whose task uses data.
      data: the data set that it names; if not given, it is read.

    Raises:
      ModelError: the model does not fit the data.
      DataError: the validation split leaves nothing to train on or to validate with.
    """
    kind = kind_of(config)
    if kind.task is None or kind.data is None:
        raise ValueError(f"task_of(config={config.name!r}): a task of this kind has no data")
    return at(kind.task)(config.task, at(kind.data)(config.task) if data is None else data)


def race_on_task(
    task: Task,
    transformations: Transformations,
    *,
    epochs: int,
    batch_size: int | Literal["full"] = 128,
    order: Order = "reshuffle",
    max_seconds: float = math.inf,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    on_row: OnRow | None = None,
    on_state: OnState | None = None,
    on_end: OnEnd | None = None,
    resume: Snapshot | None = None,
    ended: Mapping[str, Snapshot] | None = None,
    devices: Devices | None = None,
) -> RaceResult:
    """Trains a task's model with each transformation, from the same start on the same batches.

    Dropout also draws the same units for all. A row contains

    - ``epoch``, and ``step``, the number of updates so far;
    - ``seconds`` of training so far, without compilation and evaluation. The first run of a program
      starts threads, so a first epoch of less than 0.2 s runs twice and the second run is timed;
    - ``gradients``, the work so far, in gradients of the full training part. A batch's gradient
      counts as its share of the examples. So do the curvature products and evaluations that a
      method reports in its ``info``, unless it reports ``gradient_equivalents``;
    - ``cost``, the training loss averaged over the epoch's batches;
    - loss and accuracy or error of the training, validation and test parts after the epoch
      (``train_loss``, …), at ``gradxform.eval_params`` and without dropout and penalty;
    - ``steps_per_second``.

    Args:
      task: model, loss and data; the data are on the host or, after
        :func:`gradxform.lab.training.epoch.on_devices`, on the same ``devices``.
      transformations: the transformations by label.
      epochs: passes over the training part.
      batch_size: examples in a batch, at most all of them, or ``"full"`` for all.
      order: how batches are drawn.
      max_seconds: training stops after the first epoch at which ``seconds`` exceeds this.
      overrides: by label, different values of the four arguments above. An optimiser with its own
        ``batch_size`` or ``order`` sees different batches.
      seed: seed of initial parameters, batches and dropout.
      on_row: called with the label and each row.
      on_state: called after each epoch, for checkpoints.
      on_end: called at the end of each optimiser, with its label and a maker of a snapshot.
      resume: a snapshot of an interrupted race with the same arguments, on any devices. The race
        continues to the same numbers, except for times. ``epochs`` may be larger than before.
      ended: by label, the snapshots of ``on_end``, from which optimisers train for more epochs.
      devices: devices, of all processes, that share the data and each batch; by default the first
        device of this process. Results match one device up to rounding. If the number of devices
        does not divide the batch, ``curvature_batch_size`` may also draw examples of weight zero.

    Raises:
      ConfigError: a transformation fails on this task's parameters.
      CheckpointError: ``resume`` belongs to another race.
      ValueError: an override has an unknown label or argument.
    """
    mesh = batch_mesh(devices)
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    parts = {name: to_device(part, mesh) for name, part in splits.items() if part is not None}
    common = Settings(epochs, batch_size, order, max_seconds)
    settings = settings_of(common, overrides or {}, transformations, parts["train"].size)
    init_key, key = jax.random.split(jax.random.key(seed))
    params = jax.jit(task.init)(init_key)
    first = {
        label: functools.partial(init_state, tx, params, key)
        for label, tx in transformations.items()
    }
    programs = _traced(task, transformations, settings, first, parts["train"], mesh)
    evaluation = _evaluation(task, parts, mesh)
    # also starts the threads, which would otherwise count as time of the first optimiser
    at_start = evaluation(put_all(params, mesh))
    course = _Course(mesh, parts["train"], evaluation, at_start["train_loss"])
    done: dict[str, Begun] = {}
    if resume is not None or ended:
        with of_this_version():
            columns = {*_COLUMNS, *at_start}
            done = begun(resume, ended or {}, programs, settings, columns)
    histories: list[History] = []
    for label, program in programs.items():
        if label in done and done[label].state is None:
            histories.append(done[label].history)
            continue
        tell = _Telling(tuple(histories), on_row, on_state, on_end)
        start = done.get(label) or first[label]
        histories.append(_train(course, label, program, settings[label], start, tell))
    return RaceResult(task.name, "train_loss", tuple(histories), task.unit)


class _Course(NamedTuple):
    """What all optimisers of a race share."""

    mesh: Mesh
    train: Examples
    evaluation: Callable[[PyTree], Row]  # parameters -> metrics of all parts of the data
    first_loss: float  # the training loss at the start


class _Telling(NamedTuple):
    """Whom an optimiser tells of its progress."""

    before: tuple[History, ...]  # of the earlier optimisers
    on_row: OnRow | None
    on_state: OnState | None
    on_end: OnEnd | None


def _traced(
    task: Task,
    transformations: Transformations,
    settings: Mapping[str, Settings],
    first: Mapping[str, Callable[[], TrainState]],
    train: Examples,
    mesh: Mesh,
) -> dict[str, Any]:
    """The program of an epoch of each optimiser; one error tells all that is wrong with them."""
    problems: list[Problem | str] = []
    programs = {}
    whole = NamedSharding(mesh, WHOLE)
    for label, tx in transformations.items():
        with collecting(problems, f"optimizers.{label}"):
            own = {"batch_size": settings[label].batch_size, "order": settings[label].order}
            epoch = make_epoch(task, tx, **own, mesh=mesh)
            state = jax.eval_shape(first[label])
            state = jax.tree.map(lambda x: x.update(sharding=whole), state)
            program = jax.jit(epoch, donate_argnums=0, out_shardings=whole)
            programs[label] = program.trace(state, train)
    if problems:
        raise ConfigError(task.name, problems)
    return programs


def _evaluation(
    task: Task, parts: dict[str, Examples], mesh: Mesh
) -> Callable[[PyTree], dict[str, float]]:
    """A function of the parameters that returns the metrics of all parts, as columns of a row."""

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, WHOLE))
    def means(params: PyTree, parts: dict[str, Examples]) -> dict[str, dict[str, jax.Array]]:
        return {name: evaluate(task, params, part, mesh=mesh) for name, part in parts.items()}

    def columns(params: PyTree) -> dict[str, float]:
        found = jax.device_get(means(params, parts))
        return {
            f"{part}_{name}": float(found[part][name])
            for part in parts
            for name in in_order(found[part])
        }

    return columns


def _train(
    course: _Course,
    label: str,
    program: Any,
    settings: Settings,
    start: Begun | Callable[[], TrainState],
    tell: _Telling,
) -> History:
    """Trains one optimiser to its end."""
    steps = steps_per_epoch(course.train.size, settings.batch_size)
    started = time.perf_counter()
    epoch = program.lower().compile()
    compile_seconds = time.perf_counter() - started
    if isinstance(start, Begun):
        state, rows = start.state, list(start.history.rows)
    else:
        state, rows = start(), []
    spare = state if _bytes(state) <= _SPARE else None
    state = put_all(state, course.mesh)
    seconds, gradients = (rows[-1][k] if rows else 0.0 for k in ("seconds", "gradients"))
    while True:
        number = len(rows) + 1
        state, result, elapsed = _timed(epoch, state, spare, course)
        spare = None
        seconds += elapsed
        gradients += float(result.work) * settings.batch_size / course.train.size
        row = {"epoch": number, "step": number * steps}
        row |= {"seconds": seconds, "gradients": gradients, "cost": float(result.cost)}
        row |= course.evaluation(result.params)
        rows.append(row | {"steps_per_second": steps / elapsed})
        if tell.on_row is not None:
            tell.on_row(label, rows[-1])
        is_lost = not bool(result.finite) or not math.isfinite(row["train_loss"])
        diverged = is_lost or ran_away(row["train_loss"], course.first_loss)
        is_over = is_lost or seconds > settings.max_seconds or number == settings.epochs
        ran = functools.partial(history_of, label, rows, diverged, compile_seconds, result.params)
        if is_over and tell.on_end is not None:
            tell.on_end(label, functools.partial(ended_snapshot, ran, state, is_lost))
        if tell.on_state is not None:
            done = sum(len(earlier.rows) for earlier in tell.before) + number
            after = None if is_over else state
            tell.on_state(done, functools.partial(race_snapshot, done, tell.before, ran, after))
        if is_over:
            return ran()


def _timed(
    epoch: Any, state: TrainState, spare: TrainState | None, course: _Course
) -> tuple[TrainState, Epoch, float]:
    """One epoch and its seconds; with a spare state, a quick one runs again and is timed then."""
    started = time.perf_counter()
    state, result = jax.block_until_ready(epoch(state, course.train))
    elapsed = of_first(time.perf_counter() - started, course.mesh)
    if spare is not None and elapsed < QUICK:
        state = put_all(spare, course.mesh)
        started = time.perf_counter()
        state, result = jax.block_until_ready(epoch(state, course.train))
        elapsed = of_first(time.perf_counter() - started, course.mesh)
    return state, result, elapsed


def _bytes(state: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))
