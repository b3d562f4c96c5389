"""Reads a run's folder safely, because it may come from somebody else.

The folder itself may be a link, because the user names it. Inside it only regular files and folders
are allowed. A link could redirect reading, writing or deleting to any place, and reading a pipe or
a device may never end. Every file is read up to a size limit.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gradxform.lab.experiment.messages import on_one_line

MOST_ENTRIES, MOST_LEVELS = 100_000, 32
MOST_TEXT = 2**20  # bytes of a config

_FILES = (
    *("config.toml", "summary.json", "metrics.csv", "members.csv", "costs.csv", "best.toml"),
    *("estimates.csv", "solution.csv", "cost.png", "work.png", "error.png", "solution.png"),
    *("fit.png", "sensitivity.png", "heatmap.png", "starts.png", "batch_size.png"),
)
_FOLDERS = ("checkpoints", "ended", "tensorboard")
_KINDS = {
    stat.S_IFLNK: "is a link",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFDIR: "is a folder",
    stat.S_IFREG: "is a file",
}


class FolderError(OSError):
    """A run's folder contains something that no run writes; the message names it."""


def memory() -> int:
    """The memory of this machine in bytes."""
    if not hasattr(os, "sysconf"):  # Windows
        return 2**34
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check(folder: Path) -> None:
    """Checks everything inside a run's folder before any of it is used.

    Raises:
      FolderError: the folder contains a link, a pipe, a socket or a device, a file in the place of
        a folder, or more than any run writes.
    """
    for _ in files(folder):
        pass
    for name in _FILES:
        is_file(folder / name)
    for name in _FOLDERS:
        is_folder(folder / name)


def files(folder: Path) -> Iterator[Path]:
    """The regular files inside a folder and its subfolders.

    Raises:
      FolderError: the folder contains something else, or more entries or levels than a run writes.
      OSError: a folder cannot be read.
    """
    count, level = 0, [folder]
    for _ in range(MOST_LEVELS):
        inner = []
        for entry in (entry for parent in level for entry in _entries(parent)):
            count += 1
            if count > MOST_ENTRIES:
                raise FolderError(
                    f"{on_one_line(folder)}: holds more than {MOST_ENTRIES} files, "
                    "more than any run writes: name the folder of a run"
                )
            mode = entry.stat(follow_symlinks=False).st_mode
            path = Path(entry.path)
            if stat.S_ISDIR(mode):
                inner.append(path)
            else:
                _require(path, mode, stat.S_IFREG)
                yield path
        level = inner
        if not level:
            return
    raise FolderError(
        f"{on_one_line(folder)}: holds more than {MOST_LEVELS} levels of folders: "
        "name the folder of a run"
    )


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder and not a link to one.

    Raises:
      FolderError: something else is there.
    """
    return _is_there(path, stat.S_IFDIR)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file and not a link to one.

    Raises:
      FolderError: something else is there.
    """
    return _is_there(path, stat.S_IFREG)


def _is_there(path: Path, kind: int) -> bool:
    mode = _mode(path)
    if mode is not None:
        _require(path, mode, kind)
    return mode is not None


def make(path: Path) -> None:
    """Makes a folder unless it exists."""
    if not is_folder(path):
        path.mkdir()


def opened(path: Path, *, write: bool = False) -> io.BufferedReader | io.BufferedRandom:
    """Opens a regular file without following links or waiting for a pipe.

    Raises:
      FolderError: ``path`` is not a regular file.
    """
    flags = os.O_RDWR if write else os.O_RDONLY
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    _require(path, path.lstat().st_mode, stat.S_IFREG)
    file = os.open(path, flags)
    try:
        _require(path, os.fstat(file).st_mode, stat.S_IFREG)
        return open(file, "rb+") if write else open(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read(path: Path, most: int = MOST_TEXT) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
      FolderError: ``path`` is not a regular file or is larger.
    """
    with opened(path) as file:
        content = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if content is None or len(content) > most:
        raise FolderError(f"{on_one_line(path)}: holds more than {most} bytes")
    return content


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        # one more than allowed is enough
        return [entry for entry, _ in zip(found, range(MOST_ENTRIES + 1), strict=False)]


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None


def _require(path: Path, mode: int, kind: int) -> None:
    found = stat.S_IFMT(mode)
    if found == kind:
        return
    if found == stat.S_IFLNK:
        wanted = "which a run does not follow inside its folder"
    elif found in (stat.S_IFREG, stat.S_IFDIR):
        wanted = f"where a run has a {'folder' if kind == stat.S_IFDIR else 'file'}"
    else:
        wanted = "which no run writes"
    what = _KINDS.get(found, "is of an unknown kind")
    raise FolderError(f"{on_one_line(path)}: {what}, {wanted}: remove it")
