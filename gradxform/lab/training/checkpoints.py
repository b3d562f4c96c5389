"""Checkpoints: the state of a long run on disk, from which it can resume after any interruption.

A checkpoint is a folder named after the number of finished epochs. It contains

- ``arrays``, written by Orbax;
- ``told.json``, which describes them in text and numbers;
- ``manifest.json``, the SHA-256 of every other file, written last.

It is written under a temporary name and renamed when it is complete. Checkpoints are ordered by
their numbers, never by the time of day. The manifest is our own, because Orbax writes no checksum
of a whole checkpoint.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradxform.lab.experiment import folders
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.training.checkpoint_folders import (
    CheckpointError,
    begun,
    digests_of,
    discard,
    numbered,
    own_files,
    read_manifest,
    set_aside,
)
from gradxform.lab.training.interrupts import asked_to_stop
from gradxform.lab.training.processes import any_of
from gradxform.tree import PyTree

Say = Callable[[str], None]

_METADATA = 2**18  # bytes; Orbax writes less than this besides the arrays of a large tree
_MOST_TRIED = 20  # damaged checkpoints to try
_MOST_CHUNKS = 10_000  # pieces of arrays on disk; Orbax writes one per array


class Snapshot(NamedTuple):
    """The state of a run after an epoch: everything that it needs to continue."""

    number: int  #: finished epochs, summed over all optimisers
    record: dict[str, Any]  #: description of the run, as JSON values
    arrays: PyTree  #: a tree of arrays; after reading from disk a list of them, for :func:`fit`


OnState = Callable[[int, Callable[[], Snapshot]], None]
"""Called after each epoch with the number of finished epochs and a maker of a snapshot."""


@contextlib.contextmanager
def keeping(
    folder: Path, *, every: int, keep: int, about: Any, say: Say, writes: bool = True
) -> Iterator[OnState]:
    """Writes checkpoints of a run; Ctrl-C ends the run after the current epoch.

    After SIGINT (Ctrl-C) or SIGTERM the epoch ends, its checkpoint is written, and all processes of
    the run raise ``KeyboardInterrupt``. A second signal ends the process at once. If a checkpoint
    cannot be written, the run prints a message and continues.

    Args:
      folder: the folder of the checkpoints.
      every: epochs between two checkpoints; 0 for none, not even after Ctrl-C.
      keep: how many of the latest checkpoints to keep.
      about: JSON values that are stored with the snapshot.
      say: prints a message.
      writes: whether this process, of several, writes the checkpoints.

    Yields:
      A function that the run calls after each epoch.
    """
    promise = "stopping after this epoch" + (", with a checkpoint" if every else "")
    with asked_to_stop(say, promise) as asked:

        def on_state(number: int, snapshot: Callable[[], Snapshot]) -> None:
            stops = any_of(asked())
            if every and (stops or number % every == 0):
                taken = snapshot()  # every process takes part, since each has a part of the arrays
                if writes:
                    try_to_save(folder, taken, keep=keep, about=about, say=say)
            if stops:
                raise KeyboardInterrupt

        yield on_state
        if asked():
            raise KeyboardInterrupt


def save(folder: Path, snapshot: Snapshot, *, keep: int, about: Any = None) -> None:
    """Writes a checkpoint completely or not at all, then removes old ones.

    Args:
      folder: the folder of the checkpoints; it is created if missing.
      snapshot: the state to write.
      keep: how many of the latest checkpoints to keep.
      about: JSON values that are stored with it.

    Raises:
      OSError: the checkpoint cannot be written. Earlier checkpoints are unchanged.
    """
    new = begun(folder)
    try:
        _fill(new, snapshot, about)
        for number, old in numbered(folder):
            if number >= snapshot.number:  # damaged, else the run would have resumed from it
                discard(old)
        place = folder / f"{snapshot.number:08d}"
        set_aside(place)
        os.rename(new, place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    ours = [path for _, path in numbered(folder) if own_files(path) is not None]
    for old in ours[:-keep]:
        discard(old)


def newest(folder: Path, say: Say) -> tuple[Snapshot, Any] | None:
    """The last undamaged checkpoint and its ``about``, or ``None`` if there is none.

    Args:
      folder: the folder of the checkpoints.
      say: prints which checkpoints are damaged and why.

    Raises:
      CheckpointError: too many checkpoints are damaged.
      OSError: ``folder`` is not a folder or cannot be read.
    """
    if not folders.is_folder(folder):
        return None
    for tried, (number, path) in enumerate(reversed(numbered(folder))):
        if tried == _MOST_TRIED:
            raise CheckpointError(f"{folder}: the last {tried} checkpoints are damaged")
        try:
            return _read(path)
        except CheckpointError as error:
            say(f"checkpoint {number} is damaged; trying the previous one: {error}")
    return None


def fit(arrays: Sequence[np.ndarray], like: PyTree) -> PyTree:
    """The arrays of a checkpoint, on the host, in their original structure.

    Args:
      arrays: the arrays of a snapshot that was read from disk.
      like: a tree with the same structure, shapes and dtypes.

    Raises:
      CheckpointError: the shapes or dtypes differ.

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
    """Turns errors from a checkpoint of another lab version into a ``CheckpointError``."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"another version has written it: {error!r}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder for this process; the lock ends with the process.

    Raises:
      OSError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with folders.opened(folder / "config.toml", write=True) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder}: another process is using this folder") from None
        yield


def try_to_save(folder: Path, snapshot: Snapshot, *, keep: int, about: Any, say: Say) -> None:
    """:func:`save`, or a message if the checkpoint cannot be written."""
    try:
        save(folder, snapshot, keep=keep, about=about)
    except OSError as error:
        with contextlib.suppress(OSError):
            there = [str(number) for number, _ in numbered(folder)]
            last = f"the last one is {there[-1]}" if there else "there is none yet"
            say(f"checkpoint {snapshot.number} cannot be written, {last}: {error}")
            return
        say(f"checkpoint {snapshot.number} cannot be written: {error}")


def _fill(new: Path, snapshot: Snapshot, about: Any) -> None:
    """Writes the files of a checkpoint and waits until they are on the disk."""
    arrays = [np.asarray(x) for x in jax.device_get(_raw(snapshot.arrays))]
    content = {"number": snapshot.number, "told": snapshot.record, "about": about}
    text = json.dumps(content).encode()
    if len(text) > _most_text():
        raise OSError(f"its told.json would take {len(text)} bytes, more than {_most_text()}")
    _check_space(new, sum(x.nbytes for x in arrays) + len(text) + _METADATA)
    with _as_os_error(), _orbax() as checkpointer:
        # Orbax refuses arrays without entries; leave them out
        checkpointer.save(new.absolute() / "arrays", [x for x in arrays if x.size])
    (new / "told.json").write_bytes(text)
    (new / "manifest.json").write_text(json.dumps(digests_of(new)), encoding="utf-8")
    for path in folders.files(new):
        with folders.opened(path, write=True) as file:  # before the previous checkpoint is removed
            os.fsync(file.fileno())


def _check_space(folder: Path, size: int) -> None:
    """Raises ``OSError`` if ``size`` bytes do not fit on the disk; Orbax would not fail cleanly."""
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(path: Path) -> tuple[Snapshot, Any]:
    manifest = read_manifest(path)
    try:
        digests = digests_of(path)
    except OSError as error:
        raise CheckpointError(str(error)) from None
    for name in sorted(manifest.keys() | digests.keys()):
        if name not in digests:
            raise CheckpointError(f"{on_one_line(name)} is missing")
        if manifest.get(name) != digests[name]:
            raise CheckpointError(f"{on_one_line(name)} has changed since it was written")
    try:
        content = json.loads(folders.read(path / "told.json", _most_text()).decode())
        number, of_run, about = content["number"], content["told"], content["about"]
        if type(number) is not int or number != int(path.name) or not isinstance(of_run, dict):
            raise CheckpointError("told.json: it belongs to another checkpoint")
        return Snapshot(number, of_run, _arrays(path / "arrays")), about
    except CheckpointError:
        raise
    except Exception as error:  # undamaged files of another version
        raise CheckpointError(_first_line(error)) from error


def _arrays(path: Path) -> list[np.ndarray]:
    """Reads the arrays with Orbax if they fit into memory."""
    with _without_words(), _orbax() as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree
        if not isinstance(tree, list):
            raise CheckpointError("arrays: no list of arrays")
        size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in tree)
        if size > folders.memory():
            raise CheckpointError(f"arrays: {size} bytes do not fit into memory")
        chunks = sum(
            math.prod(
                -(-n // max(1, chunk))
                for n, chunk in zip(x.shape, x.storage.chunk_shape, strict=True)
            )
            for x in tree
        )
        if chunks > len(tree) + _MOST_CHUNKS:
            raise CheckpointError(f"arrays: stored in {chunks} pieces, more than a run writes")
        arrays = checkpointer.restore(path.absolute())
    if not all(isinstance(x, np.ndarray | np.generic) for x in arrays):
        raise CheckpointError("arrays: no list of arrays")
    return arrays


def _most_text() -> int:
    """The largest size of ``told.json`` in bytes; parsed it takes up to 30 times as much memory."""
    return folders.memory() // 64


def _orbax() -> Any:
    """An Orbax checkpointer that does not wait for other processes."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _raw(arrays: PyTree) -> list[Any]:
    """The leaves, with random keys replaced by their data."""
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
    """Turns the many errors of Orbax about a full disk into ``OSError``."""
    try:
        with _without_words():
            yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(_first_line(error)) from error


@contextlib.contextmanager
def _without_words() -> Iterator[None]:
    """Keeps Orbax from logging errors, or content of untrusted files."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
