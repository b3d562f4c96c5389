"""Resuming a run: the config and the last checkpoint in its folder."""

import difflib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradxform.lab.commands import endings
from gradxform.lab.experiment.kinds import kind_of
from gradxform.lab.experiment.messages import on_one_line

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.experiment.schema import Config
    from gradxform.lab.training.checkpoints import Snapshot

_MOST_LINES, _MOST_DIFFERENT = 2000, 40  # lines to compare, and lines of difference to print
_LONGEST = 500  # characters of a checkpoint's description


def kept_config(
    folder: Path,
    name: str | None = None,
    settings: Sequence[str] = (),
    out: Path | None = None,
    *,
    for_sweep: bool,
) -> "Config":
    """The config of the run to resume, after a check of its folder."""
    from gradxform.lab.experiment import folders
    from gradxform.lab.experiment.load import load_config, read_config, to_toml

    kept = folder / "config.toml"
    content = b""
    if os.path.isdir(folder):
        folders.check(folder)
        content = folders.read(kept) if folders.is_file(kept) else b""
    if not content:  # the file is created first and written later
        endings.fail(f"--resume {folder}: no run has started there, config.toml is missing")
    if out is not None:
        endings.fail(f"--out {out}: a resumed run stays in its folder {folder}; leave out --out")
    config = read_config(content, str(kept), for_sweep=for_sweep)
    if name is not None:
        given = load_config(name, settings, for_sweep=for_sweep)
    else:
        given = read_config(content, str(kept), settings, for_sweep=for_sweep)
    _end_if_different(to_toml(config), to_toml(given), str(kept), "given now")
    if folders.is_file(folder / "summary.json"):
        endings.say(f"{folder}: this run is finished; there is nothing to resume")
        raise typer.Exit
    return config


def last_snapshot(
    folder: Path, experiment: "Experiment", command: str, say: Callable[[str], None]
) -> "Snapshot | None":
    """The last undamaged checkpoint of the run in a folder."""
    from gradxform.lab.report.files import made_with
    from gradxform.lab.training import checkpoints, records

    has_any = kind_of(experiment.config).has_epochs
    found = checkpoints.newest(folder / "checkpoints", say) if has_any else None
    if found is None:
        say(f"{folder} has no usable checkpoint: starting from the beginning")
        return None
    snapshot, about = found
    begun_by, begun_with, was = records.made_with(about)
    if begun_by != command:
        mend = f"use gradxform {begun_by} --resume {folder}"
        endings.fail(f"{folder} belongs to gradxform {begun_by}: {mend}")
    _end_if_different(begun_with, experiment.toml, "checkpoint", str(folder / "config.toml"))
    say(f"resuming from checkpoint {snapshot.number}")
    if was != made_with():
        versions = ", ".join(f"{name} {version}" for name, version in was["versions"].items())
        where = on_one_line(f"{versions} on {was['device']}")[:_LONGEST]
        say(f"the checkpoint was written by {where}: numbers may differ from here on")
    return snapshot


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
