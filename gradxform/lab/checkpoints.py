"""Checkpoints: where a long run stands, on disk, so that it can go on after whatever stopped it.

A checkpoint is a folder named after the epochs done, with

- ``arrays``, written by Orbax;
- ``told.json``, what is told about them in text and numbers;
- ``manifest.json``, the SHA-256 of every other file, written last.

It is made under another name and renamed when it is whole. Nothing here asks for the time of day:
checkpoints are ordered by their numbers.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from gradxform.lab.processes import any_of
from gradxform.tree import PyTree

Say = Callable[[str], None]

_METADATA = 2**18  # bytes, more than Orbax writes beside the arrays of a large tree


class Snapshot(NamedTuple):
    """Where a run stands after an epoch, and all that it takes to go on."""

    number: int  #: epochs done, of all optimisers together
    told: dict[str, Any]  #: what JSON can hold
    arrays: PyTree  #: of arrays; as read from disk a list of them, for :func:`fit`


OnState = Callable[[int, Callable[[], Snapshot]], None]
"""Called after each epoch with the number of epochs done and what makes a snapshot of them."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says why."""


@contextlib.contextmanager
def keeping(
    folder: Path, *, every: int, keep: int, about: Any, say: Say, writes: bool = True
) -> Iterator[OnState]:
    """Checkpoints of a run, and an end between two epochs for who interrupts it.

    SIGINT (Ctrl-C) and SIGTERM let the epoch end and its checkpoint be written, then raise
    ``KeyboardInterrupt``, in all processes that do the run together; a second one ends the process
    at once. A checkpoint that cannot be written is told, and the run goes on.

    Args:
      folder: where checkpoints are.
      every: a checkpoint is due each so many epochs.
      keep: how many are kept, the last ones.
      about: what JSON can hold, kept beside the snapshot.
      say: told in words what happens.
      writes: whether this is the process, of several, that writes.

    Yields:
      What a run calls after each epoch.
    """
    with _asked_to_stop(say) as asked:

        def on_state(number: int, snapshot: Callable[[], Snapshot]) -> None:
            stops = any_of(asked.is_set())
            if number % every and not stops:
                return
            taken = snapshot()  # by all processes, each of which has a part
            try:
                if writes:
                    save(folder, taken, keep=keep, about=about)
            except OSError as error:
                there = [str(number) for number, _ in _checkpoints(folder)]
                last = f"the last one is {there[-1]}" if there else "there is none yet"
                say(f"checkpoint {number} cannot be written, {last}: {error}")
            if stops:
                raise KeyboardInterrupt

        yield on_state
        if asked.is_set():
            raise KeyboardInterrupt


def save(folder: Path, snapshot: Snapshot, *, keep: int, about: Any = None) -> None:
    """Writes a checkpoint whole or not at all, then removes those that are no longer wanted.

    Args:
      folder: where checkpoints are; made if it is not there.
      snapshot: what to write.
      keep: how many to keep, the last ones.
      about: what JSON can hold, kept beside it.

    Raises:
      OSError: it cannot be written; those before it are as they were.
    """
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    new = folder / ".new"
    new.mkdir()
    try:
        arrays = [np.asarray(x) for x in jax.device_get(_raw(snapshot.arrays))]
        told = {"number": snapshot.number, "told": snapshot.told, "about": about}
        text = json.dumps(told).encode()
        _check_space(new, sum(x.nbytes for x in arrays) + len(text) + _METADATA)
        with _as_os_error(), _orbax() as checkpointer:
            # Orbax refuses arrays without entries, which hold nothing
            checkpointer.save(new.absolute() / "arrays", [x for x in arrays if x.size])
        (new / "told.json").write_bytes(text)
        (new / "manifest.json").write_text(json.dumps(_digests(new)), encoding="utf-8")
        for file in filter(Path.is_file, new.rglob("*")):
            with file.open("rb+") as opened:  # on the disk before the one before it goes
                os.fsync(opened.fileno())
        for number, old in _checkpoints(folder):
            if number >= snapshot.number:  # damaged, or the run would not have been here again
                _discard(old)
        os.rename(new, folder / f"{snapshot.number:08d}")
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for _, old in _checkpoints(folder)[:-keep]:
        _discard(old)


def newest(folder: Path, say: Say) -> tuple[Snapshot, Any] | None:
    """The last checkpoint that is whole, and what was told about it; ``None`` if there is none.

    Args:
      folder: where checkpoints are.
      say: told which ones are damaged, and how.
    """
    for number, path in reversed(_checkpoints(folder)):
        try:
            return _read(path)
        except CheckpointError as error:
            say(f"checkpoint {number} is damaged, the one before it is tried: {error}")
    return None


def fit(arrays: Sequence[np.ndarray], like: PyTree) -> PyTree:
    """The arrays of a checkpoint, on the host, in the structure that they were saved from.

    Args:
      arrays: of a snapshot that was read from disk.
      like: a tree of the same structure, shapes and dtypes.

    Raises:
      CheckpointError: they are others.

    >>> fit([np.ones(2, np.float32)], {"rate": jnp.zeros(2)})
    {'rate': array([1., 1.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(like)
    wanted = jax.eval_shape(_raw, leaves)
    given = iter(arrays)
    found = [next(given, None) if x.size else np.zeros(x.shape, x.dtype) for x in wanted]
    fits = (
        x is not None and (x.shape, x.dtype) == (expected.shape, expected.dtype)
        for x, expected in zip(found, wanted, strict=True)
    )
    if not all(fits) or next(given, None) is not None:
        raise CheckpointError("its arrays are not those of this run")
    restored = (_wrapped(np.asarray(x), leaf.dtype) for x, leaf in zip(found, leaves, strict=True))
    return jax.tree.unflatten(structure, restored)


@contextlib.contextmanager
def of_this_version() -> Iterator[None]:
    """What another version of the lab has told differently ends in a ``CheckpointError``."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"another version has written it: {error!r}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder for one process alone; the lock ends with the process.

    Raises:
      OSError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / "config.toml").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder}: another process is running this") from None
        yield


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder, damaged ones included, in their order."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdecimal())


def _check_space(folder: Path, size: int) -> None:
    """Raises an error if a file of so many bytes does not fit; Orbax itself fails in disorder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _discard(path: Path) -> None:
    """Removes a checkpoint, so that it is there whole or not at all."""
    hidden = path.with_name(f".{path.name}")
    with contextlib.suppress(OSError):
        os.rename(path, hidden)
        shutil.rmtree(hidden)


def _read(path: Path) -> tuple[Snapshot, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        digests = _digests(path)
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"manifest.json: {error}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError("manifest.json: no table")
    for name in sorted(manifest.keys() | digests.keys()):
        if name not in digests:
            raise CheckpointError(f"{name} is missing")
        if manifest.get(name) != digests[name]:
            raise CheckpointError(f"{name} is not as it was written")
    try:
        told = json.loads((path / "told.json").read_text(encoding="utf-8"))
        with _orbax() as checkpointer:
            arrays = checkpointer.restore((path / "arrays").absolute())
        return Snapshot(told["number"], told["told"], arrays), told["about"]
    except Exception as error:  # files as they were written, by a version that wrote others
        raise CheckpointError(_first_line(error)) from error


def _orbax() -> Any:
    """What reads and writes arrays, in this process without the others."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _digests(path: Path) -> dict[str, str]:
    """The SHA-256 of every file but the manifest."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file != path / "manifest.json"
    }


def _raw(arrays: PyTree) -> list[Any]:
    """The leaves, random keys as their data."""
    leaves = jax.tree.leaves(arrays)
    return [jax.random.key_data(x) if _is_key(x.dtype) else x for x in leaves]


def _wrapped(x: np.ndarray, dtype: Any) -> Any:
    if not _is_key(dtype):
        return x
    return jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(jnp.empty(0, dtype)))


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Orbax says in many ways that a disk is full, and logs each."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(_first_line(error)) from error
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _asked_to_stop(say: Say) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process."""
    asked = threading.Event()
    stopping = (signal.SIGINT, signal.SIGTERM)
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    # Python's own handlers wait for the compiled program to end; this thread does not.
    def listen() -> None:
        while received := reader.recv(1):
            if received[0] not in stopping:
                continue
            if asked.is_set():
                Console(stderr=True).show_cursor()
                os._exit(130)
            asked.set()
            say("stops after this epoch, with a checkpoint; once more to stop at once")

    thread = threading.Thread(target=listen, daemon=True)
    before = {number: signal.signal(number, ignore) for number in stopping}
    wakeup = signal.set_wakeup_fd(writer.fileno())
    thread.start()
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()
