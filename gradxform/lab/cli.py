"""The command line: ``gradxform run CONFIG``, ``gradxform list``.

What is slow to import (JAX, Flax, Matplotlib, scikit-learn) is imported where it is used, after
everything that can go wrong without it.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import gradxform
from gradxform.lab.optimizers import PACKAGES, ConfigError, curvatures, methods

if TYPE_CHECKING:
    from gradxform.lab.config import Config
    from gradxform.lab.train import Row

USER_MISTAKE, INTERRUPTED = 2, 130

HELP = """Race the optimisation methods of a deep-learning lecture on real data.

An experiment is a TOML file: a task, how to train on it, and the optimisers to compare.
They all start from the same parameters and see the same batches.

\b
gradxform run digits_race                  the main race, in under a minute
gradxform run keras_mnist                  the lecture's Keras net on MNIST
gradxform run keras_mnist --data-dir DATA  the same from files you have
gradxform run digits_race --set training.epochs=5 --set seed=1
gradxform run my_race.toml --out first     a config of your own
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


class Listed(StrEnum):
    """What ``list`` can show."""

    methods = "methods"
    tasks = "tasks"
    configs = "configs"


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
    config: Annotated[
        str,
        typer.Argument(help="A TOML file, or the name of a shipped config.", show_default=False),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a value of the config, as in training.epochs=5. Repeatable.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the data sets' files; if not given $GRADXFORM_DATA, else a download.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to make for the results; if not given runs/NAME-TIMESTAMP.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, only the final table.")
    ] = False,
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
    """
    try:
        _run(config, set_ or [], data_dir, out, quiet)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


@app.command("list")
def list_(
    what: Annotated[Listed | None, typer.Argument(help="All three if not given.")] = None,
) -> None:
    """Show the methods, tasks and configs there are."""
    shown = [what] if what else list(Listed)
    for i, kind in enumerate(shown):
        if i:
            print()
        _LISTS[kind]()


def _run(
    name: str, overrides: Sequence[str], data_dir: Path | None, out: Path | None, quiet: bool
) -> None:
    from gradxform.lab.config import SurfaceConfig, load_config
    from gradxform.lab.data import DataError, load

    try:
        config = load_config(name, overrides)
    except ConfigError as error:
        _fail(str(error))
    dataset = None if isinstance(config, SurfaceConfig) else config.task.dataset
    if data_dir is not None and dataset in _WITHOUT_FILES:
        why = _WITHOUT_FILES[dataset]
        print(f"gradxform: --data-dir {data_dir} is not used: {why}", file=sys.stderr)

    from jax.errors import JaxRuntimeError

    from gradxform.lab import optimizers, results
    from gradxform.lab.models import ModelError
    from gradxform.lab.train import race

    rows: list[tuple[str, Row]] = []

    def on_row(label: str, row: "Row") -> None:
        rows.append((label, row))
        advance(label, row)

    try:
        optimizers.build_all(config.optimizers)  # a mistake there need not wait for the data
        with results.run_folder(config, out) as folder:
            data = None if dataset is None else load(dataset, data_dir)
            try:
                with _progress(config, quiet) as advance:
                    result = race(config, data, on_row)
            finally:
                if rows:  # an interrupted race keeps what it has
                    results.write_atomically(folder / "metrics.csv", results.metrics_csv(rows))
            results.save(folder, config, result)
    except (ConfigError, DataError, ModelError, OSError) as error:
        _fail(str(error))
    except (MemoryError, JaxRuntimeError) as error:
        reason = (str(error).splitlines() or ["Out of memory"])[0]
        # XLA says either, depending on where it runs short
        if not any(words in reason for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        _fail(f"does not fit in memory: {reason}; try a smaller batch_size or model")
    table = results.ranking_table(result, config.title or config.name)
    console = Console()
    if console.width >= 100:
        table.padding = (0, 1, 0, 0)
    console.print(table)
    print(f"Results are in {folder}", file=sys.stderr)


@contextlib.contextmanager
def _progress(config: "Config", quiet: bool) -> Iterator[Callable[[str, "Row"], None]]:
    """Shows how the race goes on stderr; yields what to call with each new row."""
    total_of = {label: _rows(config, label) for label in config.optimizers}
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield functools.partial(_print_row, console, total_of)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar_of = {
            label: bars.add_task(label, total=total_of[label], start=False, state="")
            for label in config.optimizers
        }

        def advance(label: str, row: "Row") -> None:
            bar = bar_of[label]
            bars.start_task(bar)
            bars.update(bar, advance=1, state=_state(row))

        yield advance


def _rows(config: "Config", label: str) -> int:
    """How many rows an optimiser's run has, if it does not end early."""
    steps = config.training.model_dump()
    if "steps" in steps:
        return steps["steps"] + 1
    return steps["overrides"].get(label, {}).get("epochs") or steps["epochs"]


def _print_row(console: Console, total_of: dict[str, int], label: str, row: "Row") -> None:
    total = total_of[label]
    done = int(row["epoch"] if "epoch" in row else row["step"] + 1)
    tenths = done * 10 // total > (done - 1) * 10 // total
    if tenths or done in (1, total):
        line = f"{label}: {'epoch' if 'epoch' in row else 'point'} {done}/{total}, {_state(row)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _state(row: "Row") -> str:
    name = "cost" if "cost" in row else "value"
    accuracy = f", test accuracy {row['test_accuracy']:.3f}" if "test_accuracy" in row else ""
    return f"{name} {row[name]:.4g}{accuracy}"


def _list_methods() -> None:
    table = Table("method", "arguments", "what it is", title="Methods", title_justify="left")
    for method in methods("gradxform"):
        arguments = ", ".join(
            name if argument.required else f"[{name}]"
            for name, argument in method.arguments.items()
        )
        table.add_row(
            method.name.removeprefix("gradxform."), escape(arguments), escape(method.summary)
        )
    _print(table)
    for package in PACKAGES[1:]:
        names = ", ".join(m.name for m in methods(package))
        _print(f"\nFrom {package}: {names}")
    schedules = ", ".join(
        m.name.removeprefix("gradxform.")
        for package in PACKAGES
        for m in methods(package, "schedule")
    )
    _print(f'\nSchedules for a learning rate, as {{schedule = "NAME", ...}}: {schedules}')
    preconditioners = ", ".join(
        m.name.removeprefix("gradxform.") for m in methods("gradxform", "preconditioner")
    )
    _print(f'\nCurvatures, as curvature = "NAME": {", ".join(curvatures())}')
    _print(f'\nPreconditioners, as {{preconditioner = "NAME", ...}}: {preconditioners}')


def _list_tasks() -> None:
    from gradxform.lab import config

    table = Table("task.kind", "choices", title="Tasks", title_justify="left")
    for kind, choices in config.task_choices().items():
        lines = (f"{key}: {', '.join(values)}" for key, values in choices.items())
        table.add_row(kind, "\n".join(lines))
    _print(table)


def _list_configs() -> None:
    from gradxform.lab.config import load_config, shipped_configs

    table = Table("config", "title", title="Configs", title_justify="left")
    for name in shipped_configs():
        table.add_row(name, escape(load_config(name).title))
    _print(table)


_LISTS = {
    Listed.methods: _list_methods,
    Listed.tasks: _list_tasks,
    Listed.configs: _list_configs,
}


def _print(what: Any) -> None:
    Console().print(what, highlight=False)


def _fail(message: str, code: int = USER_MISTAKE) -> NoReturn:
    print(f"gradxform: {message}", file=sys.stderr)
    raise typer.Exit(code)
