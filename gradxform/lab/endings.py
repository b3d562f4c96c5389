"""How a command begins and ends: in one process or in several together, mistakes told in a line."""

import contextlib
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from gradxform.lab.interrupts import INTERRUPTED as INTERRUPTED
from gradxform.lab.messages import lacking, say
from gradxform.lab.optimizers import ConfigError

if TYPE_CHECKING:
    from gradxform.lab.checkpoints import Snapshot
    from gradxform.lab.schema import Config

USER_MISTAKE = 2

# what XLA says in some words of its own when another process is not there
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection", "eartbeat")


def fail(message: str, code: int = USER_MISTAKE) -> NoReturn:
    """Ends the command with a line."""
    say(message)
    raise typer.Exit(code)


def end(message: str, code: int = USER_MISTAKE) -> NoReturn:
    """Ends this process; if it is one of several, without waiting for the others, as JAX would."""
    if not several():
        fail(message, code)
    say(message)
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def told(finish: Callable[[str], NoReturn] = fail) -> Iterator[None]:
    """What goes wrong with a config, its data, memory or files ends in a line on stderr."""
    from jax.errors import JaxRuntimeError

    from gradxform.lab.checkpoints import CheckpointError
    from gradxform.lab.data import DataError
    from gradxform.lab.models import ModelError

    try:
        yield
    except (
        CheckpointError,
        ConfigError,
        DataError,
        ModelError,
        OSError,
    ) as error:
        finish(str(error))
    except ModuleNotFoundError as error:
        finish(lacking(error) if error.name else str(error))
    except typer.Exit:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or ["Out of memory"])[0]
        # XLA says either, depending on where it runs short
        full = any(words in reason for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
        if full and isinstance(error, MemoryError | JaxRuntimeError):
            finish(f"does not fit in memory: {reason}; try a smaller batch_size or model")
        if not several():
            raise
        if any(words in reason for words in _LOST):
            finish(f"another process has ended, or cannot be reached: {reason}")
        if finish is end:  # the others would wait for this process, and it for them
            traceback.print_exc()
            os._exit(1)
        raise


def joined(distributed: str | None) -> bool:
    """Joins the other processes, if there are any; whether this one writes the results."""
    if distributed is None:
        return True

    from gradxform.lab.processes import join

    say(f"joins the other processes, {distributed}")
    try:
        return join(distributed)
    except ValueError as error:
        fail(f"--distributed {distributed}: {error}")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A beginning of all processes, or of none: a mistake may be seen by one of them alone."""
    from gradxform.lab.processes import any_of

    try:
        yield
    except BaseException:
        any_of(True)
        raise
    if any_of(False):
        fail("another process could not begin")


def check_alike(config: "Config", data: int, snapshot: "Snapshot | None") -> None:
    """Ends all processes where one has another config, other data, or an older checkpoint."""
    from gradxform.lab.config import to_toml
    from gradxform.lab.processes import least_of

    for what, read in (("config", zlib.crc32(to_toml(config).encode()) >> 8), ("data", data)):
        if least_of(read) != -least_of(-read):
            fail(
                f"not all processes have read the same {what}: give all the same files and settings"
            )
    number = 0 if snapshot is None else snapshot.number
    least, most = least_of(number), -least_of(-number)
    if least != most:
        fail(
            f"the newest checkpoint is {most:.0f} to one process and {least:.0f} to another: "
            "--resume FOLDER must be one folder that all see alike"
        )


def several() -> bool:
    """Whether this process is one of several that do a run together."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1
