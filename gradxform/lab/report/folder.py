"""The folder of a run, and how files are written into it."""

import contextlib
import datetime
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gradxform.lab.experiment.experiment import Experiment

_TAKEN = "is there already; name a new folder, no run is overwritten"


def new_folder(parent: str | Path, name: str) -> Path:
    """Makes a new folder in ``parent``, named after ``name`` and the time."""
    stem = f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = Path(parent) / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("the numbers never end")


@contextlib.contextmanager
def run_folder(experiment: Experiment, out: Path | None = None) -> Iterator[Path]:
    """Makes a folder for a run and writes ``config.toml`` into it.

    If the run writes nothing else, the folder is removed again.

    Args:
      experiment: the experiment. ``gradxform run config.toml`` repeats it.
      out: the folder to make; if not given, a new folder in ``config.output.folder``.

    Raises:
      OSError: the folder cannot be made, or ``out`` is not empty. The message names the option or
        the key.
    """
    config = experiment.config
    parent = Path(config.output.folder) if out is None else out.parent
    named = f"output.folder: {parent}" if out is None else f"--out {out}"
    with contextlib.ExitStack() as undo:
        try:
            fresh = out is None or not out.exists()
            if out is not None and not fresh and (not out.is_dir() or any(out.iterdir())):
                raise OSError(0, _TAKEN)
            for ancestor in reversed([parent, *parent.parents]):
                if not ancestor.is_dir():
                    ancestor.mkdir(exist_ok=True)
                    undo.callback(_remove_if_empty, ancestor)
            folder = out or new_folder(parent, config.name)
            if fresh:
                if out is not None:
                    out.mkdir()
                undo.callback(_remove_if_empty, folder)
            try:
                (folder / "config.toml").open("x").close()
            except FileExistsError:  # another run started at the same time
                raise OSError(0, _TAKEN) from None
            undo.callback(_remove_lone_config, folder)
            write_atomically(folder / "config.toml", experiment.toml)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise OSError(f"{named}: {error.strerror}{where}") from error
        yield folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(data)
            f.close()
            os.chmod(f.name, 0o666 & ~_umask())
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def _remove_lone_config(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if [file.name for file in folder.iterdir()] == ["config.toml"]:
            (folder / "config.toml").unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
