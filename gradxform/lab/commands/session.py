"""What ``run`` and ``sweep`` share: config, folder, checkpoint, data, and other processes."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from gradxform.lab.commands import endings, resuming
from gradxform.lab.experiment.kinds import at, kind_of
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.training.interrupts import asked_to_stop, nothing_to_lose

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.experiment.schema import Config
    from gradxform.lab.training.checkpoints import OnState, Snapshot
    from gradxform.lab.training.processes import Devices

_WITHOUT_FILES = {
    None: "a surface needs no data",
    "digits": "digits come with scikit-learn",
    "synthetic_text": "the text is generated",
    "burgers": "the points are generated",
}


class Request(NamedTuple):
    """What the user asks for on the command line."""

    name: str | None = None  #: a TOML file or the name of a shipped config
    settings: Sequence[str] = ()  #: ``key=value``
    data_dir: Path | None = None
    out: Path | None = None
    is_quiet: bool = False
    resume: Path | None = None  #: the folder of the run to continue
    distributed: str | None = None  #: how to join other processes


class Command(NamedTuple):
    """What differs between the commands that train."""

    name: str
    rows_of: "Callable[[Experiment, Snapshot], Any]"  #: the rows that a snapshot has
    prepare: "Callable[[Experiment, Any, Devices | None], Any]"
    """(experiment, data set or ``None``, devices of all processes) -> what to train on"""


class Session(NamedTuple):
    """A run or a sweep that is about to train."""

    command: Command
    experiment: "Experiment"
    folder: Path  #: of the results; locked for this process
    snapshot: "Snapshot | None"  #: where to continue
    rows: Any  #: the rows of a resumed run; ``None`` for a new one
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
    with endings.told(endings.end), contextlib.ExitStack() as until_the_end:
        with nothing_to_lose(until_the_end.close), endings.together(), endings.told():
            until_the_end.enter_context(precision_of(config))
            experiment = prepared(config)  # reports a mistake before the data are read
            place = _place(experiment, command, request, writes)
            folder, snapshot = until_the_end.enter_context(place)
            rows = None if snapshot is None else command.rows_of(experiment, snapshot)
            source = kind_of(config).data
            data = None if source is None else at(source)(config.task, request.data_dir)
            read = checksum(data) if data is not None and devices is not None else 0
            data = command.prepare(experiment, data, devices)
        endings.check_alike(experiment, read, snapshot)
        is_quiet = request.is_quiet or not writes
        yield Session(command, experiment, folder, snapshot, rows, data, devices, writes, is_quiet)


@contextlib.contextmanager
def training(
    session: Session, file: str, text: Callable[[], str]
) -> "Iterator[tuple[OnState | None, Callable[[], None]]]":
    """Yields two functions: ``on_state`` for runs with epochs, ``stop_if_asked`` for the others.

    A run calls the first after each epoch, and it writes the checkpoints of the config. A run
    without epochs calls the second from time to time. Both end the run after Ctrl-C. At the end,
    whatever it is, the rows so far are written.

    Args:
      session: the run.
      file: the name of the file for the rows.
      text: makes the content of the file; "" if there are no rows.
    """
    from gradxform.lab.report.folder import write_atomically

    try:
        with _keeping(session) as functions:
            yield functions
    finally:
        if content := text():
            write_atomically(session.folder / file, content)


def show(session: Session, table: Table) -> None:
    """Prints the table of the results, and where they are."""
    if not session.writes:
        return
    console = Console()
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
            config = resuming.kept_config(
                request.resume, request.name, request.settings, request.out, for_sweep=for_sweep
            )
        if for_sweep:
            require_sweep(config)
    except (ConfigError, OSError) as error:
        endings.fail(str(error))
    dataset = getattr(config.task, "dataset", None)
    if request.data_dir is not None and dataset in _WITHOUT_FILES:
        endings.say(f"--data-dir {request.data_dir} is not used: {_WITHOUT_FILES[dataset]}")
    return config


@contextlib.contextmanager
def _place(
    experiment: "Experiment", command: Command, request: Request, writes: bool
) -> "Iterator[tuple[Path, Snapshot | None]]":
    """The folder of a run, locked for this process, and the checkpoint to resume from."""
    from gradxform.lab.report.folder import run_folder
    from gradxform.lab.training import checkpoints

    if not writes:
        place = _nowhere()
    elif request.resume is None:
        place = run_folder(experiment, request.out)
    else:
        place = contextlib.nullcontext(request.resume)
    with place as folder, checkpoints.locked(folder):
        snapshot = None
        if request.resume is not None:
            tell = endings.say if writes else lambda message: None
            snapshot = resuming.last_snapshot(request.resume, experiment, command.name, tell)
        yield folder, snapshot


@contextlib.contextmanager
def _keeping(session: Session) -> "Iterator[tuple[OnState | None, Callable[[], None]]]":
    """The two functions of :func:`training`; after Ctrl-C it ends the command with advice."""
    config = session.experiment.config
    try:
        if not kind_of(config).has_epochs:
            with asked_to_stop(endings.say, "stopping after this optimiser") as asked:
                yield None, lambda: _stop_if(asked())
            return
        with _checkpoints(session) as on_state:
            yield on_state, lambda: None
    except KeyboardInterrupt:
        kept = getattr(config, "checkpoint", None)
        advice = ""
        if session.writes and kept is not None and kept.every:
            command = session.command.name
            advice = f"; to continue: gradxform {command} --resume {session.folder}"
        endings.fail(f"interrupted{advice}", endings.INTERRUPTED)


def _checkpoints(session: Session) -> "contextlib.AbstractContextManager[OnState]":
    from gradxform.lab.report.files import made_with
    from gradxform.lab.training import checkpoints

    experiment, command = session.experiment, session.command.name
    about = {"command": command, "config": experiment.toml, "made_with": made_with()}
    options = experiment.config.model_dump()["checkpoint"]
    return checkpoints.keeping(
        session.folder / "checkpoints",
        about=about,
        say=endings.say,
        writes=session.writes,
        **options,
    )


def _stop_if(asked: bool) -> None:
    if asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _nowhere() -> Iterator[Path]:
    """A temporary folder for a process that does not write the results."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.toml").touch()
        yield Path(name)
