"""Figures on a surface: the paths of optimisers, and the starts from which they arrive."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gradxform.lab.experiment.grid import Table
from gradxform.lab.report.drawing import (
    CROSS,
    HEAT,
    STAR,
    USUAL,
    Look,
    bar,
    entitle,
    entitle_panel,
    explain,
    legend_inside,
    new_figure,
    panels_of,
)
from gradxform.lab.report.style import in_words, styles_of
from gradxform.lab.report.sweep_plots import place_of
from gradxform.lab.tasks.surfaces import Surface, surface_of

if TYPE_CHECKING:
    from gradxform.lab.training.outcomes import Point, SweepResult

_GRID, _CONTOURS = 201, 18  # points a side to evaluate, and contours of a whole surface


def plot_paths(
    surface: Surface,
    paths: Mapping[str, np.ndarray],
    *,
    title: str = "",
    axes: Axes | None = None,
    optimizers: Mapping[str, Table] | None = None,
    look: Look = USUAL,
) -> Figure:
    """Draws paths of optimisers over the contours of a surface.

    Args:
      surface: the function; the plot shows its ``bounds``.
      paths: points of shape (steps + 1, 2), by label, such as the first result of
        :func:`gradxform.lab.training.surfaces.make_walk`.
      title: the title; the name and formula of the surface if empty.
      axes: the axes to draw into; a new figure if not given.
      optimizers: the config's tables by label, for the methods' colours and markers.
      look: size and dots per inch of a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: a path has another shape.
    """
    for label, path in paths.items():
        if np.ndim(path) != 2 or np.shape(path)[1] != 2:
            shape = np.shape(path)
            raise ValueError(f"paths[{label!r}] should be of shape (steps + 1, 2), has {shape}")
    if axes is None:
        axes = new_figure(6.4, 5.2, look).add_subplot()
    draw_contours(surface, axes)
    legend: list[tuple[str, Artist]] = []
    for (label, path), style in zip(
        paths.items(), styles_of(paths, optimizers).values(), strict=True
    ):
        x, y = np.asarray(path, float).T
        every = max(1, len(x) // 20)
        options = style._asdict() | {"markersize": 4, "markevery": every, "linewidth": 1.5}
        legend.append((in_words(label), axes.plot(x, y, **options, label=label)[0]))
    if paths:
        x, y = np.asarray(next(iter(paths.values())), float)[0]
        (mark,) = axes.plot(x, y, "ko", markersize=8, fillstyle="none", label="start")
        legend.append(("start", mark))
    for i, (x, y) in enumerate(surface.minima):
        label = "minimum" if i == 0 else None
        (mark,) = axes.plot(x, y, "k*", markersize=12, markerfacecolor="white", label=label)
        legend += [("minimum", mark)] if i == 0 else []
    (left, right), (bottom, top) = surface.bounds
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="$x$", ylabel="$y$")
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    inches = axes.get_position().width * figure.get_figwidth()
    shown = title or f"{surface.name}: ${surface.formula}$"
    entitle_panel(axes, shown, inches, parse_math=not title)
    legend_inside(axes, legend, inches * figure.dpi)
    return figure


def plot_starts(
    surface: str, result: "SweepResult", title: str = "", *, look: Look = USUAL
) -> Figure:
    """Draws from which starts each optimiser, at its best point, reaches a minimum.

    Each dot is a solved start. A darker dot took more evaluations and curvature products. A cross
    is a start from which the optimiser did not reach a minimum.

    Args:
      surface: the name of the surface.
      result: the result of a sweep on it.
      title: the title; the name of the surface if empty.
      look: size and dots per inch.

    Returns:
      The figure; save it with ``figure.savefig(path)``.
    """
    from gradxform.lab.training.outcomes import points_of

    ground = surface_of(surface)
    best = [min(own, key=place_of) for own in points_of(result).values()]
    work = [row["work"] for point in best for row in point.rows if row["solved"]]
    norm = LogNorm(min(work, default=1), max(max(work, default=1), 1.01 * min(work, default=1)))
    figure, panels = panels_of(len(best), min(3, len(best)), (3.8, 3.5), look)
    dots = None
    for axes, point in zip(panels, best, strict=True):
        dots = _dots(ground, point, axes, norm)
    assert dots is not None
    bar(figure, panels, dots, result.unit)
    dot = {"marker": "o", "color": "0.5", "markeredgecolor": "black", "linestyle": "none"}
    explain(
        figure,
        {
            "solved from here (darker: more work)": dot | {"markersize": 6},
            "not solved from here": CROSS,
            "minimum": STAR,
        },
    )
    entitle(figure, title or surface)
    return figure


def draw_contours(surface: Surface, axes: Axes) -> None:
    """Draws the contours of a surface in light grey."""
    contours_of(surface)(axes, surface.bounds)


def contours_of(surface: Surface) -> Callable[[Axes, Any], None]:
    """A function that draws the contours in a part of the surface, instead of those before.

    It takes the axes and the part as ((left, right), (bottom, top)). The contours stay at the same
    heights in every part.
    """
    import jax
    import jax.numpy as jnp

    value = jax.jit(jax.vmap(surface.fn))
    before: list[Any] = []
    last: Any = None
    apart = 0.0  # between the logarithms of two contours

    def draw(axes: Axes, part: Any) -> None:
        nonlocal apart, last
        if np.array_equal(part, last):
            return
        last = part
        x, y = np.meshgrid(*(np.linspace(*side, _GRID) for side in part))
        points = jnp.asarray(np.stack([x, y], axis=-1).reshape(-1, 2), jnp.float32)
        z = np.asarray(value(points), float).reshape(x.shape)
        # contours at equal heights would crowd at the steep rim and leave the valley empty
        height = z - min(z.min(), surface.lowest)
        field = np.log(height + 1e-3 * np.median(height))
        apart = apart or float(np.ptp(field)) / _CONTOURS
        levels = np.arange(np.floor(field.min() / apart), field.max() / apart + 1) * apart
        while before:
            before.pop().remove()
        before.append(axes.contourf(x, y, field, levels, cmap="Greys", alpha=0.3))
        lines = {"colors": "0.65", "linewidths": 0.6, "linestyles": "solid"}
        before.append(axes.contour(x, y, field, levels, **lines))

    return draw


def _dots(ground: Surface, point: "Point", axes: Axes, norm: LogNorm) -> Any:
    """Draws the starts of a point; returns the artist for the colour bar."""
    draw_contours(ground, axes)
    xs = np.asarray([(row["x0"], row["y0"]) for row in point.rows])
    good = np.asarray([row["solved"] for row in point.rows])
    size = max(2.5, min(7.0, 130 / np.sqrt(len(xs))))
    dots = axes.scatter(
        *xs[good].T,
        c=[row["work"] for row in point.rows if row["solved"]],
        s=size**2,
        norm=norm,
        cmap=HEAT + "_r",
        edgecolor="black",  # the lightest dots would vanish on the grey surface
        linewidth=0.5,
        zorder=3,
    )
    cross: dict[str, Any] = CROSS | {"markersize": size}
    axes.plot(*xs[~good].T, **cross)
    for x, y in ground.minima:
        axes.plot(x, y, **STAR)
    (left, right), (bottom, top) = ground.bounds
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="$x$", ylabel="$y$")
    said = ", ".join(f"{path.replace('_', ' ')} {x:.3g}" for path, x in point.values.items())
    lines = [in_words(point.label), said, f"{good.sum()} of {len(good)} solved"]
    entitle_panel(axes, "\n".join(filter(None, lines)), 3.4)
    return dots
