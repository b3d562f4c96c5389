"""Finds, checks and removes the folders of checkpoints.

A run's folder may come from somebody else or may be the wrong folder. So a checkpoint is removed
only if this library wrote it: its name and manifest fit, and it holds only files that the manifest
names.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
from pathlib import Path

from gradxform.lab.experiment import folders
from gradxform.lab.experiment.messages import on_one_line

_NUMBER = re.compile("[0-9]{8,18}")
_UNFINISHED, _REMOVED = ".gradxform-unfinished-", ".gradxform-removed-"
_OURS = re.compile(f"{_NUMBER.pattern}|({re.escape(_UNFINISHED)}|{re.escape(_REMOVED)})[0-9a-z_]+")
_MOST_NAMED = 2**24  # bytes of a manifest
_PARTS = re.compile(r"manifest\.json|told\.json|arrays|arrays\.orbax-checkpoint-tmp.*")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says why."""


def begun(folder: Path) -> Path:
    """Creates a folder for a new checkpoint and removes unfinished ones."""
    folders.make(folder)
    for left in folder.glob(".gradxform-*"):  # left by a process that was killed
        discard(left)
    new = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    (new / "manifest.json").write_text("{}", encoding="utf-8")
    new.chmod(0o777 & ~_umask())
    return new


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder with their numbers, in order, including damaged ones."""
    return sorted(
        (int(path.name), path)
        for path in folder.iterdir()
        if _NUMBER.fullmatch(path.name) and path.name == f"{int(path.name):08d}"
    )


def discard(path: Path) -> None:
    """Removes a checkpoint; it is renamed first, so that no half checkpoint is ever visible."""
    with contextlib.suppress(OSError):
        if own_files(path) is None:
            return
        if _NUMBER.fullmatch(path.name):
            hidden = path.with_name(f"{_REMOVED}{path.name}")
            if hidden.exists():
                return
            os.rename(path, hidden)
            path = hidden
        for file in own_files(path) or []:  # the manifest identifies it, so it goes last
            file.unlink()
        _remove_empty(path)


def _remove_empty(folder: Path) -> None:
    """Removes a folder and its subfolders if they are empty."""
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(inner)


def own_files(path: Path) -> list[Path] | None:
    """The files of a checkpoint with the manifest last; ``None`` if this library did not write it.

    It counts as ours if its name fits, it has a manifest, and it contains only its own files.
    """
    try:
        if not _OURS.fullmatch(path.name) or not folders.is_folder(path):
            return None
        found = list(folders.files(path))
        if not found and not _NUMBER.fullmatch(path.name):
            return []
        named = read_manifest(path)
    except (CheckpointError, OSError):
        return None
    names = {file.relative_to(path).as_posix() for file in found} - {"manifest.json"}
    if path.name.startswith(_UNFINISHED):
        foreign = {name for name in names if not _PARTS.fullmatch(name.partition("/")[0])}
    else:
        foreign = names - named.keys() if named else {"all of it"}
    return None if foreign else sorted(found, key=lambda file: file == path / "manifest.json")


def set_aside(path: Path) -> None:
    """Renames whatever stands in the place of a checkpoint."""
    for number in itertools.count(1):
        aside = path.with_name(f"set-aside-{path.name}-{number}")
        if not os.path.lexists(path):
            return
        if not os.path.lexists(aside):
            os.rename(path, aside)


def read_manifest(path: Path) -> dict[str, str]:
    """The SHA-256 of each file according to a checkpoint's manifest."""
    try:
        found = json.loads(folders.read(path / "manifest.json", _MOST_NAMED).decode())
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"manifest.json: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError("manifest.json: should be a table")
    for name, digest in found.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise CheckpointError(f"manifest.json: {on_one_line(name)} has no SHA-256")
    return found


def digests_of(path: Path) -> dict[str, str]:
    """The SHA-256 of every file except the manifest."""
    digests, total = {}, 0
    for file in folders.files(path):
        total += file.lstat().st_size
        if total > folders.memory():
            raise OSError(f"{on_one_line(file.relative_to(path))} does not fit into memory")
        if file != path / "manifest.json":
            with folders.opened(file) as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            digests[file.relative_to(path).as_posix()] = digest
    return digests


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
