"""``gradxform resume``: more of a run, to the same numbers as if it had been asked for at once."""

import csv
import json
import shutil
import tomllib

import pytest

from gradxform.lab.training import checkpoints
from gradxform.lab.training import race as train
from tests.lab.commands.test_cli import fails, invoke

EPOCHS = "training.epochs"
#: One loses its way at once, and one has a number of epochs of its own.
OPTIMIZERS = """optimizers={
  sgd = {method="momentum", learning_rate=0.1},
  lost = {method="sgd", learning_rate=3e38},
  short = {method="adam"},
  adam = {method="adam", learning_rate=0.01},
}""".replace("\n", "").replace(",}", "}")
RUN = [
    *("run", "digits_race", "--quiet", "--set", "training.batch_size=256", "--set", OPTIMIZERS),
    *("--set", "training.overrides={short={epochs=2}}", "--set", "checkpoint.every=2"),
]
TIMES = {"seconds", "steps_per_second"}


def ran(folder, epochs, *args):
    done = invoke(*RUN, *args, "--set", f"{EPOCHS}={epochs}", "--out", folder)
    assert done.exit_code == 0, done.output
    return folder


def resumed(folder, *args):
    done = invoke("resume", folder, *args)
    assert done.exit_code == 0, done.output
    return done.stderr


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: x for k, x in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def config(folder):
    return tomllib.loads((folder / "config.toml").read_text())


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("runs") / "long", 5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("runs") / "short", 3)


@pytest.fixture
def short(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "x")


def test_a_finished_run_gets_more_epochs(short, long):
    said = resumed(short, "--epochs", 5)
    assert all(f"{label}: epoch {n}/5" in said for label in ("sgd", "adam") for n in (4, 5))
    assert "epoch 3/5" not in said
    assert "lost: epoch" not in said
    assert "short: epoch" not in said
    assert rows(short) == rows(long)
    assert config(short) == config(long)
    assert "there is nothing to resume" in resumed(short)


@pytest.mark.parametrize("after", [1, 3])
def test_it_may_be_interrupted_meanwhile(short, long, after, monkeypatch):
    """In the first optimiser and in the last one."""
    original, count = train._timed, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_timed", interrupted)
        assert invoke("resume", short, "--epochs", 5).exit_code == 130
    assert config(short)["training"]["epochs"] == 5
    resumed(short, "--quiet")
    assert rows(short) == rows(long)


def test_an_interrupted_run_goes_on_to_more_epochs(finished, long, tmp_path):
    short = shutil.copytree(finished, tmp_path / "x")
    (short / "summary.json").unlink()
    shutil.rmtree(short / "ended" / "0003")  # the last checkpoint is in the middle of adam
    assert "resuming from checkpoint 8" in resumed(short, "--epochs", 5)
    assert rows(short) == rows(long)


def test_without_its_last_state_it_cannot(short, tmp_path):
    before = (short / "config.toml").read_bytes()
    shutil.rmtree(short / "ended" / "0000")
    told = fails("resume", short, "--epochs", 5)
    assert told.splitlines()[-1] == (
        f"gradxform: {short}: the state of sgd at its end is missing: to train for longer, a run "
        "needs checkpoint.every above 0 from its start"
    )
    shutil.rmtree(short / "checkpoints")
    assert f"{short} has no usable checkpoint: to train" in fails("resume", short, "--epochs", 5)
    assert (short / "config.toml").read_bytes() == before
    assert (short / "summary.json").is_file()


def test_a_state_at_the_end_is_checked(short):
    """It may come from somebody else, as the whole folder may."""
    (place,) = (short / "ended" / "0000").iterdir()
    kept = json.loads((place / "told.json").read_text())
    history = kept["told"]["history"]
    rows = [{**row, "epoch": "1"} for row in history["rows"]]
    for wrong in (
        {"history": 3},
        {"is_lost": 1},
        {"history": {**history, "rows": []}},
        {"history": {**history, "rows": rows}},
        {"history": {**history, "rows": 9 * history["rows"]}},
        {"history": {**history, "label": "adam"}},
    ):
        (place / "told.json").write_text(json.dumps(kept | {"told": kept["told"] | wrong}))
        (place / "manifest.json").write_text(json.dumps(checkpoints.digests_of(place)))
        told = fails("resume", short, "--epochs", 5)
        assert "another version has written it" in told or "it is of the optimisers adam" in told
    assert (short / "summary.json").is_file()


def test_what_cannot_get_more_says_so(short, tmp_path):
    told = fails("resume", short, "--epochs", 2)
    assert told == "gradxform: --epochs 2: this run already has 3 epochs; give more\n"
    assert "there is nothing to resume" in resumed(short, "--epochs", 3)
    assert "no run has started there" in fails("resume", tmp_path / "y")
    walk = tmp_path / "walk"
    assert invoke("run", "valley", "--set", "training.steps=2", "--out", walk).exit_code == 0
    told = fails("resume", walk, "--epochs", 9)
    assert "a task of kind 'surface' has no epochs; run it again with more steps" in told


def test_a_sweep_is_recognised(tmp_path):
    folder = tmp_path / "x"
    axes = "sweep.axes.learning_rate=[0.1, 0.5]"
    args = ("sweep", *RUN[1:-6], "--set", f"{EPOCHS}=3", "--set", "checkpoint.every=1")
    two = "optimizers={sgd={method='sgd', learning_rate=0.5}}"
    done = invoke(*args, "--set", two, "--set", axes, "--out", folder)
    assert done.exit_code == 0, done.output
    told = fails("resume", folder, "--epochs", 9)
    assert told == f"gradxform: --epochs 9: {folder} is a sweep; only a run can get more\n"
    for name in ("summary.json", "members.csv"):  # as if it had been killed
        (folder / name).unlink()
    assert "resuming from checkpoint 3" in resumed(folder)
    assert (folder / "members.csv").is_file()


def test_a_run_that_was_killed_at_once_may_be_either(tmp_path):
    config = tmp_path / "config.toml"
    sweep = "sweep={axes={learning_rate=[0.1, 0.5]}}"
    shown = invoke("show", "digits_race", "--set", f"{EPOCHS}=1", "--set", sweep).stdout
    config.write_text(shown)
    told = fails("resume", tmp_path)
    assert f"use gradxform run --resume {tmp_path}, or gradxform sweep --resume" in told
