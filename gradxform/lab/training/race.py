"""The race: trains every optimiser from the same start on the same batches."""

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import optax
from jax.sharding import NamedSharding

from gradxform.lab.data.sets import Dataset
from gradxform.lab.experiment.experiment import Experiment, prepared
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.problems import ConfigError, Problem
from gradxform.lab.experiment.schema import Config
from gradxform.lab.tasks.task import Examples, Task
from gradxform.lab.training.batching import Order, steps_per_epoch
from gradxform.lab.training.checkpoints import (
    CheckpointError,
    OnState,
    Snapshot,
    fit,
    of_this_version,
)
from gradxform.lab.training.epoch import (
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
from gradxform.lab.training.records import race_rows
from gradxform.lab.training.settings import Settings, collecting, settings_of
from gradxform.tree import PyTree

OnRow = Callable[[str, Row], None]
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
    resume: Snapshot | None = None,
    devices: Devices | None = None,
) -> RaceResult:
    """Runs a config's optimisers on its task.

    Args:
      config: the config, or the experiment that was prepared from it.
      data: for a task on data, its data set (see :func:`gradxform.lab.data.sets.load`), or the task
        that :func:`task_of` makes, with its data on the host or on the same ``devices``.
      on_row: called with the optimiser's label and each new row of its metrics.
      on_state: see :func:`race_on_task`; ignored on a surface.
      resume: see :func:`race_on_task`; ignored on a surface.
      devices: see :func:`race_on_task`; ignored on a surface.

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
        return run(experiment, data, on_row, on_state=on_state, resume=resume, devices=devices)


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
    resume: Snapshot | None = None,
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
      resume: a snapshot of an interrupted race with the same arguments, on any devices. The race
        continues to the same numbers, except for times.
      devices: devices, of all processes, that share the data and each batch; by default the first
        device of this process. Results match one device up to rounding. If the number of devices
        does not divide the batch, ``curvature_batch_size`` may also draw examples of weight zero.

    Raises:
      ConfigError: a transformation fails on this task's parameters.
      CheckpointError: ``resume`` belongs to another race.
      ValueError: an override has an unknown label or argument.
    """
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    mesh = batch_mesh(devices)
    parts = {name: to_device(part, mesh) for name, part in splits.items() if part is not None}
    train = parts["train"]
    whole = NamedSharding(mesh, WHOLE)
    common = Settings(epochs, batch_size, order, max_seconds)
    settings = settings_of(common, overrides or {}, transformations, train.size)

    init_key, key = jax.random.split(jax.random.key(seed))
    params = jax.jit(task.init)(init_key)

    @functools.partial(jax.jit, out_shardings=whole)
    def evaluation(params: PyTree, parts: dict[str, Examples]) -> dict[str, dict[str, jax.Array]]:
        return {name: evaluate(task, params, part, mesh=mesh) for name, part in parts.items()}

    problems: list[Problem | str] = []
    programs = {}
    for label, tx in transformations.items():
        with collecting(problems, f"optimizers.{label}"):
            own = {"batch_size": settings[label].batch_size, "order": settings[label].order}
            one = make_epoch(task, tx, **own, mesh=mesh)
            state = jax.eval_shape(lambda tx=tx: init_state(tx, params, key))
            state = jax.tree.map(lambda x: x.update(sharding=whole), state)
            program = jax.jit(one, donate_argnums=0, out_shardings=whole)
            programs[label] = program.trace(state, train)
    if problems:
        raise ConfigError(task.name, problems)

    # also starts the threads, which would otherwise count as time of the first optimiser
    at_start = jax.device_get(evaluation(put_all(params, mesh), parts))
    first_loss = float(at_start["train"]["loss"])
    metrics = list(itertools.product(parts, in_order(at_start["train"])))
    histories: list[History] = []
    going_on: History | None = None
    restored: TrainState | None = None
    if resume is not None:
        with of_this_version():
            epochs_of = {label: own.epochs for label, own in settings.items()}
            columns = {*_COLUMNS, *(f"{part}_{name}" for part, name in metrics)}
            histories, restored = _restored(resume, programs, epochs_of, columns)
        going_on = histories.pop() if restored is not None else None

    def run(label: str, tx: optax.GradientTransformation) -> History:
        epochs, batch_size, _, max_seconds = settings[label]
        steps = steps_per_epoch(train.size, batch_size)
        started = time.perf_counter()
        epoch = programs[label].lower().compile()
        compile_seconds = time.perf_counter() - started
        if going_on is not None and label == going_on.label:
            state, rows = restored, list(going_on.rows)
        else:
            state, rows = init_state(tx, params, key), []
        spare = state if _bytes(state) <= _SPARE else None
        state = put_all(state, mesh)
        seconds, gradients = (rows[-1][k] if rows else 0.0 for k in ("seconds", "gradients"))
        while True:
            number = len(rows) + 1
            started = time.perf_counter()
            state, result = jax.block_until_ready(epoch(state, train))
            elapsed = of_first(time.perf_counter() - started, mesh)
            if spare is not None and elapsed < QUICK:
                state = put_all(spare, mesh)
                started = time.perf_counter()
                state, result = jax.block_until_ready(epoch(state, train))
                elapsed = of_first(time.perf_counter() - started, mesh)
            spare = None
            seconds += elapsed
            gradients += float(result.work) * batch_size / train.size
            means = jax.device_get(evaluation(result.params, parts))
            row = {"epoch": number, "step": number * steps}
            row |= {"seconds": seconds, "gradients": gradients, "cost": float(result.cost)}
            row |= {f"{part}_{name}": float(means[part][name]) for part, name in metrics}
            rows.append(row | {"steps_per_second": steps / elapsed})
            if on_row is not None:
                on_row(label, rows[-1])
            lost = not bool(result.finite) or not math.isfinite(row["train_loss"])
            diverged = lost or ran_away(row["train_loss"], first_loss)
            over = lost or seconds > max_seconds or number == epochs
            ran = functools.partial(_history, label, rows, diverged, compile_seconds, result.params)
            if on_state is not None:
                done = sum(len(earlier.rows) for earlier in histories) + number
                next_state = None if over else state
                on_state(done, functools.partial(_snapshot, done, histories, ran, next_state))
            if over:
                return ran()

    for label, tx in list(transformations.items())[len(histories) :]:
        histories.append(run(label, tx))
    return RaceResult(task.name, "train_loss", tuple(histories), task.unit)


def _bytes(state: PyTree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def _history(
    label: str, rows: Sequence[Row], diverged: bool, compile_seconds: float, params: PyTree
) -> History:
    rate = statistics.median(row["steps_per_second"] for row in rows)
    return History(label, tuple(rows), diverged, rate, compile_seconds, params)


def _snapshot(
    done: int, before: Sequence[History], last: Callable[[], History], state: TrainState | None
) -> Snapshot:
    """The state of a race; ``state`` belongs to the last optimiser if it is unfinished."""
    histories = [*before, last()]
    told = {
        "histories": [history._replace(params=None)._asdict() for history in histories],
        "goes_on": state is not None,
    }
    return Snapshot(done, told, ([history.params for history in histories], state))


def _restored(
    snapshot: Snapshot,
    programs: Mapping[str, Any],
    epochs: Mapping[str, int],
    columns: Iterable[str],
) -> tuple[list[History], TrainState | None]:
    """The histories and the training state in a snapshot."""
    rows = race_rows(snapshot.told, epochs)
    if rows[0][1].keys() != set(columns):
        raise CheckpointError(f"it has the columns {', '.join(rows[0][1])}")
    histories = [History(**told) for told in snapshot.told["histories"]]
    labels = [history.label for history in histories]
    likes = [programs[label].out_info for label in labels]
    state = likes[-1][0] if snapshot.told["goes_on"] else None
    params, state = fit(snapshot.arrays, ([result.params for _, result in likes], state))
    restored = [
        history._replace(rows=tuple(history.rows), params=end)
        for history, end in zip(histories, params, strict=True)
    ]
    return restored, state
