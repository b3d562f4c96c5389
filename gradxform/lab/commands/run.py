"""``gradxform run``: a race."""

import contextlib
from typing import TYPE_CHECKING, Any

from gradxform.lab.commands import endings, progress, session
from gradxform.lab.commands.session import Command, Request
from gradxform.lab.experiment.kinds import kind_of

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.training.checkpoints import Snapshot
    from gradxform.lab.training.outcomes import Row
    from gradxform.lab.training.processes import Devices


@endings.interruptible()
def run(request: Request, *, tensorboard: bool = False) -> None:
    """Races the optimisers of a config, and leaves the results in a folder."""
    with session.opened(request, Command("run", _rows_of, _on_devices)) as now:
        from gradxform.lab.report import files, tables
        from gradxform.lab.report.tensorboard import events
        from gradxform.lab.training.race import race

        nothing = contextlib.nullcontext(lambda label, row: None)
        rows: list[tuple[str, Row]] = now.rows or []
        config = now.experiment.config

        def on_row(label: str, row: "Row") -> None:
            rows.append((label, row))
            advance(label, row)
            log(label, row)
            stop_if_asked()

        with (
            session.training(now, "metrics.csv", lambda: files.metrics_csv(rows)) as how,
            events(now.folder / "tensorboard") if tensorboard else nothing as log,
            progress.of_race(config, now.is_quiet, rows) as advance,
        ):
            on_state, stop_if_asked = how
            options = {"on_state": on_state, "resume": now.snapshot, "devices": now.devices}
            result = race(now.experiment, now.data, on_row, **options)
        if now.writes:
            files.save(now.folder, config, result)
    session.show(now, tables.ranking_table(result, config.title or config.name))


def _rows_of(experiment: "Experiment", snapshot: "Snapshot") -> "list[tuple[str, Row]]":
    from gradxform.lab.training.records import race_rows

    config = experiment.config
    lengths = {label: kind_of(config).rows(config, label) for label in config.optimizers}
    return race_rows(snapshot.told, lengths)


def _on_devices(experiment: "Experiment", data: Any, devices: "Devices | None") -> Any:
    """The task; from here on a process keeps only the part of the data of its devices."""
    if data is None:
        return None

    from gradxform.lab.training.epoch import on_devices
    from gradxform.lab.training.race import task_of

    return on_devices(task_of(experiment.config, data), devices)
