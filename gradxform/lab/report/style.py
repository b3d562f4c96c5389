"""The look of every method: one colour, line style and marker for each, in all figures.

A curve must be known without its colour, on a grey print and to colour-blind readers. So any two
methods differ in line style or marker, and any two first-order or two second-order methods differ
in at least two of three things: lightness, line style and marker. The colours are those of Okabe
and Ito without the yellow, and two dark ones of Tol.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from gradxform.lab.experiment.grid import Table

# The order alternates dark and light colours, so that neighbours also differ in grey.
COLOURS = (
    *("#000000", "#D55E00", "#E69F00", "#0072B2", "#56B4E9"),
    *("#332288", "#009E73", "#882255", "#CC79A7"),
)
BLACK, VERMILION, ORANGE, BLUE, SKY, INDIGO, GREEN, WINE, PINK = COLOURS
SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2))
DASHES: tuple[Any, ...] = (SOLID, DASHED, DOTTED, DASH_DOT)
MARKERS = "os^Dv<>PXp*hd"


class Style(NamedTuple):
    """The line and marker of a curve; ``style._asdict()`` are arguments of ``axes.plot``."""

    color: str
    linestyle: Any
    marker: str
    fillstyle: Literal["full", "none"] = "full"


class Method(NamedTuple):
    """How figures show a method."""

    words: str  #: its name in a legend
    style: Style


METHODS: dict[str, Method] = {
    "sgd": Method("SGD", Style(BLACK, SOLID, "o")),
    "momentum": Method("momentum", Style(ORANGE, DASHED, "s")),
    "nesterov": Method("Nesterov", Style(INDIGO, DASH_DOT, "^")),
    "delta_bar_delta": Method("delta-bar-delta", Style(INDIGO, DOTTED, ">")),
    "rprop": Method("RPROP", Style(SKY, DOTTED, "p")),
    "adagrad": Method("AdaGrad", Style(WINE, DASHED, "D")),
    "rmsprop": Method("RMSProp", Style(VERMILION, DASH_DOT, "v")),
    "adadelta": Method("AdaDelta", Style(PINK, SOLID, "<")),
    "adam": Method("Adam", Style(BLUE, SOLID, "P")),
    "coordinate_descent": Method("coordinate descent", Style(GREEN, DASHED, "X")),
    "newton": Method("Newton", Style(PINK, DASH_DOT, "*")),
    "newton_cg": Method("Newton-CG", Style(SKY, DASHED, "d")),
    "bfgs": Method("BFGS", Style(GREEN, SOLID, "h")),
    "lbfgs": Method("L-BFGS", Style(INDIGO, DASHED, "o")),
    "nonlinear_cg": Method("nonlinear CG", Style(WINE, SOLID, "D")),
    "trust_region": Method("trust region", Style(VERMILION, DASHED, "^")),
    "levenberg_marquardt": Method("Levenberg–Marquardt", Style(BLUE, DASH_DOT, "X")),
    "hessian_free": Method("Hessian-free", Style(WINE, DASH_DOT, "p")),
    "kronecker": Method("Kronecker factors", Style(ORANGE, SOLID, "v")),
}
MOST_ALIKE = len(DASHES)  # labels of one method that share its colour

_OTHER_NAMES = {
    "gradient descent": "sgd",
    "SGD with momentum": "momentum",
    "SGD momentum": "momentum",
    "SGD with Nesterov": "nesterov",
    "SGD Nesterov": "nesterov",
    "K-FAC": "kronecker",
}
_JOINTS = r"(, | \+ )"  # between the parts of a label, as in "newton_cg, Hessian"


def styles_of(
    labels: Iterable[str], optimizers: Mapping[str, Table] | None = None
) -> dict[str, Style]:
    """The style of each label in a figure.

    A label of a known method has that method's style. Up to four labels of one method share its
    colour and marker: after the first, they have hollow markers, another line style and a lighter
    or darker colour. If more labels share a method, it does not distinguish them, and they have
    styles that no method has, like all other labels.

    Args:
      labels: the labels, in the order of the config.
      optimizers: the config's tables by label. Without a table the label's own words decide.

    >>> [style.color for style in styles_of(["sgd", "Adam", "mine"]).values()]
    ['#000000', '#0072B2', '#D55E00']
    """
    methods = {label: method_of(label, (optimizers or {}).get(label)) for label in labels}
    common = list(methods.values())
    others = other_styles()
    seen: dict[str, int] = {}
    found: dict[str, Style] = {}
    for label, method in methods.items():
        if method is None or common.count(method) > MOST_ALIKE:
            found[label] = next(others)
        else:
            number = seen[method] = seen.get(method, -1) + 1
            found[label] = variant(METHODS[method].style, number)
    return found


def styles(count: int) -> list[Style]:
    """``count`` different styles that no method has."""
    return list(itertools.islice(other_styles(), count))


def other_styles() -> Iterator[Style]:
    """Styles that no method has, without end; the first 24 differ in line style or marker."""
    taken = {method.style[:2] for method in METHODS.values()}
    used = {method.style[1:3] for method in METHODS.values()}
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(DASHES), strict=False)
    every = dict.fromkeys(itertools.islice(pairs, len(COLOURS) * len(DASHES)))
    markers = itertools.cycle(MARKERS)
    for color, dash in itertools.cycle(pair for pair in every if pair not in taken):
        tried = itertools.islice(markers, len(MARKERS))
        marker = next((m for m in tried if (dash, m) not in used), next(markers))
        used.add((dash, marker))
        yield Style(color, dash, marker)


def variant(style: Style, number: int) -> Style:
    """The style of a method's label ``number``, counted from 0."""
    if number == 0:
        return style
    dash = DASHES[(DASHES.index(style.linestyle) + number) % len(DASHES)]
    return Style(_mixed(style.color, 0.15 + 0.15 * number), dash, style.marker, "none")


def method_of(label: str, table: Table | None = None) -> str | None:
    """The method that a label stands for, a key of :data:`METHODS`, or None.

    >>> method_of("slow", {"method": "optax.adam"}), method_of("L-BFGS, m = 5"), method_of("mine")
    ('adam', 'lbfgs', None)
    """
    if table is not None:
        return next(_methods_in(table), None)
    for text in (label, re.split(r"[,(:=]| \+ | with ", label)[0]):
        if (method := _KNOWN.get(_plain(text))) is not None:
            return method
    return None


def in_words(label: str) -> str:
    """The label as a legend shows it: a method's Python name in words, everything else as it is.

    >>> in_words("newton_cg, Hessian"), in_words("my_sgd")
    ('Newton-CG, Hessian', 'my_sgd')
    """
    parts = re.split(_JOINTS, label)
    return "".join(METHODS[part].words if part in METHODS else part for part in parts)


def lightness(color: str) -> float:
    """How light a colour is, from 0 to 100, as CIE defines L*; a grey print keeps it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(color)
    )
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27


def _methods_in(value: Any) -> Iterator[str]:
    """The known methods in a table: its own, then those of its links and arguments."""
    if isinstance(value, list):
        for item in value:
            yield from _methods_in(item)
    if not isinstance(value, Mapping):
        return
    name = value.get("method")
    if isinstance(name, str):
        method = name.rpartition(".")[2].removeprefix("scale_by_")
        if method in METHODS:
            yield method
    for item in value.values():
        yield from _methods_in(item)


def _plain(text: str) -> str:
    return re.sub(r"[\s_‐-―-]", "", text).casefold()


_KNOWN = {
    _plain(name): method
    for key, known in METHODS.items()
    for name, method in ((key, key), (known.words, key))
} | {_plain(name): method for name, method in _OTHER_NAMES.items()}


def _mixed(color: str, part: float) -> str:
    """A dark colour with a part of white, or a light one with a part of black."""
    towards = 1.0 if lightness(color) < 50 else 0.0
    mixed = (round(255 * (c + part * (towards - c))) for c in _rgb(color))
    return "#" + "".join(f"{c:02X}" for c in mixed)


def _rgb(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
