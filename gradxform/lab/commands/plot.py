"""``gradxform plot FOLDER``: the pictures of a finished run, drawn again."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradxform.lab.commands import endings
from gradxform.lab.experiment.messages import on_one_line

if TYPE_CHECKING:
    from gradxform.lab.report.drawing import Log

SMALLEST, LARGEST, MOST_PIXELS = 1.0, 100.0, 10**8  # inches, inches, and pixels of a picture


@endings.interruptible()
def plot(folder: Path, *, format_: str, size: str | None, dpi: int, log: "Log | None") -> None:
    """Draws the pictures of a finished run into its folder."""
    inches = inches_of(size, dpi)
    with endings.in_one_line():
        from gradxform.lab.experiment import folders
        from gradxform.lab.report.runs import read_run

        config, result = read_run(folder)
        folders.check(folder)  # before anything is written

        from gradxform.lab.report.drawing import Look
        from gradxform.lab.report.figures import figures_of
        from gradxform.lab.report.files import save_figure

        written = []
        for stem, figure in figures_of(result, config, Look(inches, dpi, log)):
            save_figure(folder / f"{stem}.{format_}", figure)
            written.append(f"{stem}.{format_}")
    print(f"Drawn in {on_one_line(folder)}: {', '.join(sorted(written))}", file=sys.stderr)


def inches_of(size: str | None, dpi: int) -> tuple[float, float] | None:
    """Width and height of ``"WxH"``; ends the command if there are none.

    >>> inches_of("8x4.5", 100)
    (8.0, 4.5)
    """
    if size is None:
        return None
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)x(\d{1,3}(?:\.\d{1,3})?)", size, re.ASCII)
    width, height = map(float, found.groups()) if found else (0.0, 0.0)
    if not (SMALLEST <= width <= LARGEST and SMALLEST <= height <= LARGEST):
        endings.fail(
            f"--size {on_one_line(size)}: should be WIDTHxHEIGHT in inches, "
            f"{SMALLEST:g} to {LARGEST:g} each, such as 8x5"
        )
    if width * height * dpi**2 > MOST_PIXELS:
        endings.fail(f"--size {size} --dpi {dpi}: over {MOST_PIXELS:,} pixels; make one smaller")
    return width, height
