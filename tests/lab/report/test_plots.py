"""Figures: what they show, that they need no colour, and that nothing is left open."""

import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.legend import Legend

from gradxform.lab.experiment.grid import Member
from gradxform.lab.experiment.load import load_config
from gradxform.lab.report.drawing import Look
from gradxform.lab.report.heatmaps import plot_heatmaps
from gradxform.lab.report.physics_plots import plot_errors
from gradxform.lab.report.race_plots import plot_cost, plot_work
from gradxform.lab.report.style import METHODS, styles
from gradxform.lab.report.surface_plots import plot_paths, plot_starts
from gradxform.lab.report.sweep_plots import plot_batch_sizes, plot_sensitivity
from gradxform.lab.tasks.surfaces import SURFACES
from gradxform.lab.training.outcomes import History, RaceResult, SweepResult, best_points, points_of
from gradxform.lab.training.surfaces import sweep_on_surface
from gradxform.lab.training.sweep import sweep


def history(label, costs, *, diverged=False, error=False, work=3.0):
    rows = [
        {"epoch": i, "step": 10 * i, "gradients": work * i, "seconds": 0.5 * i, "cost": cost}
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
    slow, fast = history("slow", [2.0, 1.0, 0.5]), history("fast", [1.0, 0.1, 0.01], work=6.0)
    figure = plot_work(result(slow, fast), "A race")
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


def test_a_panel_that_would_show_the_same_again_is_left_out():
    race = result(history("slow", [2.0, 1.0, 0.5]), history("fast", [1.0, 0.1, 0.01]))
    labels = [axes.get_xlabel() for axes in plot_work(race).axes]
    assert [label.split(",")[0] for label in labels] == ["work", "training time (s)"]
    assert "without compilation" in labels[-1]


@pytest.mark.parametrize("factor", [1, 4, 20])
def test_the_ticks_of_few_decades_do_not_touch(factor):
    costs = [2.0, 1.0, 0.5, 0.4, 0.3]
    figure = plot_work(result(history("a", costs), history("b", costs, work=3.0 * factor)))
    figure.draw_without_rendering()
    for axes in figure.axes:
        both = axes.get_xticklabels() + axes.get_xticklabels(minor=True)
        low, high = axes.bbox.intervalx
        boxes = [label.get_window_extent() for label in both if label.get_text()]
        boxes = sorted((b for b in boxes if low <= (b.x0 + b.x1) / 2 <= high), key=lambda b: b.x0)
        assert len(boxes) > 1
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


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
    marked = [line.get_markevery() for line in lines]
    assert all(5 <= len(places) <= 8 for places in marked)
    # curves that coincide still show their own markers
    assert len({place for places in marked for place in places}) == sum(map(len, marked))


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


# -- sweeps


def swept(losses, *, costs=None):
    """A result of members given as ((label, values, seed), loss), diverged where it is NaN."""
    members, rows = [], []
    for (label, values, seed), loss in losses:
        members.append(Member(label, values, seed))
        lost = math.isnan(loss)
        row = {"optimizer": label, **values, "seed": seed, "diverged": lost, "dropped": False}
        row |= {"epochs": 2, "steps": 20, "seconds": 0.5, "train_loss": 1.0 if lost else loss}
        rows.append(row | {"test_accuracy": 1 / (1 + row["train_loss"])})
    costs = np.ones((len(rows), 2)) if costs is None else np.asarray(costs)
    measure, unit = "train_loss", "cross-entropy, nats"
    return SweepResult("task", measure, unit, tuple(members), tuple(rows), costs, 1.0, 1.0)


LOST = "diverged (at the top)"


def labels_of(axes):
    return [" ".join(text.get_text().split()) for text in axes.get_legend().get_texts()]


def test_the_sensitivity_is_the_mean_over_seeds_and_marks_what_diverged():
    figure = plot_sensitivity(
        swept(
            [
                (("sgd", {"learning_rate": 0.01}, 0), 2.0),
                (("sgd", {"learning_rate": 0.01}, 1), 4.0),
                (("sgd", {"learning_rate": 1.0}, 0), 1.0),
                (("sgd", {"learning_rate": 1.0}, 1), math.nan),
                (("plain", {}, 0), 5.0),
                (("_2", {"learning_rate": 0.01, "momentum": 0.5}, 0), 3.0),
                (("_2", {"learning_rate": 0.01, "momentum": 0.9}, 0), 2.5),
            ]
        ),
        "A sweep",
    )
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "learning rate"
    assert axes.get_ylabel() == "training loss (cross-entropy, nats)"
    assert figure.get_suptitle() == "A sweep"
    band = "band: from the best to the worst seed"
    level = "level: no learning rate"
    assert sorted(labels_of(axes)) == sorted(["SGD", "plain", "_2", level, band, LOST])
    sgd, lost, plain, _, both, *_ = axes.get_lines()
    np.testing.assert_array_equal(sgd.get_xydata(), [[0.01, 3.0], [1.0, np.nan]])
    assert lost.get_xdata().tolist() == [1.0]  # though a seed of it did not
    assert plain.get_ydata().tolist() == [5.0, 5.0]  # it has no rate: the same everywhere
    assert both.get_ydata().tolist() == [2.5]  # the best momentum
    png(figure)


def test_random_points_of_two_numbers_are_not_joined():
    points = [((0.3, 0.5), 1.0), ((0.01, 0.9), 2.0), ((0.1, 0.7), 1.5)]
    result = swept(
        [(("m", {"learning_rate": r, "momentum": m}, 0), loss) for (r, m), loss in points]
    )
    line = plot_sensitivity(result).axes[0].get_lines()[0]
    assert line.get_linestyle() == "None"
    np.testing.assert_array_equal(line.get_xdata(), [0.01, 0.1, 0.3])
    figure = plot_heatmaps(result)
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[r, m] for (r, m), _ in points]
    png(figure)


def test_a_heatmap_has_a_cell_a_point_and_crosses_out_what_diverged():
    cells = {(r, m): r + m for r in (0.1, 1.0, 10.0) for m in (0.5, 0.9)}
    cells[10.0, 0.9] = math.nan
    losses = [(("m", {"rate": r, "momentum": m}, 0), loss) for (r, m), loss in cells.items()]
    figure = plot_heatmaps(swept([*losses, (("one", {"rate": 0.1}, 0), 1.0)]))
    axes, bar = figure.axes
    assert axes.get_title() == "m"
    table = axes.get_images()[0].get_array()
    np.testing.assert_allclose(table[0], [0.6, 1.5, 10.5])
    crosses, star = axes.get_lines()
    assert crosses.get_xydata().tolist() == [[2, 1]]
    assert star.get_xydata().tolist() == [[0, 0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rate", "momentum")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "1", "10"]
    assert bar.get_ylabel() == "training loss (cross-entropy, nats)"
    png(figure)


def test_batch_sizes_are_compared_at_their_best_points():
    result = swept(
        [
            (("large", {"learning_rate": 1.0}, 0), 1.0),
            (("small", {"learning_rate": 1.0}, 0), 3.0),
            (("small", {"learning_rate": 2.0}, 0), 0.25),
            (("lost", {"learning_rate": 2.0}, 0), math.nan),
        ],
        costs=[[2.0, 1.0], [9.0, 9.0], [0.75, 0.5], [np.nan, np.nan]],
    )
    figure = plot_batch_sizes(result, {"large": "full", "small": 8, "lost": 64})
    accuracy, seconds, updates, epochs = figure.axes
    assert [text.get_text() for text in updates.get_xticklabels()] == ["8", "64", "full"]
    np.testing.assert_allclose(accuracy.get_lines()[0].get_xydata(), [[0, 0.8], [2, 0.5]])
    np.testing.assert_allclose(seconds.get_lines()[0].get_ydata(), [250.0, 250.0])
    assert "training cost of 1" in epochs.get_ylabel()  # what both reach
    np.testing.assert_allclose(epochs.get_lines()[0].get_ydata(), [1, 2])
    np.testing.assert_allclose(updates.get_lines()[0].get_ydata(), [10, 20])
    png(figure)


def test_the_starts_of_a_surface_are_dots_and_crosses():
    rates = {"sgd": 0.1, "wild": 9.0}
    tables = {label: {"method": "sgd", "learning_rate": r} for label, r in rates.items()}
    runs = [Member(label, {}, start) for label in tables for start in (0, 1)]
    starts = [(1.0, 0.0), (1.0, 1.0)]  # the first ends on the saddle
    result = sweep_on_surface(SURFACES["saddle"], tables, runs, starts=starts, max_steps=200)
    figure = plot_starts("saddle", result)
    left, right, bar = figure.axes
    assert left.get_title() == "SGD\n1 of 2 solved"
    assert left.get_lines()[0].get_xydata().tolist() == [[1.0, 0.0]]
    assert left.collections[-1].get_offsets().tolist() == [[1.0, 1.0]]
    assert right.get_title() == "wild\n0 of 2 solved"
    assert bar.get_ylabel() == "evaluations and curvature products"
    png(figure)
    nowhere = result._replace(members=result.members[2:], rows=result.rows[2:])
    png(plot_starts("saddle", nowhere))


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([0.001, 0.01, 0.1, 1.0], True),
        ([0.01, 0.25, 0.5, 0.75, 1.0], False),
        ([0.01, 0.1], True),
        ([0.8, 0.9], False),
        ([0.0, 0.1, 1.0], False),
        ([0.1], False),
    ],
)
def test_a_scale_is_that_of_the_values(values, logarithmic):
    result = swept([(("sgd", {"rate": value}, 0), 1.0) for value in values])
    scale = plot_sensitivity(result).axes[0].get_xscale()
    assert scale == ("log" if logarithmic else "linear")


def test_a_sweep_in_which_all_diverged_can_be_drawn():
    rates = [{"learning_rate": r, "momentum": m} for r in (0.1, 1.0) for m in (0.5, 0.9)]
    result = swept(
        [(("m", values, 0), math.nan) for values in rates], costs=np.full((4, 2), np.nan)
    )
    png(plot_sensitivity(result))
    png(plot_heatmaps(result))
    png(plot_batch_sizes(result, {"m": 8}))


@pytest.fixture(scope="module")
def from_starts():
    """A sweep in which the point that solves most starts is not the one of the least work."""
    settings = ["sweep.starts={points=5}", "training.steps=1000", LONG]
    config = load_config("surfaces", settings)
    chosen = {"momentum": config.optimizers["momentum"], "BFGS": config.optimizers["BFGS"]}
    overrides = {"momentum": config.sweep.overrides["momentum"]}
    update = {
        "optimizers": chosen,
        "sweep": config.sweep.model_copy(update={"overrides": overrides}),
    }
    return sweep(config.model_copy(update=update)), config.title


LONG = "title=Beale's function from a grid of starts, each method at its best point, and more"


def test_the_heat_map_tells_what_the_table_tells(from_starts):
    result, title = from_starts
    figure = plot_heatmaps(result, title)
    figure.draw_without_rendering()
    (best,) = (point for point in best_points(result) if point.label == "momentum")
    least = min(points_of(result)["momentum"], key=lambda point: point.mean)
    assert best != least
    axes = figure.axes[0]
    (star,) = (line for line in axes.lines if line.get_marker() == "*")
    (column,), (row,) = star.get_data()
    xs, ys = (sorted({m.values[k] for m in result.members if k in m.values}) for k in best.values)
    assert (xs[column], ys[row]) == tuple(best.values.values())
    shares = {text.get_position()[0]: text.get_text() for text in axes.texts}
    assert shares[column] == f"{100 * (1 - best.failures / 25):.0f} %"


@pytest.mark.parametrize("plot", ["heatmaps", "starts", "sensitivity"])
def test_titles_are_whole_and_ticks_apart(plot, from_starts):
    result, title = from_starts
    figure = {
        "heatmaps": lambda: plot_heatmaps(result, title),
        "starts": lambda: plot_starts("beale", result, title),
        "sensitivity": lambda: plot_sensitivity(result, title),
    }[plot]()
    figure.draw_without_rendering()
    shown = figure.get_suptitle()
    assert " ".join(shown.split()) == title
    (heading,) = (text for text in figure.texts if text.get_text() == shown)
    box = heading.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for axes in figure.axes:
        labels = [x for x in axes.get_xticklabels() if x.get_text() and x.get_visible()]
        if len(labels) > 1 and labels[0].get_rotation() == 0:
            boxes = sorted((label.get_window_extent() for label in labels), key=lambda b: b.x0)
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("plot", ["heatmaps", "starts"])
def test_marks_are_explained(plot, from_starts):
    result, title = from_starts
    if plot == "heatmaps":
        figure = plot_heatmaps(result, title)
        expected = {"best point: most starts solved (% in its cell)", "no start solved"}
    else:
        figure = plot_starts("beale", result, title)
        dots = "solved from here (darker: more work)"
        expected = {dots, "not solved from here", "minimum"}
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == expected
    if plot == "starts":  # the lightest dots have an edge
        assert all(dots.get_linewidth()[0] > 0 for dots in figure.axes[0].collections[-1:])


# -- titles and legends fit


def many(count, letter):
    return [f"{letter * 40} {letter * 15} {number}" for number in range(count)]


def swept_many(labels, on_two=False):
    """A sweep of as many optimisers, each at four points with two seeds."""
    values = [{"learning_rate": r, "momentum": m} for r in (0.1, 1.0) for m in (0.5, 0.9)]
    points = values if on_two else [{"learning_rate": r} for r in (0.01, 0.1, 1.0)]
    runs = [
        ((label, point, seed), 1.0 + seed)
        for label in labels
        for point in points
        for seed in (0, 1)
    ]
    return swept(runs)


def drawn(name, labels, title, **options):
    """One of the figures with these labels."""
    races = result(*(history(label, [2.0, 1.0, 0.5], work=i) for i, label in enumerate(labels, 1)))
    walk = SURFACES["quadratic"]
    match name:
        case "cost":
            return plot_cost(races, title, **options)
        case "work":
            return plot_work(races, title, **options)
        case "sensitivity":
            return plot_sensitivity(swept_many(labels), title, **options)
        case "heatmaps":
            return plot_heatmaps(swept_many(labels[:5], on_two=True), title, **options)
        case "error":
            for one in races.histories:
                for row in one.rows:
                    row["test_relative_error"] = row["cost"]
            return plot_errors(races, title, **options)
        case "paths":
            paths = {label: np.linspace(walk.start, (0, 0), 5) for label in labels[:4]}
            return plot_paths(walk, paths, title=title, **options)
    raise AssertionError(name)


def outside(figure):
    """The texts that go beyond the edge of a figure."""
    figure.draw_without_rendering()
    edge = figure.bbox.padded(1)
    texts = list(figure.texts)  # its title
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for legend in figure.findobj(Legend):
        texts += legend.get_texts()
    boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}
    return [
        name
        for name, box in boxes.items()
        if not (edge.contains(*box.min) and edge.contains(*box.max))
    ]


@pytest.mark.parametrize("letter", ["i", "W"])
@pytest.mark.parametrize("name", ["cost", "work", "sensitivity", "heatmaps", "error", "paths"])
def test_titles_and_legends_stay_within_the_figure(name, letter):
    figure = drawn(name, many(24, letter), f"{letter * 30} " * 20)
    assert outside(figure) == []
    frame = figure.axes[0].get_window_extent()
    assert frame.width > 0.15 * figure.bbox.width
    assert frame.height > 0.25 * figure.bbox.height


@pytest.mark.parametrize("size", [(4.0, 3.0), (14.0, 4.0)])
@pytest.mark.parametrize("name", ["cost", "work", "sensitivity", "error"])
def test_a_chosen_size_is_kept_and_everything_fits(name, size):
    labels = ["sgd", "momentum", "adam", "delta_bar_delta", "L-BFGS with a long name"]
    look = Look(size, 100)
    figure = drawn(name, labels, "A race", look=look)
    assert tuple(figure.get_size_inches()) == size
    assert outside(figure) == []


@pytest.mark.parametrize(
    ("log", "scales"),
    [("x", "log linear"), ("y", "linear log"), ("both", "log log"), ("none", "linear linear")],
)
def test_the_scales_can_be_chosen(log, scales):
    race = result(history("a", [2.0, 1.0, 0.5]), history("b", [2.0, 1.0, 0.4], work=9.0))
    look = Look(log=log)
    sweep_figure = plot_sensitivity(swept_many(["a"]), look=look)
    for figure in (plot_cost(race, look=look), plot_work(race, look=look), sweep_figure):
        for axes in figure.axes:
            assert f"{axes.get_xscale()} {axes.get_yscale()}" == scales
        png(figure)


def test_the_usual_resolution_is_150_dots_per_inch():
    assert plot_cost(result(history("a", [2.0, 1.0]))).dpi == 150


def test_the_methods_of_a_config_have_their_colours():
    race = result(history("fast", [2.0, 1.0]), history("slow", [2.0, 1.5]))
    tables = {
        "fast": {"method": "adam"},
        "slow": {"chain": [{"method": "optax.clip"}, {"method": "sgd"}]},
    }
    for figure in (plot_cost(race, optimizers=tables), plot_work(race, optimizers=tables)):
        lines = figure.axes[0].get_lines()
        assert [line.get_color() for line in lines] == [
            METHODS[m].style.color for m in ("adam", "sgd")
        ]
