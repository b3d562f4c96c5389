"""The command line: ``gradxform run CONFIG``, ``sweep CONFIG``, ``movie CONFIG`` and ``list``.

JAX, Flax, Matplotlib and scikit-learn are slow to import. So each command imports them only after
the checks that do not need them.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import gradxform
from gradxform.lab.commands import endings, listing, plot, progress, session
from gradxform.lab.experiment.messages import on_one_line, replace_what_cannot_be_shown
from gradxform.lab.experiment.methods import ConfigError
from gradxform.lab.training.interrupts import leave_at_once, nothing_to_lose

if TYPE_CHECKING:
    from gradxform.lab.training.race import Row

HELP = """Compare the optimisation methods of a deep-learning lecture on real data.

A TOML file describes an experiment: the task, the training, and the optimisers to compare.
All optimisers start from the same parameters and see the same batches.

\b
gradxform run digits_race                  the main race, under a minute
gradxform run keras_mnist                  the lecture's Keras net on MNIST
gradxform run keras_mnist --data-dir DATA  the same with files in DATA
gradxform run digits_race --set training.epochs=5 --set seed=1
gradxform run my_race.toml --out first     your own config
gradxform sweep learning_rate              compare many learning rates
gradxform movie valley                     animate paths on a surface
gradxform plot FOLDER --format pdf         draw the pictures of a run anew
gradxform list methods                     methods that a config can use
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


ConfigName = Annotated[
    str, typer.Argument(help="A TOML file or the name of a shipped config.", show_default=False)
]
ConfigNameOrNone = Annotated[
    str | None,
    typer.Argument(help="A TOML file or the name of a shipped config.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the config, such as training.epochs=5. Repeatable.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the files of the data sets. Default: $GRADXFORM_DATA, else a download.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="New folder for the results. Default: runs/NAME-TIMESTAMP.",
        show_default=False,
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Continue the run in this folder from its last checkpoint, without CONFIG.",
        show_default=False,
    ),
]
Distributed = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT,PROCESS,PROCESSES",
        help="Run as one of several processes that share the work: the address of process 0, the "
        "number of this process, and how many there are. Use auto on a cluster that JAX knows, "
        "such as SLURM or a TPU pod. With --resume, all processes must see the same FOLDER.",
        show_default=False,
    ),
]
Tensorboard = Annotated[
    bool, typer.Option("--tensorboard", help="Also write TensorBoard event files into the folder.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Hide progress; print only the final table.")
]


class Listed(StrEnum):
    """The choices of ``list``."""

    methods = "methods"
    tasks = "tasks"
    configs = "configs"


class Format(StrEnum):
    """The file formats of ``movie``."""

    gif = "gif"
    mp4 = "mp4"


def main() -> None:
    """The ``gradxform`` command."""
    replace_what_cannot_be_shown()
    try:
        app()
    except SystemExit as end:
        if end.code == endings.INTERRUPTED and not endings.several():
            # JAX may still run a program; a normal exit of the interpreter could then crash
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            leave_at_once()
        raise


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
    """Train a config's optimisers on its task and compare them.

    Prints a table sorted by final training loss. Writes a folder with
    config.toml (complete, so you can run it again), metrics.csv (one row per
    epoch), summary.json, cost.png (cost by epoch) and work.png (loss by
    updates, gradients and seconds).

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
    """Train each optimiser with many hyperparameters and seeds at once.

    The config's \\[sweep] says what to vary. All runs of an optimiser train
    together in one compiled program. Prints the best point of each optimiser.
    Writes a folder with config.toml, members.csv (one row per run), costs.csv,
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
    format_: Annotated[Format, typer.Option("--format", help="File format.")] = Format.gif,
    fps: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=50,
            help="Frames per second. Default: 20, or fewer so that the movie lasts 5 seconds.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Animate a config's optimisers on a surface with two parameters.

    Writes a folder with config.toml and movie.gif. The movie shows the paths
    over the contours, and the value at each update. It zooms in on what still
    moves, and ends when nothing moves any more. It has at most 120 frames,
    most of them for the first updates.

    \b
    gradxform movie valley
    gradxform movie valley_second_order --set training.steps=30 --fps 5
    gradxform movie my_walk.toml --format mp4 --out first
    """
    try:
        _movie(config, set_ or [], format_, fps, out)
    except KeyboardInterrupt:
        endings.end("interrupted", endings.INTERRUPTED)


app.command()(plot.plot)


@app.command("list")
def list_(
    what: Annotated[Listed | None, typer.Argument(help="Default: all three.")] = None,
) -> None:
    """List the methods, tasks and configs that you can use."""
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
    config = session.load(name, overrides, data_dir, out, resume)
    with nothing_to_lose():
        writes = endings.joined(distributed)

        import jax

        from gradxform.lab.data.sets import checksum, load
        from gradxform.lab.experiment import methods
        from gradxform.lab.experiment.schema import SurfaceConfig
        from gradxform.lab.report import results
        from gradxform.lab.report.tensorboard import events
        from gradxform.lab.training.epoch import on_devices
        from gradxform.lab.training.race import precision_of, race, task_of
        from gradxform.lab.training.records import race_rows

    rows: list[tuple[str, Row]] = []

    def on_row(label: str, row: "Row") -> None:
        rows.append((label, row))
        advance(label, row)
        log(label, row)
        stop_if_asked()

    nothing = contextlib.nullcontext(lambda label, row: None)
    devices = None if distributed is None else jax.devices()
    with endings.told(endings.end), contextlib.ExitStack() as until_the_end:
        with nothing_to_lose(until_the_end.close), endings.together(), endings.told():
            methods.build_all(config.optimizers)  # reports a mistake before the data are read
            place = session.place(config, "run", out, resume, writes)
            folder, snapshot = until_the_end.enter_context(place)
            until_the_end.enter_context(precision_of(config))
            if snapshot is not None:
                epochs = {label: progress.epochs_of(config, label) for label in config.optimizers}
                rows += race_rows(snapshot.told, epochs)
            task, read = None, 0
            if not isinstance(config, SurfaceConfig):
                data = load(config.task.dataset, data_dir)
                read = checksum(data) if distributed else 0
                task = on_devices(task_of(config, data), devices)
                del data  # from here on a process keeps only the part of its devices
        endings.check_alike(config, read, snapshot)
        try:
            with (
                events(folder / "tensorboard") if tensorboard else nothing as log,
                progress.of_race(config, quiet or not writes, rows) as advance,
                session.keeping(folder, config, "run", writes) as (on_state, stop_if_asked),
            ):
                result = race(
                    config, task, on_row, on_state=on_state, resume=snapshot, devices=devices
                )
        finally:
            if rows:  # an interrupted race keeps its finished epochs
                results.write_atomically(folder / "metrics.csv", results.metrics_csv(rows))
        if writes:
            results.save(folder, config, result)
    if writes:
        _show(results.ranking_table(result, config.title or config.name), folder)


def _sweep(
    name: str | None,
    overrides: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    quiet: bool,
    resume: Path | None,
    distributed: str | None,
) -> None:
    config = session.load(name, overrides, data_dir, out, resume, for_sweep=True)
    with nothing_to_lose():
        writes = endings.joined(distributed)

        from gradxform.lab.data.sets import checksum, load
        from gradxform.lab.experiment import methods
        from gradxform.lab.experiment.load import sweep_members
        from gradxform.lab.experiment.schema import SurfaceConfig
        from gradxform.lab.report import results
        from gradxform.lab.training.records import sweep_rows
        from gradxform.lab.training.sweep import first_row
        from gradxform.lab.training.sweep import sweep as sweep_all

    rows: dict[int, Row] = {}

    def on_epoch(label: str, epoch: int, found: "Mapping[int, Row]") -> None:
        rows.update(found)
        advance(label, epoch, found)
        stop_if_asked()

    with endings.told(endings.end), contextlib.ExitStack() as until_the_end:
        with nothing_to_lose(until_the_end.close), endings.together(), endings.told():
            methods.build_all(config.optimizers)
            place = session.place(config, "sweep", out, resume, writes)
            folder, snapshot = until_the_end.enter_context(place)
            if snapshot is not None:
                rows |= sweep_rows(snapshot.told, [first_row(m) for m in sweep_members(config)])
            on_surface = isinstance(config, SurfaceConfig)
            data = None if on_surface else load(config.task.dataset, data_dir)
        endings.check_alike(config, checksum(data) if data and distributed else 0, snapshot)
        try:
            with (
                progress.of_sweep(config, quiet or not writes) as advance,
                session.keeping(folder, config, "sweep", writes) as (on_state, stop_if_asked),
            ):
                result = sweep_all(config, data, on_epoch, on_state=on_state, resume=snapshot)
        finally:
            if rows:  # an interrupted sweep keeps its finished epochs
                results.write_atomically(folder / "members.csv", results.members_csv(rows))
        if writes:
            results.save_sweep(folder, config, result)
    if writes:
        _show(results.best_table(result, config.title or config.name), folder)


def _movie(
    name: str, overrides: Sequence[str], format_: Format, fps: float | None, out: Path | None
) -> None:
    from gradxform.lab.experiment.load import load_config, require_surface

    try:
        config = require_surface(load_config(name, overrides, for_sweep=False))
    except ConfigError as error:
        endings.fail(str(error))

    with nothing_to_lose():
        from gradxform.lab.experiment import methods
        from gradxform.lab.report import movies, results

    with endings.told(), contextlib.ExitStack() as until_the_end:
        with nothing_to_lose(until_the_end.close):
            methods.build_all(config.optimizers)
            if format_ is Format.mp4:
                movies.ffmpeg()  # reports a missing ffmpeg before the race
            folder = until_the_end.enter_context(results.run_folder(config, out))
            with progress.of_frames() as on_frame:
                frames = movies.movie(config, on_frame)
            encode = movies.mp4 if format_ is Format.mp4 else movies.gif
            content = encode(frames, fps)
        file = folder / f"movie.{format_}"
        results.write_atomically(file, content)
    print(f"The movie is {on_one_line(file)}", file=sys.stderr)


def _show(table: Table, folder: Path) -> None:
    console = Console()
    if console.width >= 100:
        table.padding = (0, 1, 0, 0)
    console.print(table)
    pictures = ", ".join(sorted(file.name for file in folder.glob("*.png")))
    also = f"; pictures: {pictures}" if pictures else ""
    print(f"Results are in {on_one_line(folder)}{also}", file=sys.stderr)
