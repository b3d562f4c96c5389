"""``gradxform movie``: the walks of all optimisers on a surface."""

import contextlib
import sys

from gradxform.lab.commands import endings, progress
from gradxform.lab.commands.request import Request
from gradxform.lab.experiment.messages import on_one_line
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.training.interrupts import nothing_to_lose


@endings.interruptible()
def movie(request: Request, *, format_: str, fps: float | None) -> None:
    """Draws the movie of a config into a folder."""
    from gradxform.lab.experiment.load import load_config, require_surface

    try:
        config = load_config(str(request.name), request.settings, for_sweep=False)
        require_surface(config)
    except ConfigError as error:
        endings.fail(str(error))

    with nothing_to_lose():
        from gradxform.lab.experiment.experiment import prepared
        from gradxform.lab.report import movies
        from gradxform.lab.report.folder import run_folder, write_atomically

    with endings.in_one_line(), contextlib.ExitStack() as until_the_end:
        with nothing_to_lose(until_the_end.close):
            experiment = prepared(config)
            if format_ == "mp4":
                movies.ffmpeg()  # reports a missing ffmpeg before the race
            folder = until_the_end.enter_context(run_folder(experiment, request.out))
            with progress.of_frames() as on_frame:
                frames = movies.movie(experiment, on_frame)
            encode = movies.mp4 if format_ == "mp4" else movies.gif
            content = encode(frames, fps)
        file = folder / f"movie.{format_}"
        write_atomically(file, content)
    print(f"The movie is {on_one_line(file)}", file=sys.stderr)
