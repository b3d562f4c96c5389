"""The lab from Python."""

import json
from pathlib import Path

import numpy as np
import pytest

import gradxform.lab as lab
from tests.snippets import errors_of

RACE = {
    "name": "short",
    "task": {"kind": "classification", "dataset": "digits", "model": "logistic"},
    "training": {"epochs": 2, "batch_size": 256},
    "optimizers": {
        "Adam": {"method": "adam", "learning_rate": 0.01},
        "SGD": {"method": "sgd", "learning_rate": 1e-4},
    },
    "sweep": {"axes": {"learning_rate": [0.01, 0.1]}},
}
WALK = {
    "name": "walk",
    "task": {"kind": "surface", "surface": "saddle"},
    "training": {"steps": 2},
    "optimizers": {"SGD": {"method": "sgd", "learning_rate": 0.1}},
}


def test_a_race_from_tables():
    before = json.dumps(RACE)
    config = lab.load_config(RACE, "training.epochs=1")
    assert json.dumps(RACE) == before  # settings do not change the caller's tables
    result = lab.race(config)
    assert [history.label for history in result.ranking] == ["Adam", "SGD"]
    assert [(row["optimizer"], row["epoch"]) for row in result.rows] == [("Adam", 1), ("SGD", 1)]
    assert set(lab.plot(result, config)) == {"cost", "work"}


def test_rows_are_a_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    assert len(pandas.DataFrame(lab.race(WALK).rows)) == 3


def test_a_sweep_from_tables():
    result = lab.sweep(lab.load_config(RACE, "training.epochs=1", "optimizers.Adam.eps=1e-7"))
    assert len(result.rows) == 4
    assert len(result.points["SGD"]) == 2
    assert {point.label for point in result.best} == {"Adam", "SGD"}


def test_a_movie_is_shown_and_saved(tmp_path):
    movie = lab.movie(WALK)
    assert movie._repr_html_().startswith('<img src="data:image/gif;base64,')
    movie.save(tmp_path / "walk.gif")
    assert (tmp_path / "walk.gif").read_bytes()[:4] == b"GIF8"


def test_data_are_read_from_a_folder(tmp_path):
    x = np.arange(10.0)
    np.savez(tmp_path / "line.npz", x=x, y=2 * x)
    task = {"kind": "regression", "file": "line.npz", "target": "y", "model": "linear"}
    table = RACE | {"task": task, "optimizers": {"Newton": {"method": "newton"}}}
    (history,) = lab.race(table, data_dir=tmp_path).histories
    assert history.rows[-1]["test_rmse"] < 1e-3
    with pytest.raises(Exception, match=r"line\.npz: no such file in"):
        lab.race(table)


def test_arguments_of_the_wrong_type_are_named_in_one_line(tmp_path):
    read = lab.load_config("valley")
    for call, message in (
        (lambda: lab.race(3), r"^race\(config=3\): expected a TOML file, the name of a shipped"),
        (lambda: lab.load_config(read, "training.steps=3"), r"read already: give the settings"),
        (lambda: lab.plot(3), r"plot\(result=3\): expected the result of a race or a sweep, or"),
        (lambda: lab.plot(tmp_path, log="z"), r"plot\(log='z'\): log must be one of 'x', 'y'"),
        (lambda: lab.plot(tmp_path, dpi=0), r"plot\(dpi=0\): dpi must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_names_are_documented_and_complete():
    for name in lab.__all__:
        assert getattr(lab, name).__doc__, name
        assert name in dir(lab)
    with pytest.raises(AttributeError, match="has no attribute 'racee'"):
        lab.racee  # noqa: B018


def test_type_checkers_know_the_names_and_their_arguments(tmp_path):
    lines = [
        "import gradxform.lab as lab",
        *(f"lab.{name}" for name in lab.__all__),
        'lab.race("digits_race", data_dir="data").histories[0].label.upper()',
        'lab.racee("digits_race")',
        'lab.race("digits_race", datadir="data")',
        "lab.load_run(3)",
    ]
    assert errors_of(lines, tmp_path, Path(lab.__file__).parents[2]) == {
        'lab.racee("digits_race")': "reportAttributeAccessIssue",
        'lab.race("digits_race", datadir="data")': "reportCallIssue",
        "lab.load_run(3)": "reportArgumentType",
    }
