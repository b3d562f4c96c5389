"""What ``run`` and ``sweep`` share: config, folder, checkpoint, data, and other processes."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from gradxform.lab.commands import endings, resuming
from gradxform.lab.commands.request import Request, Resumed
from gradxform.lab.experiment import folders, own_files
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.training.interrupts import asked_to_stop, nothing_to_lose

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.experiment.schema import Config
    from gradxform.lab.training.checkpoints import OnState, Snapshot
    from gradxform.lab.training.processes import Devices
    from gradxform.lab.training.race import OnEnd

_WITHOUT_FILES = {
    None: "a surface needs no data",
    "digits": "digits come with scikit-learn",
    "synthetic_text": "the text is generated",
    "burgers": "the points are generated",
}


class Keeping(NamedTuple):
    """What a run calls so that it can be interrupted and resumed."""

    on_state: "OnState | None"  #: after each epoch; writes the checkpoints of the config
    on_end: "OnEnd | None"  #: at the end of each optimiser; keeps its state
    stop_if_asked: Callable[[], None]  #: from time to time, in a run without epochs


class Command(NamedTuple):
    """What differs between the commands that train."""

    name: str
    begun: "Callable[[Experiment, Resumed, Callable[[str], None]], tuple[Any, Any]]"
    """(experiment, what was resumed, prints a message) -> rows so far, states of what has ended"""
    prepare: "Callable[[Experiment, Any, Devices | None], Any]"
    """(experiment, data set or ``None``, devices of all processes) -> what to train on"""


class Session(NamedTuple):
    """A run or a sweep that is about to train."""

    command: Command
    experiment: "Experiment"
    folder: Path  #: of the results; locked for this process
    snapshot: "Snapshot | None"  #: where to continue
    rows: Any  #: the rows of a resumed run; ``None`` for a new one
    ended: Any  #: the states of what has ended in a resumed run
    data: Any  #: what to train on
    devices: "Devices | None"  #: devices of all processes; ``None`` if there is only one
    writes: bool  #: whether this process writes the results
    is_quiet: bool  #: whether this process hides its progress


@contextlib.contextmanager
def opened(request: Request, command: Command) -> Iterator[Session]:
    """Begins a run or a sweep. All mistakes are found before the first epoch.

    Until then Ctrl-C ends the process at once. An error ends the command with one line.
    """
    config = load(request, for_sweep=command.name == "sweep")
    with nothing_to_lose():
        writes = endings.joined(request.distributed)

        import jax

        from gradxform.lab.data.sets import checksum
        from gradxform.lab.experiment.experiment import prepared
        from gradxform.lab.training.race import precision_of

    devices = None if request.distributed is None else jax.devices()
    with endings.in_one_line(endings.end), contextlib.ExitStack() as until_the_end:
        with nothing_to_lose(until_the_end.close), endings.together(), endings.in_one_line():
            until_the_end.enter_context(precision_of(config))
            experiment = prepared(config)  # reports a mistake before the data are read
            place = _place(experiment, request, writes)
            folder = until_the_end.enter_context(place)
            rows = ended = snapshot = None
            if request.resume is not None:
                tell = endings.say if writes else lambda message: None
                found = resuming.last_snapshot(request, experiment, command.name, tell)
                rows, ended = command.begun(experiment, found, tell)
                snapshot = found.snapshot
                if request.epochs is not None and writes:
                    until_the_end.enter_context(resuming.extended(folder, experiment))
            source = kind_of(config).data
            data = None if source is None else at(source)(config.task, request.data_dir)
            read = checksum(data) if data is not None and devices is not None else 0
            data = command.prepare(experiment, data, devices)
        if devices is not None:
            endings.check_alike(experiment, read, snapshot)
        is_quiet = request.is_quiet or not writes
        yield Session(
            command, experiment, folder, snapshot, rows, ended, data, devices, writes, is_quiet
        )


@contextlib.contextmanager
def training(session: Session, file: str, text: Callable[[], str]) -> Iterator[Keeping]:
    """Keeps the state of a run while it trains. Ctrl-C ends the run, and advice is printed.

    At the end, whatever it is, the rows so far are written.

    Args:
      session: the run.
      file: the name of the file for the rows.
      text: makes the content of the file; "" if there are no rows.
    """
    from gradxform.lab.report.folder import write_atomically

    try:
        with _keeping(session) as keeping:
            yield keeping
    finally:
        if content := text():
            write_atomically(session.folder / file, content)


def show(session: Session, *tables: Table) -> None:
    """Prints the tables of the results, and where they are."""
    if not session.writes:
        return
    console = Console()
    for table in tables:
        if console.width >= 100:
            table.padding = (0, 1, 0, 0)
        console.print(table)
    pictures = ", ".join(sorted(file.name for file in session.folder.glob("*.png")))
    also = f"; pictures: {pictures}" if pictures else ""
    print(f"Results are in {on_one_line(session.folder)}{also}", file=sys.stderr)


def load(request: Request, *, for_sweep: bool) -> "Config":
    """The requested config, or the config of the run to resume."""
    from gradxform.lab.experiment.load import load_config, require_sweep

    if request.resume is None and request.name is None:
        endings.fail(
            "missing argument CONFIG: give a TOML file or the name of a shipped config "
            "(see gradxform list configs)"
        )
    try:
        if request.resume is None:
            config = load_config(str(request.name), request.settings, for_sweep=for_sweep)
        else:
            config = resuming.kept_config(request, for_sweep=for_sweep)
        if for_sweep:
            require_sweep(config)
    except (ConfigError, OSError) as error:
        endings.fail(str(error))
    dataset = getattr(config.task, "dataset", None)
    reads_file = getattr(config.task, "file", None) is not None
    if request.data_dir is not None and dataset in _WITHOUT_FILES and not reads_file:
        endings.say(f"--data-dir {request.data_dir} is not used: {_WITHOUT_FILES[dataset]}")
    return config


@contextlib.contextmanager
def _place(experiment: "Experiment", request: Request, writes: bool) -> Iterator[Path]:
    """The folder of a run, locked for this process."""
    from gradxform.lab.report.folder import run_folder
    from gradxform.lab.training import checkpoints

    if not writes:
        place = _nowhere()
    elif request.resume is None:
        place = run_folder(experiment, request.out)
    else:
        place = contextlib.nullcontext(request.resume)
    with place as folder, checkpoints.locked(folder):
        yield folder


@contextlib.contextmanager
def _keeping(session: Session) -> Iterator[Keeping]:
    """The functions of :func:`training`; after Ctrl-C it ends the command with advice."""
    try:
        if not kind_of(session.experiment.config).has_epochs:
            with asked_to_stop(endings.say, "stopping after this optimiser") as asked:
                yield Keeping(None, None, lambda: _stop_if(asked()))
            return
        with _checkpoints(session) as keeping:
            yield keeping
    except KeyboardInterrupt:
        advice = _advice(session) if session.writes else ""
        endings.fail(f"interrupted{advice}", endings.INTERRUPTED)


@contextlib.contextmanager
def _checkpoints(session: Session) -> Iterator[Keeping]:
    from gradxform.lab.report.files import made_with
    from gradxform.lab.training import checkpoints

    experiment = session.experiment
    made = {"config": experiment.toml, "made_with": made_with()}
    common = {"about": {"command": session.command.name, **made}, "say": endings.say}
    options = experiment.config.model_dump()["checkpoint"]
    numbers = {label: i for i, label in enumerate(experiment.config.optimizers)}

    def on_end(label: str, snapshot: "Callable[[], Snapshot]") -> None:
        taken = snapshot()  # every process takes part, since each has a part of the arrays
        if session.writes:
            place = resuming.ended_folder(session.folder, numbers[label])
            folders.make(place.parent)
            checkpoints.try_to_save(place, taken, keep=1, **common)

    place = session.folder / "checkpoints"
    with checkpoints.keeping(place, writes=session.writes, **common, **options) as on_state:
        yield Keeping(on_state, on_end if options["every"] else None, lambda: None)


def _advice(session: Session) -> str:
    """How to continue, or what would have made that possible."""
    kept = getattr(session.experiment.config, "checkpoint", None)
    if kept is None:
        return ""
    if kept.every:
        again = f"--resume {session.folder}{own_files.options()}"
        return f"; to continue: gradxform {session.command.name} {again}"
    return "; --set checkpoint.every=1 keeps checkpoints, from which a run continues"


def _stop_if(asked: bool) -> None:
    if asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _nowhere() -> Iterator[Path]:
    """A temporary folder for a process that does not write the results."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.toml").touch()
        yield Path(name)
