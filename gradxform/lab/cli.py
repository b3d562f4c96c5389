"""The face of the command line: its commands, their options and their help.

JAX, Flax, Matplotlib and scikit-learn are slow to import. So each command imports them only after
the checks that do not need them.
"""

import contextlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import gradxform
from gradxform.lab.commands import completing, endings, listing
from gradxform.lab.commands.movie import movie as draw_movie
from gradxform.lab.commands.plot import plot as draw_plots
from gradxform.lab.commands.request import Request
from gradxform.lab.commands.resume import resume as run_more
from gradxform.lab.commands.run import run as run_race
from gradxform.lab.commands.show import show as show_config
from gradxform.lab.commands.sweep import sweep as run_sweep
from gradxform.lab.experiment import own_files
from gradxform.lab.experiment.messages import replace_what_cannot_be_shown
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.training.interrupts import leave_at_once

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
gradxform plot FOLDER --format pdf         draw the pictures of a run again
gradxform list methods                     methods that a config can use
gradxform show digits_race                 a config with every key explained
gradxform resume FOLDER --epochs 100       more epochs of a run
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_CONFIG = typer.Argument(
    help="A TOML file or the name of a shipped config.",
    show_default=False,
    autocompletion=completing.configs,
)
ConfigName = Annotated[str, _CONFIG]
ConfigNameOrNone = Annotated[str | None, _CONFIG]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the config, such as training.epochs=5. Repeatable.",
        autocompletion=completing.settings,
    ),
]


def _run_own_files(context: typer.Context, paths: list[Path] | None) -> None:
    """Runs the files of ``--with`` before the command, so that it knows their names."""
    if context.resilient_parsing:
        return
    try:
        own_files.load(paths or [])
    except ConfigError as error:
        endings.fail(str(error))


With = Annotated[
    list[Path] | None,
    typer.Option(
        "--with",
        metavar="FILE.py",
        help="A Python file that registers your own data sets, models, tasks, surfaces or methods. "
        "It is run. Repeatable.",
        callback=_run_own_files,
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the files of the data sets, and of task.file. Default: $GRADXFORM_DATA, "
        "else a download; for task.file the working directory.",
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
Loggers = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="NAME",
        help="A logger that gets every row: tensorboard, or one of a --with file. Repeatable.",
        show_default=False,
    ),
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


class Picture(StrEnum):
    """The file formats of ``plot``."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


class Log(StrEnum):
    """The axes with a logarithmic scale."""

    x = "x"
    y = "y"
    both = "both"
    none = "none"


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
    log: Loggers = None,
    distributed: Distributed = None,
    with_: With = None,
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
    request = Request(config, set_ or [], data_dir, out, quiet, resume, distributed)
    run_race(request, loggers=[*(log or []), *(["tensorboard"] if tensorboard else [])])


@app.command()
def sweep(
    config: ConfigNameOrNone = None,
    set_: Settings = None,
    data_dir: DataDir = None,
    out: Out = None,
    quiet: Quiet = False,
    resume: Resume = None,
    distributed: Distributed = None,
    with_: With = None,
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
    run_sweep(Request(config, set_ or [], data_dir, out, quiet, resume, distributed))


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
    with_: With = None,
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
    draw_movie(Request(config, set_ or [], out=out), format_=format_, fps=fps)


@app.command()
def resume(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a run or a sweep.", show_default=False)
    ],
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train the run until it has so many epochs, even if it is finished. It needs the "
            "checkpoints of checkpoint.every.",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    tensorboard: Tensorboard = False,
    log: Loggers = None,
    distributed: Distributed = None,
    with_: With = None,
) -> None:
    """Continue an interrupted run or sweep, or train a run for more epochs.

    It continues from the last checkpoint, to the same numbers as without the
    interruption, or as if the run had been asked for all epochs at once.

    \b
    gradxform resume long
    gradxform resume long --epochs 100
    """
    options = (data_dir, None, quiet, folder, distributed, epochs)
    loggers = [*(log or []), *(["tensorboard"] if tensorboard else [])]
    run_more(Request(None, (), *options), loggers=loggers)


@app.command()
def show(config: ConfigName, set_: Settings = None, with_: With = None) -> None:
    """Print a config with every key, its meaning and its default, ready to edit.

    \b
    gradxform show digits_race > my_race.toml
    gradxform show mnist_race --set training.epochs=3
    """
    show_config(Request(config, set_ or []))


@app.command("list")
def list_(
    what: Annotated[Listed | None, typer.Argument(help="Default: all three.")] = None,
    with_: With = None,
) -> None:
    """List the methods, tasks and configs that you can use."""
    shown = [what] if what else list(Listed)
    for i, kind in enumerate(shown):
        if i:
            print()
        getattr(listing, f"list_{kind}")()


@app.command()
def plot(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a finished run or sweep.", show_default=False)
    ],
    with_: With = None,
    format_: Annotated[Picture, typer.Option("--format", help="File format.")] = Picture.png,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in inches, such as 8x5. Default: a size for each picture.",
            show_default=False,
        ),
    ] = None,
    dpi: Annotated[int, typer.Option(min=10, max=1200, help="Pixels per inch.")] = 150,
    log: Annotated[
        Log | None,
        typer.Option(
            help="The axes with a logarithmic scale. Default: those of each picture.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw the pictures of a finished run again.

    Reads the numbers in the folder and writes the pictures into it, over those
    of the same format.

    \b
    gradxform plot runs/digits_race-20260102-030405 --format pdf
    gradxform plot first --size 6x4 --dpi 300 --log none
    """
    scales = None if log is None else log.value
    draw_plots(folder, format_=format_.value, size=size, dpi=dpi, log=scales)
