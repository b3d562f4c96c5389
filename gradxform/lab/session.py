"""What a run and a sweep begin with: a config, a folder, and where it stood if it is resumed."""

import contextlib
import difflib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradxform.lab import endings
from gradxform.lab.interrupts import asked_to_stop
from gradxform.lab.messages import on_one_line
from gradxform.lab.optimizers import ConfigError

if TYPE_CHECKING:
    from gradxform.lab.checkpoints import OnState, Snapshot
    from gradxform.lab.schema import Config

_WITHOUT_FILES = {
    None: "a surface needs no data",
    "digits": "digits come with scikit-learn",
    "synthetic_text": "the text is made on the spot",
}

_MOST_LINES, _MOST_DIFFERENT = 2000, 40  # of two configs that differ
_LONGEST = 500  # characters of what a checkpoint tells of itself


def load(
    name: str | None,
    overrides: Sequence[str],
    data_dir: Path | None,
    out: Path | None,
    folder: Path | None,
    *,
    for_sweep: bool = False,
) -> "Config":
    """The config that is asked for; a ``folder`` that is resumed has its own."""
    from gradxform.lab.config import load_config, require_sweep
    from gradxform.lab.schema import SurfaceConfig

    if folder is None and name is None:
        endings.fail(
            "missing argument CONFIG: name a TOML file or a shipped config, see gradxform list"
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
    dataset = None if isinstance(config, SurfaceConfig) else config.task.dataset
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
    """The config of a run that is resumed, once all in its folder is seen to be in order."""
    from gradxform.lab import folders
    from gradxform.lab.config import load_config, read_config, to_toml

    kept = folder / "config.toml"
    content = b""
    if os.path.isdir(folder):
        folders.check(folder)
        content = folders.read(kept) if folders.is_file(kept) else b""
    if not content:  # it is claimed before it is written
        endings.fail(f"--resume {folder}: no run has begun there, it has no config.toml")
    if out is not None:
        endings.fail(f"--out {out}: a run that is resumed stays in its folder, {folder}")
    config = read_config(content, str(kept), for_sweep=for_sweep)
    if name is not None:
        given = load_config(name, overrides, for_sweep=for_sweep)
    else:
        given = read_config(content, str(kept), overrides, for_sweep=for_sweep)
    _end_if_different(to_toml(config), to_toml(given), str(kept), "given now")
    if folders.is_file(folder / "summary.json"):
        endings.say(f"{folder}: this run is finished, nothing is left to do")
        raise typer.Exit
    return config


def _end_if_different(before: str, now: str, name_before: str, name_now: str) -> None:
    """Ends with the difference between two configs if there is one."""
    if before == now:
        return
    # lines that a stranger wrote may be so many that comparing them takes for ever
    lines = difflib.unified_diff(
        before.splitlines()[:_MOST_LINES],
        now.splitlines()[:_MOST_LINES],
        name_before,
        name_now,
        lineterm="",
    )
    difference = "\n".join(itertools.islice(lines, _MOST_DIFFERENT))
    endings.fail(
        f"a run goes on with the config that it was begun with; this differs:\n{difference}"
    )


@contextlib.contextmanager
def place(
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
    from gradxform.lab import checkpoints, records, results
    from gradxform.lab.config import to_toml
    from gradxform.lab.schema import SurfaceConfig

    on_surface = isinstance(config, SurfaceConfig)
    found = None if on_surface else checkpoints.newest(folder / "checkpoints", say)
    if found is None:
        say(f"{folder} has no usable checkpoint: starts from the beginning")
        return None
    snapshot, about = found
    begun_by, begun_with, was = records.made_with(about)
    if begun_by != command:
        endings.fail(f"{folder} goes on by gradxform {begun_by} --resume {folder}")
    _end_if_different(begun_with, to_toml(config), "checkpoint", str(folder / "config.toml"))
    say(f"goes on from checkpoint {snapshot.number}")
    if was != results.made_with():
        versions = ", ".join(f"{name} {version}" for name, version in was["versions"].items())
        where = on_one_line(f"{versions} on {was['device']}")[:_LONGEST]
        say(f"it was written by {where}: numbers may differ from here on")
    return snapshot


@contextlib.contextmanager
def keeping(
    folder: Path, config: "Config", command: str, writes: bool
) -> "Iterator[tuple[OnState | None, Callable[[], None]]]":
    """Yields what a run on data calls after each epoch, and what one on a surface asks at times.

    The first keeps the checkpoints that the config wants, and both end a run that Ctrl-C stops.
    """
    from gradxform.lab import checkpoints, results
    from gradxform.lab.config import to_toml
    from gradxform.lab.schema import SurfaceConfig

    advice = ""
    try:
        if isinstance(config, SurfaceConfig):
            with asked_to_stop(endings.say, "stops after this optimiser") as asked:

                def stop_if_asked() -> None:
                    if asked():
                        raise KeyboardInterrupt

                yield None, stop_if_asked
            return
        about = {"command": command, "config": to_toml(config), "made_with": results.made_with()}
        options = config.checkpoint.model_dump() | {"writes": writes}
        if writes and config.checkpoint.every:
            advice = f"; it goes on by gradxform {command} --resume {folder}"
        with checkpoints.keeping(
            folder / "checkpoints", about=about, say=endings.say, **options
        ) as on_state:
            yield on_state, lambda: None
    except KeyboardInterrupt:
        endings.fail(f"interrupted{advice}", endings.INTERRUPTED)


@contextlib.contextmanager
def _nowhere() -> Iterator[Path]:
    """The folder of a process that leaves the results to another."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.toml").touch()
        yield Path(name)
