"""The look of the notebooks' figures."""

import matplotlib.pyplot as plt

from gradxform.lab.report.style import in_words, styles_of

SETTINGS = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def use_style():
    """Applies the notebooks' settings to every figure that follows."""
    plt.rcParams.update(SETTINGS)


def curves(axes, lines, x=None):
    """Draws one curve per method, with the colour, dashes and marker that it has in every figure.

    Args:
      axes: where to draw.
      lines: ``{label: (x, y)}``, or ``{label: y}`` if all curves share ``x``.
      x: the common values of the horizontal axis.
    """
    style_of = styles_of(lines)
    for i, (label, line) in enumerate(lines.items()):
        xs, ys = line if x is None else (x, line)
        markers = (i * len(ys) // 60, max(1, len(ys) // 8))  # the first one, and how many apart
        look = style_of[label]._asdict() | {"markersize": 5, "markevery": markers}
        axes.plot(xs, ys, **look, label=in_words(label))
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(handlelength=4, frameon=False)
