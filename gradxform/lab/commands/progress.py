"""Progress of a race or a sweep on stderr: bars on a terminal, else a line per tenth."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gradxform.lab.experiment.kinds import kind_of
from gradxform.lab.experiment.messages import plain

if TYPE_CHECKING:
    from gradxform.lab.experiment.schema import Config
    from gradxform.lab.training.outcomes import Row


@contextlib.contextmanager
def of_race(
    config: "Config", quiet: bool, rows: "Sequence[tuple[str, Row]]"
) -> Iterator[Callable[[str, "Row"], None]]:
    """Shows the progress of a race. Yields a function to call with each new row.

    ``rows`` are the rows that a resumed race already has.
    """
    total_of = {label: kind_of(config).rows(config, label) for label in config.optimizers}
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield functools.partial(_print_row, console, total_of)
        return
    with Progress(*_columns(), console=console) as bars:
        bar_of = {
            label: bars.add_task(plain(label), total=total_of[label], start=False, state="")
            for label in config.optimizers
        }

        def advance(label: str, row: "Row") -> None:
            bar = bar_of[label]
            bars.start_task(bar)
            bars.update(bar, advance=1, state=_state(row))

        for label, row in rows:
            advance(label, row)
        yield advance


@contextlib.contextmanager
def of_sweep(
    config: "Config", quiet: bool
) -> "Iterator[Callable[[str, int, Mapping[int, Row]], None]]":
    """Shows the progress of a sweep. Yields a function to call after each epoch of a block."""
    console = Console(stderr=True, quiet=quiet)
    kind = kind_of(config)
    total_of = {
        label: kind.rows(config, label) if kind.has_epochs else 1  # one call walks all members
        for label in config.optimizers
    }
    with contextlib.ExitStack() as stack:
        bars, bar_of = None, {}
        if console.is_terminal:
            bars = stack.enter_context(Progress(*_columns(), console=console))
            bar_of = {
                label: bars.add_task(plain(label), total=total, start=False, state="")
                for label, total in total_of.items()
            }

        def advance(label: str, epoch: int, found: "Mapping[int, Row]") -> None:
            total, diverged = total_of[label], sum(row.get("diverged", 0) for row in found.values())
            state = f"{len(found)} members" + (f", {diverged} diverged" if diverged else "")
            if bars is not None:
                bars.start_task(bar_of[label])
                bars.update(bar_of[label], completed=epoch, state=state)
            elif epoch * 10 // total > (epoch - 1) * 10 // total or epoch in (1, total):
                line = plain(f"{label}: epoch {epoch}/{total}, {state}")
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield advance


@contextlib.contextmanager
def of_frames() -> Iterator[Callable[[int, int], None]]:
    """Shows the progress of a movie. Yields a function to call with the frames done, and of all."""
    console = Console(stderr=True)
    with Progress(*_columns(), console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("frames", total=None, state="")
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )


def _print_row(console: Console, total_of: dict[str, int], label: str, row: "Row") -> None:
    total = total_of[label]
    done = int(row["epoch"] if "epoch" in row else row["step"] + 1)
    tenths = done * 10 // total > (done - 1) * 10 // total
    if tenths or done in (1, total):
        kind = "epoch" if "epoch" in row else "point"
        line = plain(f"{label}: {kind} {done}/{total}, {_state(row)}")
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _state(row: "Row") -> str:
    name = "cost" if "cost" in row else "value"
    accuracy = f", test accuracy {row['test_accuracy']:.3f}" if "test_accuracy" in row else ""
    return f"{name} {row[name]:.4g}{accuracy}"
