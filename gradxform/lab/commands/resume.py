"""``gradxform resume``: more of a run or a sweep."""

from collections.abc import Sequence

from gradxform.lab.commands import endings, resuming
from gradxform.lab.commands.request import Request
from gradxform.lab.commands.run import run
from gradxform.lab.commands.sweep import sweep
from gradxform.lab.experiment.problems import ConfigError


def resume(request: Request, *, loggers: Sequence[str] = ()) -> None:
    """Continues the run or the sweep in a folder, or trains a run for more epochs."""
    folder = request.resume
    assert folder is not None
    with endings.interruptible():
        try:
            command = resuming.command_of(folder)
        except (ConfigError, OSError) as error:
            endings.fail(str(error))
    if command == "run":
        run(request, loggers=loggers)
    elif request.epochs is not None:
        endings.fail(f"--epochs {request.epochs}: {folder} is a sweep; only a run can get more")
    else:
        sweep(request)
