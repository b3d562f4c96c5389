"""Runs the files of ``--with``, which register the user's own parts of an experiment.

Only the command line names such files. A config can demand one by its digest, but not load it.
"""

import hashlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gradxform.lab.experiment import folders, registry
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.methods import ConfigError

_PREFIX = "gradxform_with_"  # of the names of these modules

_digests: dict[str, str] = {}


class OwnFileError(ConfigError):
    """A file of ``--with`` cannot be used. The message is one line."""

    def __init__(self, message: str) -> None:
        self.problems = (message,)
        Exception.__init__(self, message)


def load(paths: Sequence[str | Path]) -> None:
    """Runs the files, in order, once each, and remembers their digests.

    Args:
      paths: Python files with different names.

    Raises:
      OwnFileError: a file cannot be read, is a link within a run's folder, or fails. The message
        has the file and the line, and the words of the error.
    """
    _digests.clear()
    for path in map(Path, paths):
        if path.name in _digests:
            raise OwnFileError(f"--with {on_one_line(path)}: two files are named {path.name}")
        content = _content(path)
        _run(path, content)
        _digests[path.name] = hashlib.sha256(content).hexdigest()


def digests() -> dict[str, str]:
    """The SHA-256 of each file that :func:`load` ran last, by name."""
    return dict(_digests)


def differences(wanted: Mapping[str, str]) -> Iterator[str]:
    """One line for each file that a config was made with and that is not the one given now."""
    for name, digest in wanted.items():
        if name not in _digests:
            yield f"this config was run with {on_one_line(name)}: add --with {on_one_line(name)}"
        elif digest != _digests[name]:
            yield (
                f"--with {name}: the file has changed since the run (SHA-256 {digest[:12]}… then, "
                f"{_digests[name][:12]}… now): give the file of then, or remove [with_files] from "
                "the config for a new run"
            )
    for name in _digests.keys() - wanted.keys():
        yield f"--with {name}: this config was run without it; remove [with_files] for a new run"


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
