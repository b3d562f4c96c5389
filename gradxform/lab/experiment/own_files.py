"""Runs the files of ``--with``, which register the user's own parts of an experiment.

Only the command line names such files. A config can demand one by its digest, but not load it.
"""

import hashlib
import importlib.abc
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradxform.lab.experiment import folders, registry
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.problems import ConfigError

_PREFIX = "gradxform_with_"  # of the names of these modules

_LONGEST = 200  # characters of a name

_digests: dict[str, str] = {}
_options: list[str] = []


class OwnFileError(ConfigError):
    """A file of ``--with`` cannot be used. The message is one line."""

    def __init__(self, message: str) -> None:
        self.problems = (message,)
        Exception.__init__(self, message)


def load(paths: Sequence[str | Path]) -> None:
    """Runs the files, in order, and remembers their digests; forgets those of an earlier call.

    Args:
      paths: Python files with different names.

    Raises:
      OwnFileError: a file cannot be read, is a link within a run's folder, or fails. The message
        has the file and the line, and the words of the error.
    """
    _digests.clear()
    _options.clear()
    registry.forget(of_files=True)
    for path in map(Path, paths):
        if path.name in _digests:
            raise OwnFileError(f"--with {on_one_line(path)}: two files are named {path.name}")
        content = _content(path)
        _run(path, content)
        _digests[path.name] = hashlib.sha256(content).hexdigest()
        _options.append(f" --with {shlex.quote(str(path))}")


def options() -> str:
    """The options ``--with`` that make a command run the same files again."""
    return "".join(_options)


def with_digests(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's tables, with ``with_files``: the SHA-256 of each file that :func:`load` ran.

    Raises:
      OwnFileError: the config was run with other files, or with another content of a file.
    """
    if not _digests:
        return table
    if "with_files" in table:
        require(table)
    return {**table, "with_files": dict(_digests)}


def require(table: Mapping[str, Any]) -> None:
    """Checks that the files of a config's ``with_files`` are those that :func:`load` ran.

    Raises:
      OwnFileError: a file is missing, or has changed.
    """
    wanted = table.get("with_files")
    if not isinstance(wanted, Mapping):
        return
    new_run = "for a new run remove [with_files] from the config"
    for name, digest in wanted.items():
        file = f"--with {on_one_line(name)[:_LONGEST]}"
        if name not in _digests:
            raise OwnFileError(f"{file} is missing: this config was run with it; {new_run}")
        if digest != _digests[name]:
            then, now = (on_one_line(x)[:12] for x in (digest, _digests[name]))
            changed = f"its content has changed since (SHA-256 {then}… then, {now}… now)"
            raise OwnFileError(f"{file}: {changed}; restore it, or {new_run}")
    for name in _digests.keys() - wanted.keys():
        raise OwnFileError(f"--with {name}: this config was run without it; {new_run}")


class _Loader(importlib.abc.SourceLoader):
    """Runs exactly the bytes whose digest is kept, and writes no cache next to the file."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = str(path), content

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str | bytes) -> bytes:
        if os.fspath(path) != self._path:
            raise OSError(f"{path!r} is not {self._path}")
        return self._content


def _content(path: Path) -> bytes:
    if path.suffix != ".py":
        raise OwnFileError(f"--with {on_one_line(path)}: should be a Python file, NAME.py")
    try:
        # in the folder of a run, which may come from somebody else, nothing is followed
        if (path.parent / "config.toml").exists():
            return folders.read(path)
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OwnFileError(f"--with {on_one_line(path)}: cannot be read: {reason}") from None
    if len(content) > folders.MOST_TEXT:
        raise OwnFileError(f"--with {on_one_line(path)}: more than {folders.MOST_TEXT} bytes")
    return content


def _run(path: Path, content: bytes) -> None:
    name = _PREFIX + path.stem
    spec = importlib.util.spec_from_loader(name, _Loader(path, content), origin=str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look there for the module of a class
    try:
        with registry.registering(path.name):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = registry.in_own_words(error, None, str(path))
        raise OwnFileError(f"--with {on_one_line(path)}: {said}") from error
