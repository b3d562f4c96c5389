"""What the figures have in common: size, title, legend, scales and marks.

The figures do not use pyplot, so no figure stays open and no display is needed.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

DPI = 150
HEAT = "viridis"  # its lightness rises evenly, so it also works in grey
CROSS: dict[str, Any] = {"marker": "x", "color": "black", "markersize": 6, "linestyle": "none"}
STAR: dict[str, Any] = {
    "marker": "*",
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 13,
    "zorder": 4,
    "linestyle": "none",
}

_LETTERS = 10  # letters of a title per inch
_LABEL, _LINES = 28, 4  # letters in a line of a legend, and most lines of a label or a title
_SMALLEST = 4.0  # the smallest font, in points
_LEGEND = 0.36  # the largest part of a figure's width that a legend takes
_MARKERS = 7  # markers of a long curve
_DIGITS = (1, 1.5, 2, 3, 4, 5, 7)  # of the ticks within less than a decade
_AROUND, _TALLEST = 0.5, 20.0  # inches around a legend, and of the tallest figure


Log: TypeAlias = Literal["x", "y", "both", "none"]


class Look(NamedTuple):
    """The size and the scales of a figure."""

    size: tuple[float, float] | None = None  #: width and height in inches; None for the usual ones
    dpi: float = DPI  #: pixels per inch
    log: Log | None = None
    """the axes with a logarithmic scale; None for the usual ones"""

    def is_log(self, axis: Literal["x", "y"], usual: bool) -> bool:
        """Whether an axis has a logarithmic scale."""
        return usual if self.log is None else self.log in (axis, "both")


USUAL = Look()


def new_figure(width: float, height: float, look: Look) -> Figure:
    """An empty figure of the size that ``look`` wants, or else of this one."""
    return Figure(figsize=look.size or (width, height), dpi=look.dpi, layout="constrained")


def panels_of(
    count: int, columns: int, size: tuple[float, float], look: Look
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of a ``size`` in inches."""
    rows = -(-count // columns)
    figure = new_figure(size[0] * columns + 1, size[1] * rows + 1, look)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def entitle(figure: Figure, title: str) -> None:
    """Sets the title of a figure, wrapped and shrunk to its width."""
    width = figure.get_figwidth()
    text = figure.suptitle(wrapped(title, int(_LETTERS * width)), parse_math=False)
    shrink([text], 0.97 * width * figure.dpi)


def entitle_panel(axes: Axes, title: str, inches: float, *, parse_math: bool = False) -> None:
    """Sets the title of a panel that is about so many inches wide."""
    shown = title if parse_math else wrapped(title, int(11 * inches))
    text = axes.set_title(shown, fontsize="medium", parse_math=parse_math)
    figure = axes.get_figure(root=True)
    shrink([text], inches * (figure.dpi if figure else DPI))


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most ``width`` letters, the first four of them."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, max(1, width))]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1][: max(1, width) - 1] + "…"]
    return "\n".join(lines)


def shrink(texts: Sequence[Text], width: float) -> None:
    """Gives all texts a smaller font if one of them is wider than so many pixels."""
    widest = max((text.get_window_extent().width for text in texts), default=0.0)
    if widest > width:
        for text in texts:
            text.set_fontsize(max(_SMALLEST, float(text.get_fontsize()) * width / widest))


def clear(axes: Axes) -> None:
    """A light grid, and no frame at the top and on the right."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def set_scales(axes: Axes, look: Look, *, x: bool, y: bool) -> None:
    """Sets logarithmic scales where ``look`` wants them, or else where ``x`` and ``y`` say."""
    values = [np.asarray(line.get_xydata(), float) for line in axes.get_lines()]
    points = np.concatenate(values) if values else np.empty((0, 2))
    # without positive values a logarithmic scale has no limits
    shown = np.isfinite(points) & (points > 0)
    if look.is_log("x", x) and shown[:, 0].any():
        axes.set_xscale("log")
    if look.is_log("y", y) and shown[:, 1].any():
        axes.set_yscale("log")


def limit_and_mark(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Sets the limits of the vertical axis, and the ticks of logarithmic axes."""
    firsts = [y[0] for y in curves if len(y) and y[0] > 0]
    if len(curves) > 1 and firsts:  # a diverging curve must not flatten the others
        axes.set_ylim(top=min(axes.get_ylim()[1], 10 * float(np.median(firsts))))
    if axes.get_yscale() == "log":
        decades = _decades(*axes.get_ylim())
        _mark(axes.yaxis, _DIGITS if decades < 1 else (1, 2, 5) if decades < 4 else (1,))
    # the usual labels of few decades are long, and would touch
    if axes.get_xscale() == "log" and (decades := _decades(*axes.get_xlim())) < 2:
        _mark(axes.xaxis, _DIGITS if decades < 1 else (1, 3))


def _decades(low: float, high: float) -> float:
    return math.log10(high / low) if low > 0 else math.inf


def _mark(axis: Axis, digits: tuple[float, ...]) -> None:
    """Ticks of a logarithmic axis at these digits; the labels are powers of ten if it is only 1."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_minor_locator(NullLocator())
    if len(digits) > 1:
        axis.set_major_formatter("{x:g}")


def legend_beside(axes: Axes, entries: Sequence[tuple[str, Artist]], look: Look) -> None:
    """A legend to the right of the axes. A long one makes a taller figure or a smaller font."""
    figure = axes.get_figure(root=True)
    if not entries or not isinstance(figure, Figure):
        return
    where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0.2}
    title = figure.get_suptitle().count("\n") + 1
    size = 10.0
    for _ in range(5):
        legend = legend_of(
            axes, entries, **where, handlelength=4, frameon=False, prop={"size": size}
        )
        box = legend.get_window_extent()
        height = box.height / figure.dpi + _AROUND + 0.2 * title
        if height > figure.get_figheight() and look.size is None:
            figure.set_figheight(min(height, _TALLEST))
        room = _LEGEND * figure.get_figwidth() * figure.dpi
        part = min(room / box.width, figure.get_figheight() / height)
        if part >= 1 or size == _SMALLEST:
            break
        size = max(_SMALLEST, 0.97 * size * part)
    if look.size is not None:
        _fit_labels(figure)


def legend_inside(axes: Axes, entries: Sequence[tuple[str, Artist]], width: float) -> None:
    """A legend within the axes, which are so many pixels wide."""
    if entries:
        options = {"loc": "best", "handlelength": 3.5, "framealpha": 0.9, "fontsize": "small"}
        legend = legend_of(axes, entries, **options)
        shrink(legend.get_texts(), 0.7 * width)


def legend_of(axes: Axes, entries: Sequence[tuple[str, Artist]], **options: Any) -> Legend:
    """A legend that shows labels literally, including "$" and a leading "_"."""
    labels, artists = zip(*entries, strict=True)
    legend = axes.legend(artists, [f"entry {i}" for i in range(len(artists))], **options)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=wrapped(label, _LABEL), parse_math=False)
    return legend


def explain(figure: Figure, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend of marks below all panels."""
    lines = [Line2D([], [], **options, label=name) for name, options in marks.items()]
    columns = len(lines) if figure.get_figwidth() > 6 else 1
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    shrink(legend.get_texts(), figure.get_figwidth() * figure.dpi / columns - 0.5 * figure.dpi)


def band_entry(words: str) -> tuple[str, Artist]:
    """The legend's entry for the bands around curves."""
    return words, Patch(color="0.4", alpha=0.25, linewidth=0)


def mark_entry(words: str, **options: Any) -> tuple[str, Artist]:
    """The legend's entry for a mark."""
    return words, Line2D([], [], **options)


def bar(figure: Figure, panels: Sequence[Axes], drawn: Any, label: str) -> None:
    """A colour bar with few labels."""
    axis = figure.colorbar(drawn, ax=panels, label=label).ax.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def markers_at(x: np.ndarray, place: int, count: int, *, log: bool = False) -> list[int] | None:
    """The points of a curve that get a marker: about seven, evenly apart, each curve its own.

    Args:
      x: the horizontal positions, in order.
      place: the number of the curve, counted from 0.
      count: how many curves there are.
      log: whether the horizontal scale is logarithmic.
    """
    if len(x) <= 8:
        return None
    along = np.log(np.maximum(x, 1e-300)) if log else np.asarray(x, float)
    parts = (np.arange(_MARKERS) + place / max(1, count)) / _MARKERS
    places = np.searchsorted(along, along[0] + parts * (along[-1] - along[0]))
    return np.unique(np.minimum(places, len(x) - 1)).tolist()


def finite(rows: Iterable[Mapping[str, float]], *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of the rows, without the rows whose second value is not finite."""
    x, y = np.asarray([[row[key] for key in keys] for row in rows], float).reshape(-1, 2).T
    kept = np.isfinite(y)
    return x[kept], y[kept]


def is_logarithmic(values: np.ndarray) -> bool:
    """Whether sorted values are more evenly spaced on a logarithmic than on a linear scale."""
    low, high = values[0], values[-1]
    if low <= 0 or high < 10 * low:
        return False
    if len(values) == 2:
        return True
    middle = float(np.median(values[1:-1]))
    off = abs(math.log(middle) - math.log(low * high) / 2) / math.log(high / low)
    return off < abs(middle - (low + high) / 2) / (high - low)


def _fit_labels(figure: Figure) -> None:
    """Shrinks labels of axes that are longer than the axes."""
    figure.draw_without_rendering()  # computes the layout
    for axes in figure.axes:
        frame = axes.get_window_extent()
        for label, room in ((axes.xaxis.label, frame.width), (axes.yaxis.label, frame.height)):
            box = label.get_window_extent()
            long = box.width if label is axes.xaxis.label else box.height
            if long > room:
                label.set_fontsize(max(_SMALLEST, float(label.get_fontsize()) * room / long))
