"""Draws the README's figures into notebooks/figures/: python notebooks/figures.py"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the same figures on every machine

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

import gradxform as gx
from gradxform.lab.data.sets import load
from gradxform.lab.experiment.load import load_config
from gradxform.lab.report.movies import gif, movie
from gradxform.lab.report.race_plots import plot_cost
from gradxform.lab.report.style import styles_of
from gradxform.lab.report.surface_plots import plot_paths
from gradxform.lab.report.sweep_plots import plot_sensitivity
from gradxform.lab.tasks.surfaces import SURFACES, Surface
from gradxform.lab.training.race import race
from gradxform.lab.training.surfaces import make_walk
from gradxform.lab.training.sweep import sweep

FOLDER = Path(__file__).resolve().parent / "figures"
DPI = 150


def bowl(x: jax.Array) -> jax.Array:
    """A quadratic that is 15 times as curved across its valley as along it."""
    along, across = 0.97 * x[0] + 0.25 * x[1], 0.97 * x[1] - 0.25 * x[0]
    return 0.5 * (along**2 + 15 * across**2)


def paths() -> Figure:
    """The paths of five methods on a badly conditioned bowl, each labelled with its name."""
    surface = Surface("bowl", bowl, (-7.4, 0.6), ((0, 0),), ((-8.6, 3.7), (-3.9, 1.7)), "")
    walks = {  # a method, the point next to which its name goes, and the offset of the name
        "SGD": (gx.sgd(0.12), 4, (6, 2)),
        "momentum": (gx.momentum(0.05, 0.75), 3, (8, -6)),
        "Nesterov": (gx.nesterov(0.05, 0.75), 3, (8, -2)),
        "Adam": (gx.adam(0.45), 9, (0, -16)),
        "coordinate descent": (gx.coordinate_descent(), 1, (-190, 6)),
    }
    start = jnp.asarray(surface.start)
    drawn = {
        label: np.asarray(make_walk(surface.fn, tx, steps=40)(start)[0])
        for label, (tx, *_) in walks.items()
    }

    axes = Figure(figsize=(8, 4.1), layout="constrained").add_subplot()
    figure = plot_paths(surface, drawn, axes=axes, title="40 updates on a badly conditioned bowl")
    axes.set_aspect("equal")
    legend = axes.get_legend()
    if legend is not None:
        legend.remove()
    axes.lines[-1].set_zorder(3)  # draw the star of the minimum above the paths
    for words, place, offset in (
        ("start", surface.start, (-8, 12)),
        ("minimum", (0, 0), (10, -24)),
    ):
        axes.annotate(words, place, textcoords="offset points", xytext=offset)
    for line, (label, (_, point, offset)) in zip(axes.lines, walks.items(), strict=False):
        line.set_markevery(1)
        axes.annotate(
            label,
            tuple(drawn[label][point]),
            textcoords="offset points",
            xytext=offset,
            color=line.get_color(),
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    return figure


def race_cost() -> Figure:
    """The training cost of the main job."""
    config = load_config("digits_race")
    return plot_cost(race(config, load("digits")), config.title, optimizers=config.optimizers)


def second_order() -> Figure:
    """Rosenbrock's function by evaluations, for methods with and without curvature."""
    surface = SURFACES["rosenbrock"]
    methods = {  # slowest first, in the order of the curves from right to left
        "gradient descent": gx.sgd(1e-3),
        "Adam": gx.adam(0.02),
        "nonlinear CG": gx.nonlinear_cg(),
        "BFGS": gx.bfgs(),
        "Newton-CG": gx.with_line_search(gx.scale_by_newton_cg()),
        "trust region": gx.trust_region(),
    }
    start, budgets = jnp.asarray(surface.start), np.unique(np.geomspace(1, 2e4, 90).astype(int)) - 1
    axes = Figure(figsize=(8, 3.6), layout="constrained").add_subplot()
    style_of = styles_of(methods)
    for i, (label, tx) in enumerate(methods.items()):

        def run(most: jax.Array, tx: optax.GradientTransformation = tx) -> gx.Solution:
            return gx.minimize(surface.fn, start, tx, tol=1e-3, max_steps=most)

        ends = jax.vmap(run)(jnp.asarray(budgets))
        counts, first = np.unique(np.asarray(ends.evaluations), return_index=True)
        axes.plot(
            counts,
            np.asarray(ends.value)[first],
            **style_of[label]._asdict(),
            label=label,
            linewidth=1.5,
            markersize=5,
            markevery=(i, 6),
        )
    axes.set(xscale="log", yscale="log", xlim=(0.9, 3e4), ylim=(1e-9, 1e2))
    axes.set_xlabel("evaluations of value and gradient")
    axes.set_ylabel("value, best so far")
    axes.set_title(f"{surface.name.capitalize()}'s valley", fontsize="medium")
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=4, frameon=False)
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def sensitivity() -> Figure:
    """The results of six methods for many learning rates."""
    config = load_config("learning_rate")
    result = sweep(config, load("digits"))
    return plot_sensitivity(result, config.title, optimizers=config.optimizers)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    figures = {"paths": paths, "race": race_cost, "second_order": second_order}
    for name, draw in {**figures, "sensitivity": sensitivity}.items():
        draw().savefig(FOLDER / f"{name}.png", dpi=DPI)
        print(f"notebooks/figures/{name}.png")
    (FOLDER / "valley.gif").write_bytes(gif(movie(load_config("valley"))))
    print("notebooks/figures/valley.gif")


if __name__ == "__main__":
    main()
