"""Resuming a run: the config and the last checkpoint in its folder."""

import contextlib
import difflib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from gradxform.lab.commands import endings
from gradxform.lab.commands.request import Request, Resumed
from gradxform.lab.experiment import folders, toml
from gradxform.lab.experiment.kinds import kind_of
from gradxform.lab.experiment.messages import on_one_line

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.experiment.schema import Config
    from gradxform.lab.training.checkpoints import Snapshot

_MOST_LINES, _MOST_DIFFERENT = 2000, 40  # lines to compare, and lines of difference to print
_NEEDED = "to train for longer, a run needs checkpoint.every above 0 from its start"
_LONGEST = 500  # characters of a checkpoint's description


def kept_config(request: Request, *, for_sweep: bool) -> "Config":
    """The config of the run to resume, after a check of its folder."""
    from gradxform.lab.experiment.load import load_config, read_config, to_toml

    folder = request.resume or Path()
    kept, content = _content(folder)
    if request.out is not None:
        out = f"--out {request.out}"
        endings.fail(f"{out}: a resumed run stays in its folder {folder}; leave out --out")
    config = read_config(content, str(kept), for_sweep=for_sweep)
    if request.epochs is not None and request.epochs != _epochs_of(config, request.epochs):
        settings = [f"training.epochs={request.epochs}"]
        return read_config(content, str(kept), settings, for_sweep=for_sweep)
    if request.name is not None:
        given = load_config(request.name, request.settings, for_sweep=for_sweep)
    else:
        given = read_config(content, str(kept), request.settings, for_sweep=for_sweep)
    _end_if_different(to_toml(config), to_toml(given), str(kept), "given now")
    if folders.is_file(folder / "summary.json"):
        endings.say(f"{folder}: this run is finished; there is nothing to resume")
        raise typer.Exit
    return config


def command_of(folder: Path) -> str:
    """The command that began the run in a folder: ``run`` or ``sweep``."""
    from gradxform.lab.experiment.load import read_config

    kept, content = _content(folder)
    for file, command in (("metrics.csv", "run"), ("members.csv", "sweep")):
        if folders.is_file(folder / file):
            return command
    if folders.is_folder(folder / "checkpoints"):
        from gradxform.lab.training import checkpoints, records

        found = checkpoints.newest(folder / "checkpoints", lambda message: None)
        if found is not None:
            return records.made_with(found[1])[0]
    if read_config(content, str(kept), for_sweep=False).sweep is None:
        return "run"
    mend = f"use gradxform run --resume {folder}, or gradxform sweep --resume {folder}"
    endings.fail(f"{folder}: it may be a run or a sweep, since no epoch has ended: {mend}")


def last_snapshot(
    request: Request, experiment: "Experiment", command: str, say: Callable[[str], None]
) -> Resumed:
    """The last undamaged checkpoint of the run to resume."""
    from gradxform.lab.report.files import made_with
    from gradxform.lab.training import checkpoints, records

    folder = request.resume or Path()
    has_any = kind_of(experiment.config).has_epochs
    found = checkpoints.newest(folder / "checkpoints", say) if has_any else None
    if found is None:
        if request.epochs is not None:
            endings.fail(f"{folder} has no usable checkpoint: {_NEEDED}")
        say(f"{folder} has no usable checkpoint: starting from the beginning")
        return Resumed(folder, None, False)
    snapshot, about = found
    begun_by, begun_with, was = records.made_with(about)
    if begun_by != command:
        mend = f"use gradxform {begun_by} --resume {folder}"
        endings.fail(f"{folder} belongs to gradxform {begun_by}: {mend}")
    is_longer = command == "run" and _is_longer(begun_with, experiment.toml)
    if not is_longer:
        where = str(folder / "config.toml")
        _end_if_different(begun_with, experiment.toml, "checkpoint", where)
    say(f"resuming from checkpoint {snapshot.number}")
    if was != made_with():
        versions = ", ".join(f"{name} {version}" for name, version in was["versions"].items())
        where = on_one_line(f"{versions} on {was['device']}")[:_LONGEST]
        say(f"the checkpoint was written by {where}: numbers may differ from here on")
    return Resumed(folder, snapshot, is_longer)


def ended_states(
    folder: Path, numbers: Mapping[str, int], say: Callable[[str], None]
) -> "dict[str, Snapshot]":
    """The states of optimisers at their ends, by label, as far as they are kept.

    Args:
      folder: the folder of the run.
      numbers: by label, the number of the optimiser in the config, counted from 0.
      say: prints a message.
    """
    from gradxform.lab.training import checkpoints

    places = {label: ended_folder(folder, number) for label, number in numbers.items()}
    found = {}
    for label, place in places.items():
        kept = checkpoints.newest(place, say) if folders.is_folder(place.parent) else None
        if kept is not None:
            found[label] = kept[0]
    return found


def ended_folder(folder: Path, number: int) -> Path:
    """Where a run keeps the state of its optimiser of this number at its end."""
    return folder / "ended" / f"{number:04d}"


@contextlib.contextmanager
def extended(folder: Path, experiment: "Experiment") -> Iterator[None]:
    """Makes a finished run an unfinished one with more epochs, and locks it."""
    from gradxform.lab.report.folder import write_atomically
    from gradxform.lab.training import checkpoints

    (folder / "summary.json").unlink(missing_ok=True)
    write_atomically(folder / "config.toml", experiment.toml)
    with checkpoints.locked(folder):  # the file that was locked before is another one
        yield


def lacks_end(folder: Path, label: str) -> NoReturn:
    """Ends the command because an optimiser cannot train for longer."""
    endings.fail(f"{folder}: the state of {label} at its end is missing: {_NEEDED}")


def _content(folder: Path) -> tuple[Path, bytes]:
    """The config file of a run, and its content."""
    kept = folder / "config.toml"
    content = b""
    if os.path.isdir(folder):
        folders.check(folder)
        content = folders.read(kept) if folders.is_file(kept) else b""
    if not content:  # the file is created first and written later
        endings.fail(f"{folder}: no run has started there, config.toml is missing")
    return kept, content


def _epochs_of(config: "Config", wanted: int) -> int:
    """The epochs of a config that may get more of them."""
    given = f"--epochs {wanted}"
    epochs = getattr(config.training, "epochs", None)
    if epochs is None or not kind_of(config).has_epochs:
        kind = config.task.kind
        endings.fail(
            f"{given}: a task of kind {kind!r} has no epochs; run it again with more steps"
        )
    if wanted < epochs:
        endings.fail(f"{given}: this run already has {epochs} epochs; give more")
    return epochs


def _is_longer(before: str, now: str) -> bool:
    """Whether two configs differ only in their number of epochs, of which there are more now."""
    if before == now:
        return False
    try:
        tables = [toml.parse(text) for text in (before, now)]
        first, second = (table["training"].pop("epochs") for table in tables)
        return tables[0] == tables[1] and first < second
    except (AttributeError, LookupError, TypeError, ValueError):  # a config that no run wrote
        return False


def _end_if_different(before: str, now: str, name_before: str, name_now: str) -> None:
    """Ends the command and prints the difference if two configs differ."""
    if before == now:
        return
    # a config from an untrusted source may be so long that a full comparison never ends
    lines = difflib.unified_diff(
        before.splitlines()[:_MOST_LINES],
        now.splitlines()[:_MOST_LINES],
        name_before,
        name_now,
        lineterm="",
    )
    difference = "\n".join(itertools.islice(lines, _MOST_DIFFERENT))
    endings.fail(
        f"a run resumes only with the config it was started with. Difference:\n{difference}"
    )
