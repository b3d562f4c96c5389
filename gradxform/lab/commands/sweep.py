"""``gradxform sweep``: many hyperparameters and seeds at once."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gradxform.lab.commands import endings, progress, session
from gradxform.lab.commands.request import Request, Resumed
from gradxform.lab.commands.session import Command

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.training.outcomes import Row


@endings.interruptible()
def sweep(request: Request) -> None:
    """Trains the members of a config's ``[sweep]``, and leaves the results in a folder."""
    as_read = lambda experiment, data, devices: data
    with session.opened(request, Command("sweep", _begun, as_read)) as now:
        from gradxform.lab.report import files, tables
        from gradxform.lab.training.sweep import sweep

        rows: dict[int, Row] = now.rows or {}
        config = now.experiment.config

        def on_epoch(label: str, epoch: int, found: "Mapping[int, Row]") -> None:
            rows.update(found)
            advance(label, epoch, found)
            keeping.stop_if_asked()

        with (
            session.training(now, "members.csv", lambda: files.members_csv(rows)) as keeping,
            progress.of_sweep(config, now.is_quiet) as advance,
        ):
            options = {"on_state": keeping.on_state, "resume": now.snapshot}
            result = sweep(now.experiment, now.data, on_epoch, **options)
        if now.writes:
            files.save_sweep(now.folder, config, result)
    session.show(now, tables.best_table(result, config.title or config.name))


def _begun(
    experiment: "Experiment", resumed: Resumed, say: Callable[[str], None]
) -> "tuple[dict[int, Row], None]":
    """The rows of a resumed sweep."""
    if resumed.snapshot is None:
        return {}, None

    from gradxform.lab.experiment.load import sweep_members
    from gradxform.lab.training.members import first_row
    from gradxform.lab.training.records import sweep_rows

    firsts = [first_row(member) for member in sweep_members(experiment.config)]
    return sweep_rows(resumed.snapshot.record, firsts), None
