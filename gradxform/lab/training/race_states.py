"""The state of a race in checkpoints: of all its optimisers so far, and of one at its end."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gradxform.lab.training.checkpoints import CheckpointError, Snapshot, fit
from gradxform.lab.training.epoch import TrainState
from gradxform.lab.training.outcomes import History, Row
from gradxform.lab.training.records import ended_rows, race_rows
from gradxform.lab.training.settings import Settings
from gradxform.tree import PyTree


class Begun(NamedTuple):
    """How far an optimiser of a resumed race has come."""

    history: History
    state: TrainState | None  #: where it continues; ``None`` if it has ended


def history_of(
    label: str, rows: Sequence[Row], diverged: bool, compile_seconds: float, params: PyTree
) -> History:
    """The history of these rows."""
    rate = statistics.median(row["steps_per_second"] for row in rows)
    return History(label, tuple(rows), diverged, rate, compile_seconds, params)


def race_snapshot(
    done: int, before: Sequence[History], last: Callable[[], History], state: TrainState | None
) -> Snapshot:
    """The state of a race; ``state`` belongs to the last optimiser if it is unfinished."""
    histories = [*before, last()]
    recorded = [_recorded(history) for history in histories]
    record = {"histories": recorded, "goes_on": state is not None}
    return Snapshot(done, record, ([history.params for history in histories], state))


def ended_snapshot(ran: Callable[[], History], state: TrainState, is_lost: bool) -> Snapshot:
    """The state of one optimiser at its end, from which it can train for more epochs.

    ``is_lost`` says that its loss or its parameters are not finite.
    """
    history = ran()
    record = {"history": _recorded(history), "is_lost": is_lost}
    return Snapshot(len(history.rows), record, (history.params, state))


def begun(
    resume: Snapshot | None,
    ended: Mapping[str, Snapshot],
    programs: Mapping[str, Any],
    settings: Mapping[str, Settings],
    columns: Iterable[str],
) -> dict[str, Begun]:
    """How far each optimiser has come, by label; those that have not begun are left out.

    Raises:
      CheckpointError: a snapshot belongs to another race.
    """
    found: dict[str, Begun] = {}
    if resume is not None:
        epochs = {label: own.epochs for label, own in settings.items()}
        histories, state = _restored(resume, programs, epochs, columns)
        found = {history.label: Begun(history, None) for history in histories}
        if state is not None:
            found[histories[-1].label] = Begun(histories[-1], state)
    for label, snapshot in ended.items():
        own = _ended(snapshot, label, programs[label], settings[label], columns)
        if label not in found or len(found[label].history.rows) <= len(own.history.rows):
            found[label] = own
    return found


def _recorded(history: History) -> dict[str, Any]:
    return history._replace(params=None)._asdict()


def _restored(
    snapshot: Snapshot,
    programs: Mapping[str, Any],
    epochs: Mapping[str, int],
    columns: Iterable[str],
) -> tuple[list[History], TrainState | None]:
    """The histories and the training state in a snapshot of a race."""
    _check_columns(race_rows(snapshot.record, epochs)[0][1], columns)
    histories = [History(**recorded) for recorded in snapshot.record["histories"]]
    likes = [programs[history.label].out_info for history in histories]
    state = likes[-1][0] if snapshot.record["goes_on"] else None
    params, state = fit(snapshot.arrays, ([result.params for _, result in likes], state))
    restored = [
        history._replace(rows=tuple(history.rows), params=end)
        for history, end in zip(histories, params, strict=True)
    ]
    return restored, state


def _ended(
    snapshot: Snapshot, label: str, program: Any, settings: Settings, columns: Iterable[str]
) -> Begun:
    """An optimiser at the end of its run; it continues if it may now train for longer."""
    rows = ended_rows(snapshot.record, label, settings.epochs)
    _check_columns(rows[0][1], columns)
    state, result = program.out_info
    params, state = fit(snapshot.arrays, (result.params, state))
    history = History(**snapshot.record["history"])
    history = history._replace(rows=tuple(history.rows), params=params)
    is_over = len(rows) == settings.epochs or rows[-1][1]["seconds"] > settings.max_seconds
    return Begun(history, None if is_over or snapshot.record["is_lost"] else state)


def _check_columns(row: Row, columns: Iterable[str]) -> None:
    if row.keys() != set(columns):
        raise CheckpointError(f"it has the columns {', '.join(row)}")
