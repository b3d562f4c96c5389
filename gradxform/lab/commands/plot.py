"""``gradxform plot FOLDER``: draws the pictures of a finished run anew."""

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gradxform.lab.commands import endings
from gradxform.lab.experiment.messages import on_one_line

SMALLEST, LARGEST, MOST_PIXELS = 1.0, 100.0, 10**8


class Picture(StrEnum):
    """The file formats of ``plot``."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


class Log(StrEnum):
    """The axes with a logarithmic scale."""

    x = "x"
    y = "y"
    both = "both"
    none = "none"


Folder = Annotated[
    Path, typer.Argument(help="The folder of a finished run or sweep.", show_default=False)
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="WxH",
        help="Width and height in inches, such as 8x5. Default: a size for each picture.",
        show_default=False,
    ),
]
LogAxes = Annotated[
    Log | None,
    typer.Option(
        help="The axes with a logarithmic scale. Default: those of each picture.",
        show_default=False,
    ),
]


def plot(
    folder: Folder,
    format_: Annotated[Picture, typer.Option("--format", help="File format.")] = Picture.png,
    size: Size = None,
    dpi: Annotated[int, typer.Option(min=10, max=1200, help="Pixels per inch.")] = 150,
    log: LogAxes = None,
) -> None:
    """Draw the pictures of a finished run anew.

    Reads the numbers in the folder and writes the pictures into it. Pictures
    of the same format are replaced. solution.png of a differential equation
    needs the trained net, which the folder does not hold: it stays as it is.

    \b
    gradxform plot runs/digits_race-20260102-030405 --format pdf
    gradxform plot first --size 6x4 --dpi 300 --log none
    """
    try:
        _plot(folder, format_, inches(size, dpi), dpi, log)
    except KeyboardInterrupt:
        endings.end("interrupted", endings.INTERRUPTED)


def inches(size: str | None, dpi: int) -> tuple[float, float] | None:
    """Width and height of ``"WxH"``.

    >>> inches("8x4.5", 100)
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


def _plot(
    folder: Path, format_: Picture, size: tuple[float, float] | None, dpi: int, log: Log | None
) -> None:
    with endings.told():
        from gradxform.lab.experiment import folders
        from gradxform.lab.report.drawing import Look
        from gradxform.lab.report.plots import pictures
        from gradxform.lab.report.results import save_figure
        from gradxform.lab.report.runs import read_run

        config, result = read_run(folder)
        look = Look(size, dpi, None if log is None else log.value)
        folders.check(folder)  # before anything is written
        written = []
        for name, figure in pictures(result, config, look):
            save_figure(folder / f"{name}.{format_}", figure)
            written.append(f"{name}.{format_}")
    print(f"Drawn in {on_one_line(folder)}: {', '.join(sorted(written))}", file=sys.stderr)
