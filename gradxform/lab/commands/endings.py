"""How a command starts and ends, in one process or several. An error ends in one line."""

import contextlib
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from gradxform.lab.experiment.messages import lacking, say
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.experiment.registry import OwnError
from gradxform.lab.training.interrupts import INTERRUPTED as INTERRUPTED

if TYPE_CHECKING:
    from gradxform.lab.experiment.experiment import Experiment
    from gradxform.lab.training.checkpoints import Snapshot

USER_MISTAKE = 2

# words in the messages of XLA when another process is gone
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection", "eartbeat")


def fail(message: str, code: int = USER_MISTAKE) -> NoReturn:
    """Ends the command with a message."""
    say(message)
    raise typer.Exit(code)


def end(message: str, code: int = USER_MISTAKE) -> NoReturn:
    """Ends this process. One of several does not wait for the others, as JAX would."""
    if not several():
        fail(message, code)
    say(message)
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends the command with a message after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        end("interrupted", INTERRUPTED)


@contextlib.contextmanager
def in_one_line(finish: Callable[[str], NoReturn] = fail) -> Iterator[None]:
    """Turns errors of configs, data, memory and files into a message on stderr."""
    from jax.errors import JaxRuntimeError

    from gradxform.lab.data.sets import DataError
    from gradxform.lab.tasks.models import ModelError
    from gradxform.lab.training.checkpoints import CheckpointError

    try:
        yield
    except (
        CheckpointError,
        ConfigError,
        OwnError,
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
        # XLA uses either phrase
        full = any(words in reason for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
        if full and isinstance(error, MemoryError | JaxRuntimeError):
            finish(f"does not fit in memory: {reason}. Try a smaller batch_size or model.")
        if not several():
            raise
        if any(words in reason for words in _LOST):
            finish(f"another process has ended or cannot be reached: {reason}")
        if finish is end:  # otherwise this process and the others would wait for each other
            traceback.print_exc()
            os._exit(1)
        raise


def joined(distributed: str | None) -> bool:
    """Joins the other processes, if any. Returns whether this one writes the results."""
    if distributed is None:
        return True

    from gradxform.lab.training.processes import join

    say(f"joining the other processes ({distributed})")
    try:
        return join(distributed)
    except ValueError as error:
        fail(f"--distributed {distributed}: {error}")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Starts all processes or none, even if only one of them sees a mistake."""
    from gradxform.lab.training.processes import any_of

    try:
        yield
    except BaseException:
        any_of(True)
        raise
    if any_of(False):
        fail("another process could not start; see its message")


def check_alike(experiment: "Experiment", data: int, snapshot: "Snapshot | None") -> None:
    """Ends all processes if their configs, data or checkpoints differ."""
    from gradxform.lab.training.processes import least_of

    text = zlib.crc32(experiment.toml.encode()) >> 8
    for what, read in (("config", text), ("data", data)):
        if least_of(read) != -least_of(-read):
            fail(
                f"not all processes have read the same {what}: give all the same files and settings"
            )
    number = 0 if snapshot is None else snapshot.number
    least, most = least_of(number), -least_of(-number)
    if least != most:
        fail(
            f"the newest checkpoint is {most:.0f} for one process and {least:.0f} for another: "
            "--resume FOLDER must be a folder that all processes share"
        )


def several() -> bool:
    """Whether this process shares a run with others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1
