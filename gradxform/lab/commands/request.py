"""What the user asks for on the command line, and what a run to resume has left."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gradxform.lab.training.checkpoints import Snapshot


class Request(NamedTuple):
    """What the user asks for on the command line."""

    name: str | None = None  #: a TOML file or the name of a shipped config
    settings: Sequence[str] = ()  #: ``key=value``
    data_dir: Path | None = None
    out: Path | None = None
    is_quiet: bool = False
    resume: Path | None = None  #: the folder of the run to continue
    distributed: str | None = None  #: how to join other processes
    epochs: int | None = None  #: train the run to resume for so many epochs


class Resumed(NamedTuple):
    """What was found in the folder of a run to resume."""

    folder: Path
    snapshot: "Snapshot | None"
    is_longer: bool  #: whether it now trains for more epochs than when the snapshot was taken
