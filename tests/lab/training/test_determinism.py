"""The same run twice gives the same bits, whatever process it is in and whatever the clock says."""

import csv
import datetime
import os
import shutil
import subprocess
import sys
import time
import types

import pytest
from typer.testing import CliRunner

from gradxform.lab.cli import app
from gradxform.lab.experiment.experiment import prepared
from gradxform.lab.experiment.load import load_config
from gradxform.lab.report import folder as places
from tests.thinning import long_form

# prints a digest of all that a race and a sweep find, but for the times
PROGRAM = """
import hashlib, sys
import jax, numpy as np
from gradxform.lab.experiment.load import parse_config
from gradxform.lab.data.sets import load
from gradxform.lab.training.sweep import sweep
from gradxform.lab.training.race import race

schedule = {"schedule": "linear_decay", "init_value": 0.2, "end_value": 0, "transition_steps": 9}
optimizers = {
    "sgd": {"method": "sgd", "learning_rate": schedule},
    "lbfgs": {"method": "lbfgs"},
    "newton_cg": {"method": "newton_cg", "curvature": "gauss_newton"},
}
task = {"kind": "classification", "dataset": "digits", "model": "mlp", "validation_split": 0.2}
task["model_options"] = {"hidden": [8], "dropout": 0.2}
config = {"name": "x", "task": task, "training": {"epochs": 2, "batch_size": 100}}
config["optimizers"] = optimizers
data = load("digits")

def told(rows):
    times = ("seconds", "steps_per_second")
    return repr([{k: x for k, x in row.items() if k not in times} for row in rows])

def digest(text, arrays):
    found = hashlib.sha256(text.encode())
    for x in jax.tree.leaves(arrays):
        found.update(np.asarray(x).tobytes())
    print(found.hexdigest())

for history in race(parse_config(config), data).histories:
    digest(history.label + told(history.rows), history.params)
config["optimizers"] = {"adam": {"method": "adam"}}
config["sweep"] = {"seeds": 2, "vary": "both", "axes": {"learning_rate": [0.01, 0.1]}}
swept = sweep(parse_config(config), data)
digest(told(swept.rows), swept.costs)
"""


@long_form
def test_two_processes_find_the_same_bits():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            # a set or a hash that is used in some order would show
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    try:
        first, second = (process.communicate(timeout=300)[0].split() for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert len(first) == len(set(first)) == 4
    assert first == second


# -- the clock


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes back an hour each time somebody looks."""
    now = time.time()

    def back():
        nonlocal now
        now -= 3600
        return now

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(back(), tz)

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(places, "datetime", types.SimpleNamespace(datetime=Clock))


def test_folders_are_named_though_the_clock_goes_back(clock, tmp_path, monkeypatch):
    config = load_config("digits_race")
    config = config.model_copy(
        update={"output": config.output.model_copy(update={"folder": str(tmp_path)})}
    )
    folders = []
    for again in range(6):
        if again == 3:  # and stands still

            class Still(datetime.datetime):
                @classmethod
                def now(cls, tz=None):
                    return cls(2026, 10, 25, 2, 30)

            monkeypatch.setattr(places, "datetime", types.SimpleNamespace(datetime=Still))
        with places.run_folder(prepared(config)) as folder:
            (folder / "metrics.csv").touch()
            folders.append(folder)
    assert len(set(folders)) == 6
    assert all((folder / "metrics.csv").is_file() for folder in folders)
    assert [folder.name for folder in folders[3:]] == [
        f"digits_race-20261025-023000{end}" for end in ("", "-2", "-3")
    ]


def test_a_run_goes_on_though_the_clock_goes_back(clock, tmp_path):
    def invoke(*args):
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        assert done.exit_code == 0, done.output
        return done

    def rows():
        with (tmp_path / "x" / "metrics.csv").open(newline="") as file:
            return [
                {k: x for k, x in row.items() if k not in ("seconds", "steps_per_second")}
                for row in csv.DictReader(file)
            ]

    adam = "optimizers={adam={method='adam'}}"
    logistic = ("--set", "task.model=logistic", "--set", "task.model_options={}")
    every = ("--set", "checkpoint={every=1, keep=9}", "--set", "training.epochs=6")
    invoke("run", "digits_race", *logistic, *every, "--set", adam, "--out", tmp_path / "x")
    whole, folder = rows(), tmp_path / "x" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:08d}" for i in range(1, 7)]
    for number in (4, 5, 6):
        shutil.rmtree(folder / f"{number:08d}")
    for name in ("metrics.csv", "summary.json"):
        (tmp_path / "x" / name).unlink()
    assert "resuming from checkpoint 3" in invoke("run", "--resume", tmp_path / "x").stderr
    assert rows() == whole
    with (tmp_path / "x" / "metrics.csv").open(newline="") as file:
        assert all(float(row["steps_per_second"]) > 0 for row in csv.DictReader(file))
