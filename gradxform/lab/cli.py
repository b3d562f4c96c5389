"""The command line: ``gradxform run CONFIG``, ``sweep CONFIG``, ``movie CONFIG`` and ``list``.

What is slow to import (JAX, Flax, Matplotlib, scikit-learn) is imported where it is used, after
everything that can go wrong without it.
"""

import contextlib
import difflib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import gradxform
from gradxform.lab import endings, listing, progress
from gradxform.lab.optimizers import ConfigError

if TYPE_CHECKING:
    from gradxform.lab.checkpoints import OnState, Snapshot
    from gradxform.lab.schema import Config
    from gradxform.lab.train import Row

HELP = """Race the optimisation methods of a deep-learning lecture on real data.

An experiment is a TOML file: a task, how to train on it, and the optimisers to compare.
They all start from the same parameters and see the same batches.

\b
gradxform run digits_race                  the main race, in under a minute
gradxform run keras_mnist                  the lecture's Keras net on MNIST
gradxform run keras_mnist --data-dir DATA  the same from files you have
gradxform run digits_race --set training.epochs=5 --set seed=1
gradxform run my_race.toml --out first     a config of your own
gradxform sweep learning_rate              how each optimiser depends on its rate
gradxform movie valley                     optimisers walking down a surface together
gradxform list methods                     what a config can name
"""

_WITHOUT_FILES = {
    None: "a surface needs no data",
    "digits": "digits come with scikit-learn",
    "synthetic_text": "the text is made on the spot",
}

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ConfigName = Annotated[
    str, typer.Argument(help="A TOML file, or the name of a shipped config.", show_default=False)
]
ConfigNameOrNone = Annotated[
    str | None,
    typer.Argument(help="A TOML file, or the name of a shipped config.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the config, as in training.epochs=5. Repeatable.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the data sets' files; if not given $GRADXFORM_DATA, else a download.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder to make for the results; if not given runs/NAME-TIMESTAMP.",
        show_default=False,
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Go on in this folder from its last checkpoint; needs no CONFIG.",
        show_default=False,
    ),
]
Distributed = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT,PROCESS,PROCESSES",
        help="One of several processes whose devices divide each batch, or the members of a sweep: "
        "auto on a cluster that JAX knows, such as SLURM or a TPU pod; else where process 0 "
        "listens, this process and how many. FOLDER is one that all can read.",
        show_default=False,
    ),
]
Tensorboard = Annotated[
    bool, typer.Option("--tensorboard", help="Write TensorBoard's event files into the folder.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the final table.")]


class Listed(StrEnum):
    """What ``list`` can show."""

    methods = "methods"
    tasks = "tasks"
    configs = "configs"


class Format(StrEnum):
    """What ``movie`` can write."""

    gif = "gif"
    mp4 = "mp4"


def main() -> None:
    """The ``gradxform`` command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"gradxform {gradxform.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigNameOrNone = None,
    set_: Settings = None,
    data_dir: DataDir = None,
    out: Out = None,
    quiet: Quiet = False,
    resume: Resume = None,
    tensorboard: Tensorboard = False,
    distributed: Distributed = None,
) -> None:
    """Race a config's optimisers on its task.

    Prints a table, best training loss first, and makes a folder of
    config.toml (complete, to run again), metrics.csv (every epoch),
    summary.json, cost.png and work.png (updates, gradients, seconds).

    \b
    gradxform run digits_race
    gradxform run mnist_race --set training.epochs=3 --set seed=1
    gradxform run digits_race \\
        --set 'optimizers.mine={method="optax.adamw", learning_rate=0.01}'
    gradxform run mnist_race --set checkpoint.every=5 --out long
    gradxform run --resume long
    gradxform run mnist_race --distributed localhost:1234,0,2 & \\
    gradxform run mnist_race --distributed localhost:1234,1,2
    """
    try:
        _run(config, set_ or [], data_dir, out, quiet, resume, tensorboard, distributed)
    except KeyboardInterrupt:
        endings.end("interrupted", endings.INTERRUPTED)


@app.command()
def sweep(
    config: ConfigNameOrNone = None,
    set_: Settings = None,
    data_dir: DataDir = None,
    out: Out = None,
    quiet: Quiet = False,
    resume: Resume = None,
    distributed: Distributed = None,
) -> None:
    """Train a config's optimisers at many hyperparameters and seeds at once.

    What is swept is the config's [sweep]: the members of an optimiser are
    one compiled program. Prints the best point of each optimiser, and makes
    a folder of config.toml, members.csv (a row a member), costs.csv,
    summary.json, best.toml (the best points, for gradxform run) and figures.

    \b
    gradxform sweep learning_rate
    gradxform sweep my_sweep.toml --set sweep.seeds=8
    gradxform sweep digits_race \\
        --set 'sweep.axes.learning_rate={log=[1e-4, 1.0], points=9}'
    gradxform sweep learning_rate --distributed localhost:1234,0,2 & \\
    gradxform sweep learning_rate --distributed localhost:1234,1,2
    """
    try:
        _sweep(config, set_ or [], data_dir, out, quiet, resume, distributed)
    except KeyboardInterrupt:
        endings.end("interrupted", endings.INTERRUPTED)


@app.command()
def movie(
    config: ConfigName,
    set_: Settings = None,
    format_: Annotated[
        Format, typer.Option("--format", help="Kind of file; mp4 needs ffmpeg.")
    ] = Format.gif,
    fps: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=50,
            help="Frames a second; if not given 20, or fewer to last 5 seconds.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Draw a config's optimisers walking down their surface together.

    Makes a folder of config.toml and movie.gif: the paths over the contours
    beside the heights, in at most 120 frames, most of them of the first updates.

    \b
    gradxform movie valley
    gradxform movie valley_second_order --set training.steps=30 --fps 5
    gradxform movie my_walk.toml --format mp4 --out first
    """
    try:
        _movie(config, set_ or [], format_, fps, out)
    except KeyboardInterrupt:
        endings.end("interrupted", endings.INTERRUPTED)


@app.command("list")
def list_(
    what: Annotated[Listed | None, typer.Argument(help="All three if not given.")] = None,
) -> None:
    """Show the methods, tasks and configs there are."""
    shown = [what] if what else list(Listed)
    for i, kind in enumerate(shown):
        if i:
            print()
        getattr(listing, f"list_{kind}")()


def _run(
    name: str | None,
    overrides: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    quiet: bool,
    resume: Path | None,
    tensorboard: bool,
    distributed: str | None,
) -> None:
    name, overrides = _asked(name, overrides, out, resume)
    config = _load(name, overrides, data_dir)
    writes = endings.joined(distributed)

    import jax

    from gradxform.lab import optimizers, results
    from gradxform.lab.checkpoints import of_this_version
    from gradxform.lab.data import checksum, load
    from gradxform.lab.epoch import on_devices
    from gradxform.lab.schema import SurfaceConfig
    from gradxform.lab.tensorboard import events
    from gradxform.lab.train import race, task_of

    rows: list[tuple[str, Row]] = []

    def on_row(label: str, row: "Row") -> None:
        rows.append((label, row))
        advance(label, row)
        log(label, row)

    nothing = contextlib.nullcontext(lambda label, row: None)
    devices = None if distributed is None else jax.devices()
    with endings.told(endings.end), contextlib.ExitStack() as until_the_end:
        with endings.together(), endings.told():
            optimizers.build_all(config.optimizers)  # a mistake there need not wait for the data
            place = _place(config, "run", out, resume, writes)
            folder, snapshot = until_the_end.enter_context(place)
            if snapshot is not None:
                with of_this_version():
                    for history in snapshot.told["histories"]:
                        rows += ((history["label"], row) for row in history["rows"])
            task, read = None, 0
            if not isinstance(config, SurfaceConfig):
                data = load(config.task.dataset, data_dir)
                read = checksum(data) if distributed else 0
                task = on_devices(task_of(config, data), devices)
                del data  # from here on a process has its devices' part alone
        endings.check_alike(config, read, snapshot)
        try:
            with (
                events(folder / "tensorboard") if tensorboard else nothing as log,
                progress.of_race(config, quiet or not writes, rows) as advance,
                _keeping(folder, config, "run", writes) as on_state,
            ):
                result = race(
                    config, task, on_row, on_state=on_state, resume=snapshot, devices=devices
                )
        finally:
            if rows:  # an interrupted race keeps what it has
                results.write_atomically(folder / "metrics.csv", results.metrics_csv(rows))
        if writes:
            results.save(folder, config, result)
    if writes:
        _show(results.ranking_table(result, config.title or config.name), folder)


def _asked(
    name: str | None, overrides: Sequence[str], out: Path | None, folder: Path | None
) -> tuple[str, Sequence[str]]:
    """The config that is asked for and its overrides; a ``folder`` that is resumed has its own."""
    if folder is None and name is None:
        endings.fail(
            "missing argument CONFIG: name a TOML file or a shipped config, see gradxform list"
        )
    if folder is None:
        return str(name), overrides

    from gradxform.lab.config import load_config, to_toml

    kept = folder / "config.toml"
    if not kept.is_file() or not kept.stat().st_size:  # it is claimed before it is written
        endings.fail(f"--resume {folder}: no run has begun there, it has no config.toml")
    if out is not None:
        endings.fail(f"--out {out}: a run that is resumed stays in its folder, {folder}")
    try:
        given = to_toml(load_config(name or kept, overrides))
        _check_same(to_toml(load_config(kept)), given, str(kept), "given now")
    except ConfigError as error:
        endings.fail(str(error))
    if (folder / "summary.json").is_file():
        endings.say(f"{folder}: this run is finished, nothing is left to do")
        raise typer.Exit
    return str(kept), []


def _check_same(before: str, now: str, name_before: str, name_now: str) -> None:
    """Ends with the difference between two configs if there is one."""
    lines = difflib.unified_diff(
        before.splitlines(), now.splitlines(), name_before, name_now, lineterm=""
    )
    if difference := "\n".join(lines):
        endings.fail(
            f"a run goes on with the config that it was begun with; this differs:\n{difference}"
        )


@contextlib.contextmanager
def _place(
    config: "Config", command: str, out: Path | None, resume: Path | None, writes: bool
) -> "Iterator[tuple[Path, Snapshot | None]]":
    """The folder of a run, for this process alone, and where it stood if it is resumed."""
    from gradxform.lab import checkpoints, results

    if not writes:
        place = _nowhere()
    elif resume is None:
        place = results.run_folder(config, out)
    else:
        place = contextlib.nullcontext(resume)
    with place as folder, checkpoints.locked(folder):
        say = endings.say if writes else lambda message: None
        yield folder, None if resume is None else _last_snapshot(resume, config, command, say)


def _last_snapshot(
    folder: Path, config: "Config", command: str, say: Callable[[str], None]
) -> "Snapshot | None":
    """Where the run in a folder stood at its last checkpoint that is whole."""
    from gradxform.lab import checkpoints, results
    from gradxform.lab.config import to_toml

    found = checkpoints.newest(folder / "checkpoints", say)
    if found is None:
        say(f"{folder} has no usable checkpoint: starts from the beginning")
        return None
    snapshot, about = found
    with checkpoints.of_this_version():
        if about["command"] != command:
            endings.fail(f"{folder} goes on by gradxform {about['command']} --resume {folder}")
        _check_same(about["config"], to_toml(config), "checkpoint", str(folder / "config.toml"))
        say(f"goes on from checkpoint {snapshot.number}")
        if (was := about["made_with"]) != results.made_with():
            versions = ", ".join(f"{name} {version}" for name, version in was["versions"].items())
            say(f"it was written by {versions} on {was['device']}: numbers may differ from here on")
    return snapshot


@contextlib.contextmanager
def _keeping(
    folder: Path, config: "Config", command: str, writes: bool
) -> "Iterator[OnState | None]":
    """Yields what keeps checkpoints of a run, if its config wants them."""
    from gradxform.lab import checkpoints, results
    from gradxform.lab.config import to_toml
    from gradxform.lab.schema import SurfaceConfig

    if isinstance(config, SurfaceConfig) or not config.checkpoint.every:
        yield None
        return
    about = {
        "command": command,
        "config": to_toml(config),
        "made_with": results.made_with(),
    }
    options = config.checkpoint.model_dump() | {"writes": writes}
    try:
        with checkpoints.keeping(
            folder / "checkpoints", about=about, say=endings.say, **options
        ) as on_state:
            yield on_state
    except KeyboardInterrupt:
        advice = f"; it goes on by gradxform {command} --resume {folder}" if writes else ""
        endings.fail(f"interrupted{advice}", endings.INTERRUPTED)


def _sweep(
    name: str | None,
    overrides: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    quiet: bool,
    resume: Path | None,
    distributed: str | None,
) -> None:
    name, overrides = _asked(name, overrides, out, resume)
    config = _load(name, overrides, data_dir, is_sweep=True)
    writes = endings.joined(distributed)

    from gradxform.lab import optimizers, results
    from gradxform.lab.checkpoints import of_this_version
    from gradxform.lab.data import checksum, load
    from gradxform.lab.schema import SurfaceConfig
    from gradxform.lab.sweep import sweep as sweep_all

    rows: dict[int, Row] = {}

    def on_epoch(label: str, epoch: int, found: "Mapping[int, Row]") -> None:
        rows.update(found)
        advance(label, epoch, found)

    with endings.told(endings.end), contextlib.ExitStack() as until_the_end:
        with endings.together(), endings.told():
            optimizers.build_all(config.optimizers)
            place = _place(config, "sweep", out, resume, writes)
            folder, snapshot = until_the_end.enter_context(place)
            if snapshot is not None:
                with of_this_version():
                    rows |= {int(number): row for number, row in snapshot.told["rows"].items()}
            on_surface = isinstance(config, SurfaceConfig)
            data = None if on_surface else load(config.task.dataset, data_dir)
        endings.check_alike(config, checksum(data) if data and distributed else 0, snapshot)
        try:
            with (
                progress.of_sweep(config, quiet or not writes) as advance,
                _keeping(folder, config, "sweep", writes) as on_state,
            ):
                result = sweep_all(config, data, on_epoch, on_state=on_state, resume=snapshot)
        finally:
            if rows:  # an interrupted sweep keeps what it has
                results.write_atomically(folder / "members.csv", results.members_csv(rows))
        if writes:
            results.save_sweep(folder, config, result)
    if writes:
        _show(results.best_table(result, config.title or config.name), folder)


@contextlib.contextmanager
def _nowhere() -> Iterator[Path]:
    """The folder of a process that leaves the results to another."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.toml").touch()
        yield Path(name)


def _movie(
    name: str, overrides: Sequence[str], format_: Format, fps: float | None, out: Path | None
) -> None:
    from gradxform.lab.config import load_config, require_surface

    try:
        config = require_surface(load_config(name, overrides))
    except ConfigError as error:
        endings.fail(str(error))

    from gradxform.lab import movies, optimizers, results

    with endings.told():
        optimizers.build_all(config.optimizers)
        if format_ is Format.mp4:
            movies.ffmpeg()  # one that is missing need not wait for the race
        with results.run_folder(config, out) as folder:
            frames = movies.movie(config)
            encode = movies.mp4 if format_ is Format.mp4 else movies.gif
            file = folder / f"movie.{format_}"
            results.write_atomically(file, encode(frames, fps))
    print(f"The movie is {file}", file=sys.stderr)


def _load(
    name: str, overrides: Sequence[str], data_dir: Path | None, *, is_sweep: bool = False
) -> "Config":
    """The config, with a word on a folder of data that it does not use."""
    from gradxform.lab.config import load_config, require_sweep
    from gradxform.lab.schema import SurfaceConfig

    try:
        config = load_config(name, overrides)
        if is_sweep:
            require_sweep(config)
    except ConfigError as error:
        endings.fail(str(error))
    dataset = None if isinstance(config, SurfaceConfig) else config.task.dataset
    if data_dir is not None and dataset in _WITHOUT_FILES:
        why = _WITHOUT_FILES[dataset]
        print(f"gradxform: --data-dir {data_dir} is not used: {why}", file=sys.stderr)
    return config


def _show(table: Table, folder: Path) -> None:
    console = Console()
    if console.width >= 100:
        table.padding = (0, 1, 0, 0)
    console.print(table)
    print(f"Results are in {folder}", file=sys.stderr)
