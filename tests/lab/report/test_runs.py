"""Results read back from a folder: the same numbers, and refusals of what no run writes."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from gradxform.lab.api import load_run, plot
from gradxform.lab.cli import app
from gradxform.lab.commands.plot import inches_of
from gradxform.lab.experiment.folders import FolderError
from gradxform.lab.experiment.load import parse_config, sweep_members, to_toml
from gradxform.lab.experiment.problems import ConfigError
from gradxform.lab.report import files
from gradxform.lab.report.folder import write_atomically
from gradxform.lab.training.outcomes import History, RaceResult, SweepResult, best_points
from gradxform.lab.training.race import race
from gradxform.lab.training.sweep import sweep

WALK = {
    "name": "walk",
    "task": {"kind": "surface", "surface": "saddle", "start": [1.0, 0.5]},
    "training": {"steps": 12},
    "optimizers": {
        "fast": {"method": "sgd", "learning_rate": 0.25},
        "lost": {"method": "sgd", "learning_rate": 9.0},
    },
}
STARTS = WALK | {
    "training": {"steps": 200},
    "sweep": {"starts": {"points": 2}, "axes": {"learning_rate": [0.01, 0.1]}},
}
ON_DATA = {
    "name": "two",
    "title": "Two methods",
    "task": {"kind": "classification", "dataset": "digits", "model": "logistic"},
    "training": {"epochs": 2, "overrides": {"adam": {"batch_size": 64}}},
    "optimizers": {"adam": {"method": "adam"}, "mine": {"method": "sgd", "learning_rate": 0.1}},
}


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def kept(folder, config, result):
    """The folder that a command leaves for this result."""
    folder.mkdir()
    write_atomically(folder / "config.toml", to_toml(config))
    if isinstance(result, RaceResult):
        rows = [(h.label, row) for h in result.histories for row in h.rows]
        write_atomically(folder / "metrics.csv", files.metrics_csv(rows))
        files.save(folder, config, result)
    else:
        rows = dict(enumerate(result.rows))
        write_atomically(folder / "members.csv", files.members_csv(rows))
        files.save_sweep(folder, config, result)
    return folder


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    config = parse_config(WALK)
    result = race(config)
    return kept(tmp_path_factory.mktemp("runs") / "walk", config, result), result


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    config = parse_config(STARTS)
    result = sweep(config)
    return kept(tmp_path_factory.mktemp("runs") / "starts", config, result), result


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """A race on data, without the training of one."""

    def history(label, factor):
        rows = [
            {"epoch": i, "step": 12 * i, "seconds": 0.1 * i, "gradients": 1.0 * i * factor}
            | {"cost": factor / i, "train_loss": factor / (i + 1 / 3), "steps_per_second": 120.0}
            for i in (1, 2)
        ]
        return History(label, tuple(rows), False, 120.0, 0.5, None)

    config = parse_config(ON_DATA)
    histories = (history("adam", 1.0), history("mine", 2.0))
    result = RaceResult("digits/logistic", "train_loss", histories, "cross-entropy, nats")
    return kept(tmp_path_factory.mktemp("runs") / "epochs", config, result), result


@pytest.fixture
def copy(walk, tmp_path):
    shutil.copytree(walk[0], tmp_path / "x")
    return tmp_path / "x"


def alike(one, other):
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def test_a_race_is_read_back_as_it_was(walk, epochs):
    for folder, result in (walk, epochs):
        found = load_run(folder)
        assert isinstance(found, RaceResult)
        assert (found.name, found.measure, found.unit) == result[:2] + result[3:4]
        for one, other in zip(found.histories, result.histories, strict=True):
            assert one.label == other.label
            assert (one.diverged, one.compile_seconds) == (other.diverged, other.compile_seconds)
            assert one.params is None
            for row, expected in zip(one.rows, other.rows, strict=True):
                assert list(row) == list(expected)
                assert all(alike(row[key], expected[key]) for key in row)


def test_a_sweep_is_read_back_as_it_was(starts):
    folder, result = starts
    found = load_run(folder)
    assert isinstance(found, SweepResult)
    assert found[:3] == result[:3]
    assert found.members == result.members
    assert found.rows == result.rows
    assert found.costs.shape == (len(result.members), 0)
    assert [p.values for p in best_points(found)] == [p.values for p in best_points(result)]


def test_the_costs_of_a_sweep_are_read_back(tmp_path):
    config = parse_config(ON_DATA | {"sweep": {"axes": {"learning_rate": [0.1, 0.2]}}})
    members = sweep_members(config)
    rows = tuple(
        {"optimizer": m.label, **m.values, "seed": 0, "epochs": 2, "steps": 24, "diverged": False}
        | {"dropped": False, "seconds": 0.1, "cost": 1.5, "train_loss": 1.25}
        for m in members
    )
    costs = np.asarray([[2.0, 1.5], [3.0, np.nan], [2.5, 1.5], [1 / 3, 0.1]])
    result = SweepResult("digits/logistic", "train_loss", "nats", members, rows, costs, 1.0, 2.0)
    found = load_run(kept(tmp_path / "x", config, result))
    np.testing.assert_array_equal(found.costs, costs)
    assert found.rows == rows
    assert {"sensitivity", "batch_size"} == set(plot(tmp_path / "x"))


def test_the_pictures_of_a_folder_are_those_of_its_result(walk, starts, epochs):
    for (folder, result), table, names in (
        (walk, WALK, {"cost"}),
        (starts, STARTS, {"sensitivity", "starts"}),
        (epochs, ON_DATA, {"cost", "work"}),
    ):
        drawn, expected = plot(folder), plot(result, parse_config(table))
        assert set(drawn) == set(expected) == names
        for name, figure in drawn.items():
            lines, before = figure.axes[0].get_lines(), expected[name].axes[0].get_lines()
            for one, other in zip(lines, before, strict=True):
                np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())
                assert one.get_color() == other.get_color()


def test_a_result_needs_no_config(epochs):
    assert plot(epochs[1])["work"].get_suptitle() == "digits/logistic"


def test_the_command_draws_anew(epochs, tmp_path):
    shutil.copytree(epochs[0], tmp_path / "x")
    before = (tmp_path / "x" / "cost.png").read_bytes()
    (tmp_path / "x" / "cost.png").unlink()
    done = invoke("plot", tmp_path / "x")
    assert done.exit_code == 0, done.output
    assert "cost.png, work.png" in done.stderr
    assert (tmp_path / "x" / "cost.png").read_bytes() == before  # as the run has drawn it


@pytest.mark.parametrize(
    ("form", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_command_knows_three_formats(form, begin, copy):
    args = ("--format", form, "--size", "4x3", "--dpi", "50", "--log", "none")
    done = invoke("plot", copy, *args)
    assert done.exit_code == 0, done.output
    content = (copy / f"cost.{form}").read_bytes()
    assert content.startswith(begin)
    if form == "png":
        assert (int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) == (200, 150)
    invoke("plot", copy, *args)
    assert (copy / f"cost.{form}").read_bytes() == content  # no date, no random names


@pytest.mark.parametrize(
    "size", ["8", "0x5", "8x", "x", "8x5x2", "-8x5", "nanx5", "1e9x1", "８x５", "101x5"]
)
def test_a_size_that_is_none_is_refused(size, copy):
    done = invoke("plot", copy, f"--size={size}")
    assert done.exit_code == 2
    assert "WIDTHxHEIGHT in inches" in done.stderr


def test_a_picture_of_too_many_pixels_is_refused(copy):
    assert inches_of("100x100", 50) == (100, 100)
    done = invoke("plot", copy, "--size", "100x100", "--dpi", "1200")
    assert done.exit_code == 2
    assert "pixels" in done.stderr


def changed(folder, name, change):
    """Writes what ``change`` makes of a file's text."""
    path = folder / name
    path.write_text(change(path.read_text()))


def summarised(**values):
    return lambda text: json.dumps(json.loads(text) | values)


FAULTS = [
    ("summary.json", lambda text: "{", "is not JSON"),
    ("summary.json", lambda text: "[" * 10**5, "is not JSON"),
    ("summary.json", lambda text: "[]", "should be a table"),
    ("summary.json", summarised(task=3), "task should be a name"),
    ("summary.json", summarised(unit="x" * 999), "unit should be a text"),
    ("summary.json", summarised(task="beale"), "task should be saddle"),
    ("summary.json", summarised(ranked_by="train_loss"), "a task of kind surface"),
    ("summary.json", summarised(ranked_by="cost"), "a task of kind surface"),
    ("summary.json", summarised(ranked_by=["value"]), "ranked_by"),
    ("summary.json", summarised(ranking=[]), "the config's optimisers"),
    ("summary.json", summarised(ranking=[{"optimizer": "fast"}]), "ranking should name"),
    ("summary.json", summarised(compared_by="work"), "seconds should be a number"),
    (
        "summary.json",
        summarised(compared_by=[], seconds=1.0, compile_seconds=1.0),
        "a task of kind",
    ),
    ("metrics.csv", lambda text: text.replace("fast", "slow"), "the config's optimisers"),
    ("metrics.csv", lambda text: text.replace("value", "height"), "should have value"),
    ("metrics.csv", lambda text: text + "fast,1\n", "a value for each column"),
    ("metrics.csv", lambda text: text + 'fast,"', "is not CSV"),
    ("metrics.csv", lambda text: text + "fast,-1,1.0,1.0,1.0\n", "a value that a run writes"),
    ("metrics.csv", lambda text: text + "fast,1.5,1.0,1.0,1.0\n", "a value that a run writes"),
    ("metrics.csv", lambda text: text + "fast,1,1e301,1.0,1.0\n", "a value that a run writes"),
    ("metrics.csv", lambda text: text + "fast,1,\x1b[2J,1.0,1.0\n", "a value that a run writes"),
    ("metrics.csv", lambda text: text + "fast,1,1.0,1.0,\n", "should have x1"),
    ("metrics.csv", lambda text: "", "the config's optimisers"),
    ("config.toml", lambda text: text.replace("saddle", "hill"), "task.surface"),
]


@pytest.mark.parametrize(("name", "change", "told"), FAULTS)
def test_what_no_run_writes_is_refused_in_a_line(name, change, told, copy):
    changed(copy, name, change)
    with pytest.raises((FolderError, ConfigError), match=told):
        load_run(copy)
    done = invoke("plot", copy)
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert "Traceback" not in done.output
    assert "\x1b" not in done.stderr


def test_a_summary_of_a_surface_does_not_fit_a_race_on_data(epochs, tmp_path):
    shutil.copytree(epochs[0], tmp_path / "x")
    changed(tmp_path / "x", "summary.json", summarised(ranked_by="value"))
    with pytest.raises(FolderError, match="a task of kind classification"):
        load_run(tmp_path / "x")


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "metrics.csv"])
def test_a_missing_file_and_a_link_are_refused(name, copy, tmp_path):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    with pytest.raises(OSError, match=name if name != "summary.json" else "not finished"):
        load_run(copy)
    (tmp_path / "elsewhere").write_bytes(content)
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="is a link"):
        load_run(copy)


def test_a_sparse_giant_is_not_read(copy):
    os.truncate(copy / "metrics.csv", 2**40)
    with pytest.raises(FolderError, match="holds more than"):
        load_run(copy)


def test_the_command_writes_through_no_link(copy, tmp_path):
    (copy / "cost.png").unlink()
    (tmp_path / "victim").write_text("precious")
    (copy / "cost.png").symlink_to(tmp_path / "victim")
    done = invoke("plot", copy)
    assert done.exit_code == 2
    assert "cost.png: is a link" in done.stderr
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("\n0,fast,", "\n1,fast,"), "line 2 should be member 0"),
        (lambda text: text.replace(",0.01,", ",nan,", 1), "line 2 should be member 0"),
        (lambda text: text.replace(",0.01,", ",,", 1), "line 2 should be member 0"),
        (lambda text: text.replace("\n0,fast,", "\n0,slow,"), "line 2 should be member 0"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "should hold 16 members"),
        (lambda text: text.replace("learning_rate", "rate"), "line 2 should be member 0"),
    ],
)
def test_members_of_another_sweep_are_refused(change, told, starts, tmp_path):
    shutil.copytree(starts[0], tmp_path / "x")
    changed(tmp_path / "x", "members.csv", change)
    with pytest.raises(FolderError, match=told):
        load_run(tmp_path / "x")


def test_the_order_of_the_axes_is_that_of_the_rows(tmp_path):
    """The TOML that a sweep writes may name a list of values before a range."""
    axes = {"learning_rate": {"log": [0.01, 0.1], "points": 2}, "momentum": [0.5, 0.9]}
    config = parse_config(
        WALK
        | {
            "optimizers": {"fast": {"method": "momentum", "learning_rate": 0.1}},
            "sweep": {"axes": axes},
        }
    )
    result = sweep(config)
    folder = kept(tmp_path / "x", config, result)
    found = load_run(folder)
    assert found.members == result.members
    assert [list(m.values) for m in found.members] == [list(m.values) for m in result.members]
    assert "heatmap" in plot(folder)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FolderError, match=r"has no config\.toml"):
        load_run(tmp_path)
    with pytest.raises(FolderError, match="is not the folder of a run"):
        load_run(tmp_path / "nowhere")


def test_reading_a_run_needs_no_jax(epochs):
    code = (
        "import sys; from gradxform.lab import load_run\n"
        f"print(load_run({str(epochs[0])!r}).histories[0].label, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "adam False\n", done.stderr
