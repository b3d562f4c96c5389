"""Figures: what they show, that they need no colour, and that nothing is left open."""

import io
import math

import numpy as np
import pytest

from gradxform.lab.plots import plot_cost, plot_paths, plot_work, styles
from gradxform.lab.surfaces import SURFACES
from gradxform.lab.train import History, RaceResult


def history(label, costs, *, diverged=False, error=False):
    rows = [
        {"epoch": i, "step": 10 * i, "gradients": 3.0 * i, "seconds": 0.5 * i, "cost": cost}
        | {"train_loss": cost, **({"train_error": 2 * cost} if error else {})}
        for i, cost in enumerate(costs, start=1)
    ]
    return History(label, tuple(rows), diverged, 100.0, 1.0, None)


def result(*histories):
    return RaceResult("digits/keras_mlp", "train_loss", histories, "cross-entropy, nats")


def png(figure):
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def test_the_cost_plot_shows_every_curve_and_says_what_it_shows():
    race = result(history("slow", [2.0, 1.0, 0.5]), history("fast", [1.0, 0.1, 0.01]))
    figure = plot_cost(race, "A race")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert "epochs" in axes.get_xlabel()
    assert axes.get_ylabel() == "training cost (cross-entropy, nats)"
    assert figure.get_suptitle() == "A race"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["fast", "slow"]  # in the order of the ranking
    curves = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(curves["slow"].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(curves["slow"].get_ydata(), [2.0, 1.0, 0.5])
    assert png(figure).startswith(b"\x89PNG")


def test_the_work_plot_shows_every_curve_against_all_work():
    race = result(history("slow", [2.0, 1.0, 0.5]), history("fast", [1.0, 0.1, 0.01]))
    figure = plot_work(race, "A race")
    assert figure.get_suptitle() == "A race"
    assert figure.axes[0].get_ylabel() == "training loss (cross-entropy, nats)"
    for axes, unit in zip(figure.axes, (10, 3.0, 0.5), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        fast, slow = axes.get_lines()  # in the order of the ranking
        np.testing.assert_array_equal(slow.get_xdata(), [unit, 2 * unit, 3 * unit])
        np.testing.assert_array_equal(slow.get_ydata(), [2.0, 1.0, 0.5])
        np.testing.assert_array_equal(fast.get_ydata(), [1.0, 0.1, 0.01])
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert labels == ["fast", "slow"]
    assert png(figure).startswith(b"\x89PNG")


def test_the_work_plot_of_an_autoencoder_shows_its_error():
    figure = plot_work(result(history("a", [2.0, 1.0], error=True)))
    assert figure.axes[0].get_ylabel() == "training error (squared error per image)"
    assert figure.get_suptitle() == "digits/keras_mlp"
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), [4.0, 2.0])


def test_a_diverged_curve_is_marked_and_does_not_flatten_the_others():
    race = result(
        history("bad", [2.0, 1e30, math.nan], diverged=True),
        history("good", [2.0, 1.0, 0.5]),
        history("fair", [2.0, 1.5, 1.0]),
    )
    for figure in (plot_cost(race), plot_work(race)):
        axes = figure.axes[-1]
        assert axes.get_legend().get_texts()[-1].get_text() == "bad (diverged)"
        assert axes.get_ylim()[1] <= 20.0
        png(figure)


@pytest.mark.parametrize("costs", [[math.nan], [0.0, 0.0], [1.0]])
def test_odd_curves_can_be_drawn(costs):
    race = result(history("a", costs, diverged=math.isnan(costs[0])))
    png(plot_cost(race))
    png(plot_work(race))


def test_many_epochs_keep_few_markers():
    race = result(*(history(f"m{i}", list(np.geomspace(1, 0.1, 200))) for i in range(3)))
    lines = plot_cost(race).axes[0].get_lines()
    starts = [line.get_markevery()[0] for line in lines]
    assert all(200 / line.get_markevery()[1] <= 10 for line in lines)
    assert len(set(starts)) == 3  # curves that coincide still show their own markers


def test_styles_differ_without_colour():
    chosen = [(str(style.linestyle), style.marker) for style in styles(24)]
    assert len(set(chosen)) == 24


def test_a_surface_race_shows_the_height_above_the_lowest():
    def walk(label, values):
        rows = tuple(
            {"step": i, "value": value, "x0": 0.0, "x1": 0.0} for i, value in enumerate(values)
        )
        return History(label, rows, False, 1.0, 1.0, None)

    race = RaceResult("saddle", "value", (walk("a", [1.0, 0.0]), walk("b", [1.0, -1.0])), "")
    figure = plot_cost(race)
    (axes,) = figure.axes
    curves = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_array_equal(curves["a"], [2.0, 1.0])
    np.testing.assert_array_equal(curves["b"], [2.0, np.nan])
    assert axes.get_xlabel() == "updates"
    png(figure)


@pytest.mark.parametrize("name", list(SURFACES))
def test_paths_are_drawn_over_every_surface(name):
    surface = SURFACES[name]
    path = np.linspace(surface.start, surface.minima[0], 5)
    figure = plot_paths(surface, {"straight": path, "still": path[:1]})
    (axes,) = figure.axes
    assert (axes.get_xlim(), axes.get_ylim()) == surface.bounds
    curves = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(curves["straight"].get_xydata(), path)
    assert {"start", "minimum"} <= set(curves)
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert png(figure).startswith(b"\x89PNG")


def test_paths_can_share_a_figure():
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    surface = SURFACES["quadratic"]
    assert plot_paths(surface, {"a": np.zeros((2, 2))}, axes=left, title="left") is figure
    plot_paths(surface, {}, axes=right)
    assert left.get_title() == "left"


def test_a_path_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"paths\['a'\] should be of shape \(steps \+ 1, 2\)"):
        plot_paths(SURFACES["quadratic"], {"a": np.zeros((3, 3))})


def test_nothing_is_left_in_pyplot():
    plot_cost(result(history("a", [2.0, 1.0])))
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_texts_are_shown_as_they_are():
    labels = ["_hid", "cost $x_$", "$"]
    figure = plot_cost(result(*(history(label, [2.0, 1.0]) for label in labels)), "cost $x_$")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == labels
    png(figure)
    paths = {label: np.zeros((2, 2)) for label in labels}
    figure = plot_paths(SURFACES["quadratic"], paths, title="$x_$")
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == [*labels, "start", "minimum"]
    png(figure)


@pytest.mark.parametrize("first", [0.0, -1.0, math.nan])
def test_two_odd_curves_can_be_drawn(first):
    race = result(history("a", [first]), history("b", [first]))
    png(plot_cost(race))
    png(plot_work(race))


def test_nothing_to_name_needs_no_legend():
    figure = plot_paths(SURFACES["quadratic"]._replace(minima=()), {})
    assert figure.axes[0].get_legend() is None
