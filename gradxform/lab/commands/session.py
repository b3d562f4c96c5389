"""The start of a run or a sweep: its config, its folder, and the checkpoint it resumes from."""

import contextlib
import difflib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradxform.lab.commands import endings
from gradxform.lab.experiment.kinds import kind_of
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.training.interrupts import asked_to_stop

if TYPE_CHECKING:
    from gradxform.lab.experiment.schema import Config
    from gradxform.lab.training.checkpoints import OnState, Snapshot

_WITHOUT_FILES = {
    None: "a surface needs no data",
    "digits": "digits come with scikit-learn",
    "synthetic_text": "the text is generated",
    "burgers": "the points are generated",
}

_MOST_LINES, _MOST_DIFFERENT = 2000, 40  # lines to compare, and lines of difference to print
_LONGEST = 500  # characters of a checkpoint's description


def load(
    name: str | None,
    overrides: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    folder: Path | None,
    *,
    for_sweep: bool = False,
) -> "Config":
    """The requested config, or the config of the ``folder`` to resume."""
    from gradxform.lab.experiment.load import load_config, require_sweep

    if folder is None and name is None:
        endings.fail(
            "missing argument CONFIG: give a TOML file or the name of a shipped config "
            "(see gradxform list configs)"
        )
    try:
        if folder is None:
            config = load_config(str(name), overrides, for_sweep=for_sweep)
        else:
            config = _kept_config(name, overrides, out, folder, for_sweep=for_sweep)
        if for_sweep:
            require_sweep(config)
    except (ConfigError, OSError) as error:
        endings.fail(str(error))
    dataset = getattr(config.task, "dataset", None)
    if data_dir is not None and dataset in _WITHOUT_FILES:
        endings.say(f"--data-dir {data_dir} is not used: {_WITHOUT_FILES[dataset]}")
    return config


def _kept_config(
    name: str | None,
    overrides: Sequence[str],
    out: Path | None,
    folder: Path,
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
        given = load_config(name, overrides, for_sweep=for_sweep)
    else:
        given = read_config(content, str(kept), overrides, for_sweep=for_sweep)
    _end_if_different(to_toml(config), to_toml(given), str(kept), "given now")
    if folders.is_file(folder / "summary.json"):
        endings.say(f"{folder}: this run is finished; there is nothing to resume")
        raise typer.Exit
    return config


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


@contextlib.contextmanager
def place(
    config: "Config", command: str, out: Path | None, resume: Path | None, writes: bool
) -> "Iterator[tuple[Path, Snapshot | None]]":
    """The folder of a run, locked for this process, and the checkpoint to resume from."""
    from gradxform.lab.report import results
    from gradxform.lab.training import checkpoints

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
    """The last undamaged checkpoint of the run in a folder."""
    from gradxform.lab.experiment.load import to_toml
    from gradxform.lab.report import results
    from gradxform.lab.training import checkpoints, records

    has_any = kind_of(config).has_epochs
    found = checkpoints.newest(folder / "checkpoints", say) if has_any else None
    if found is None:
        say(f"{folder} has no usable checkpoint: starting from the beginning")
        return None
    snapshot, about = found
    begun_by, begun_with, was = records.made_with(about)
    if begun_by != command:
        mend = f"use gradxform {begun_by} --resume {folder}"
        endings.fail(f"{folder} belongs to gradxform {begun_by}: {mend}")
    _end_if_different(begun_with, to_toml(config), "checkpoint", str(folder / "config.toml"))
    say(f"resuming from checkpoint {snapshot.number}")
    if was != results.made_with():
        versions = ", ".join(f"{name} {version}" for name, version in was["versions"].items())
        where = on_one_line(f"{versions} on {was['device']}")[:_LONGEST]
        say(f"the checkpoint was written by {where}: numbers may differ from here on")
    return snapshot


@contextlib.contextmanager
def keeping(
    folder: Path, config: "Config", command: str, writes: bool
) -> "Iterator[tuple[OnState | None, Callable[[], None]]]":
    """Yields two functions: ``on_state`` for runs on data, ``stop_if_asked`` for surfaces.

    A run on data calls the first after each epoch, and it writes the checkpoints of the config. A
    run on a surface calls the second from time to time. Both end the run after Ctrl-C.
    """
    from gradxform.lab.experiment.load import to_toml
    from gradxform.lab.report import results
    from gradxform.lab.training import checkpoints

    advice = ""
    try:
        if not kind_of(config).has_epochs:
            with asked_to_stop(endings.say, "stopping after this optimiser") as asked:

                def stop_if_asked() -> None:
                    if asked():
                        raise KeyboardInterrupt

                yield None, stop_if_asked
            return
        about = {"command": command, "config": to_toml(config), "made_with": results.made_with()}
        options = config.model_dump()["checkpoint"] | {"writes": writes}
        if writes and options["every"]:
            advice = f"; to continue: gradxform {command} --resume {folder}"
        with checkpoints.keeping(
            folder / "checkpoints", about=about, say=endings.say, **options
        ) as on_state:
            yield on_state, lambda: None
    except KeyboardInterrupt:
        endings.fail(f"interrupted{advice}", endings.INTERRUPTED)


@contextlib.contextmanager
def _nowhere() -> Iterator[Path]:
    """A temporary folder for a process that does not write the results."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.toml").touch()
        yield Path(name)
