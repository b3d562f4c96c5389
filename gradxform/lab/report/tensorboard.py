"""TensorBoard event files of a race, written by ``gradxform run CONFIG --tensorboard``."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote


@contextlib.contextmanager
def events(folder: Path) -> Iterator[Callable[[str, Mapping[str, float]], None]]:
    """Writes rows of metrics for ``tensorboard --logdir FOLDER``.

    Each optimiser is one run in TensorBoard, with updates on the horizontal axis. You can watch it
    while the race is running. Numbers that are not finite are left out.

    Args:
      folder: the folder of the event files; each optimiser gets its own folder inside.

    Yields:
      A function to call with an optimiser's label and a row of metrics that has a ``step``.

    Raises:
      ModuleNotFoundError: tensorboardX is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     with events(Path(name)) as on_row:
    ...         on_row("adam", {"step": 10, "cost": 0.5})
    ...     [run.name for run in Path(name).iterdir()]
    ['adam']
    """
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        mend = 'pip install "gradxform[tensorboard]"'
        raise ModuleNotFoundError(f"--tensorboard needs tensorboardX: {mend}") from error

    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}

        def on_row(label: str, row: Mapping[str, float]) -> None:
            if label not in writers:
                run = quote(label, safe=" ,+").replace(".", "%2E")  # a label may be .. or a/b
                writers[label] = stack.enter_context(SummaryWriter(str(folder / run)))
            for name in row.keys() - {"step"}:
                if math.isfinite(row[name]):
                    writers[label].add_scalar(name, row[name], int(row["step"]))
            writers[label].flush()

        yield on_row
