"""The loggers of a run: each gets every row, and is closed at the end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradxform.lab.commands import endings
from gradxform.lab.experiment import registry
from gradxform.lab.experiment.problems import suggest

Log = Callable[[str, Mapping[str, Any]], Any]


def check(names: Sequence[str]) -> None:
    """Ends the command if there is no logger of a name."""
    known = (*registry.OURS["logger"], *registry.named("logger"))
    for name in names:
        if name not in known:
            hint = suggest(name, known) or f"; there are {', '.join(known)}"
            endings.fail(f"--log {name}: there is no such logger{hint}")


@contextlib.contextmanager
def logging(names: Sequence[str], folder: Path, config: Any) -> Iterator[Log]:
    """Opens the loggers of these names, and closes them at the end.

    Args:
      names: names of loggers.
      folder: the folder of the run.
      config: the config of the run.

    Yields:
      A function of an optimiser's label and a row, that all loggers get.
    """
    with contextlib.ExitStack() as until_the_end:
        logs = [
            (name, until_the_end.enter_context(_opened(name, folder, config)))
            for name in dict.fromkeys(names)
        ]

        def log(label: str, row: Mapping[str, Any]) -> None:
            for name, own in logs:
                with _in_own_words(name):
                    own(label, dict(row))

        yield log


@contextlib.contextmanager
def _opened(name: str, folder: Path, config: Any) -> Iterator[Log]:
    entry = registry.find("logger", name)
    if entry is None:
        from gradxform.lab.report.tensorboard import events

        with events(folder / name) as log:
            yield log
        return
    at_hand = {"folder": folder, "config": config.model_dump(exclude_none=True)}
    takes = registry.parameters_of(entry.make)
    given = {key: value for key, value in at_hand.items() if key in takes}
    manager = contextlib.contextmanager(entry.make)(**given)
    with _in_own_words(name):
        log = manager.__enter__()
    try:
        yield log
    finally:
        with _in_own_words(name):
            manager.__exit__(None, None, None)


@contextlib.contextmanager
def _in_own_words(name: str) -> Iterator[None]:
    entry = registry.find("logger", name)
    try:
        yield
    except Exception as error:
        if entry is None:
            raise
        said = registry.in_own_words(error, entry.make)
        raise registry.OwnError(f"--log {name}: {said}") from error
