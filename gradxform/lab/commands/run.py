"""``gradxform run``: a race."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gradxform.lab.commands import endings, logs, progress, resuming, session
from gradxform.lab.commands.request import Request, Resumed
from gradxform.lab.commands.session import Command
from gradxform.lab.experiment.kinds import kind_of

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.training.checkpoints import Snapshot
    from gradxform.lab.training.outcomes import Row
    from gradxform.lab.training.processes import Devices


@endings.interruptible()
def run(request: Request, *, loggers: Sequence[str] = ()) -> None:
    """Races the optimisers of a config, and leaves the results in a folder."""
    logs.check(loggers)
    with session.opened(request, Command("run", _begun, _on_devices)) as now:
        from gradxform.lab.report import files, tables
        from gradxform.lab.training.race import race

        rows: list[tuple[str, Row]] = now.rows or []
        config = now.experiment.config
        order = list(config.optimizers)

        def on_row(label: str, row: "Row") -> None:
            rows.append((label, row))
            advance(label, row)
            log(label, row)
            keeping.stop_if_asked()

        def csv() -> str:
            return files.metrics_csv(sorted(rows, key=lambda row: order.index(row[0])))

        with (
            session.training(now, "metrics.csv", csv) as keeping,
            logs.logging(loggers if now.writes else (), now.folder, config) as log,
            progress.of_race(config, now.is_quiet, rows) as advance,
        ):
            result = race(
                now.experiment,
                now.data,
                on_row,
                on_state=keeping.on_state,
                on_end=keeping.on_end,
                resume=now.snapshot,
                ended=now.ended,
                devices=now.devices,
            )
        extra = files.save(now.folder, config, result) if now.writes else files.Extra()
    session.show(now, tables.ranking_table(result, config.title or config.name), *extra.tables)


def _begun(
    experiment: "Experiment", resumed: Resumed, say: Callable[[str], None]
) -> "tuple[list[tuple[str, Row]], dict[str, Snapshot]]":
    """The rows of a resumed run, and the states of optimisers that have ended before."""
    from gradxform.lab.training.records import ended_rows, race_rows

    config, snapshot = experiment.config, resumed.snapshot
    if snapshot is None:
        return [], {}
    lengths = {label: kind_of(config).rows(config, label) for label in config.optimizers}
    rows_of: dict[str, list[tuple[str, Row]]] = {label: [] for label in lengths}
    for label, row in race_rows(snapshot.record, lengths):
        rows_of[label].append((label, row))
    labels = [label for label, rows in rows_of.items() if rows]
    going_on = labels[-1] if snapshot.record["goes_on"] else None
    more = {  # those that may train on from the end of what they had
        label: number
        for number, (label, length) in enumerate(lengths.items())
        if (label != going_on or resumed.is_longer) and len(rows_of[label]) < length
    }
    ended = resuming.ended_states(resumed.folder, more, say)
    for label in labels if resumed.is_longer else ():
        if label in more and label not in (going_on, *ended):
            resuming.lacks_end(resumed.folder, label)
    for label, kept in ended.items():
        own = ended_rows(kept.record, label, lengths[label])
        rows_of[label] = max(rows_of[label], own, key=len)
    return [pair for rows in rows_of.values() for pair in rows], ended


def _on_devices(experiment: "Experiment", data: Any, devices: "Devices | None") -> Any:
    """The task; from here on a process keeps only the part of the data of its devices."""
    if data is None or kind_of(experiment.config).task is None:
        return data

    from gradxform.lab.training.epoch import on_devices
    from gradxform.lab.training.race import task_of

    return on_devices(task_of(experiment.config, data), devices)
