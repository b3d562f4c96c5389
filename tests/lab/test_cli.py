"""The command line: what it prints and keeps, how it fails, and that it answers without JAX."""

import csv
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import gradxform
from gradxform.lab import results, train
from gradxform.lab.cli import app
from gradxform.lab.config import load_config

SHORT = ["--set", "training.epochs=2", "--set", "training.batch_size=256"]
TWO = "optimizers={sgd={method='sgd', learning_rate=0.5}, adam={method='adam'}}"


def invoke(*args, **environment):
    return CliRunner().invoke(app, [str(a) for a in args], env=environment or None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short race: its output and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = invoke("run", "digits_race", *SHORT, "--set", TWO, "--out", folder)
    assert done.exit_code == 0, done.output
    return done, folder


def test_a_run_keeps_its_results(finished):
    _, folder = finished
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["config.toml", "cost.png", "metrics.csv", "summary.json", "work.png"]
    for name in ("cost.png", "work.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_metrics_have_a_row_an_epoch(finished):
    _, folder = finished
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [("sgd", "1"), ("sgd", "2"), ("adam", "1"), ("adam", "2")]
    assert [(row["optimizer"], row["epoch"]) for row in rows] == expected
    metrics = {
        f"{part}_{m}" for part in ("train", "validation", "test") for m in ("loss", "accuracy")
    }
    work = {"epoch", "step", "seconds", "gradients", "steps_per_second"}
    assert set(rows[0]) == {"optimizer", "cost"} | work | metrics
    assert all(float(row["cost"]) > 0 for row in rows)


def test_the_summary_agrees_with_the_metrics(finished):
    _, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["rank"] for entry in summary["ranking"]] == [1, 2]
    with (folder / "metrics.csv").open(newline="") as file:
        last = {row["optimizer"]: row for row in csv.DictReader(file)}
    for entry in summary["ranking"]:
        assert entry["final"]["test_loss"] == float(last[entry["optimizer"]]["test_loss"])
    losses = [entry["final"]["train_loss"] for entry in summary["ranking"]]
    assert losses == sorted(losses)
    assert summary["versions"]["gradxform"]


def test_the_table_goes_to_stdout_and_progress_to_stderr(finished):
    done, folder = finished
    heading = "# optimiser train loss val. acc. test steps/s"
    for words in [*heading.split(), "diverged", "sgd", "adam"]:
        assert words in done.stdout
    assert "epoch 2/2" not in done.stdout
    assert "sgd: epoch 2/2, cost" in done.stderr
    assert str(folder) in done.stderr


def test_the_kept_config_runs_again_to_the_same_numbers(finished, tmp_path):
    _, folder = finished
    config = load_config(folder / "config.toml")
    assert config.training.epochs == 2
    done = invoke("run", folder / "config.toml", "--out", tmp_path / "again", "--quiet")
    assert done.exit_code == 0, done.output

    def costs(path):
        with (path / "metrics.csv").open(newline="") as file:
            return [row["cost"] for row in csv.DictReader(file)]

    assert costs(tmp_path / "again") == costs(folder)
    assert "epoch" not in done.stderr


def test_no_run_is_overwritten(finished):
    _, folder = finished
    before = {file: file.read_bytes() for file in folder.iterdir()}
    done = invoke("run", "digits_race", *SHORT, "--out", folder)
    assert done.exit_code == 2
    assert "is there already" in done.stderr
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_default_folders_never_collide(tmp_path):
    folders = [results.new_folder(tmp_path, "race") for _ in range(3)]
    assert all(folder.is_dir() and folder.name.startswith("race-") for folder in folders)
    assert len(set(folders)) == 3


def test_a_surface_can_be_raced(tmp_path):
    file = tmp_path / "walk.toml"
    file.write_text(
        'name = "walk"\n[task]\nkind = "surface"\nsurface = "rosenbrock"\n[training]\nsteps = 20\n'
        '[optimizers.sgd]\nmethod = "sgd"\nlearning_rate = 1e-3\n'
        '[optimizers.wild]\nmethod = "sgd"\nlearning_rate = 10.0\n'
        f"[output]\nfolder = {json.dumps(str(tmp_path / 'runs'))}\n"
    )
    done = invoke("run", file)
    assert done.exit_code == 0, done.output
    assert " at " in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["diverged"] for entry in summary["ranking"]] == [False, True]
    assert summary["ranking"][1]["final"]["value"] is None  # JSON has no NaN
    assert (folder / "cost.png").is_file()


def fails(*args, code=2):
    done = invoke(*args)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.stderr


def test_user_mistakes_are_told_without_a_traceback(tmp_path):
    assert "did you mean 'digits_race'" in fails("run", "digit_race")
    assert "did you mean 'epochs'" in fails("run", "digits_race", "--set", "training.epoch=3")
    told = fails("run", "digits_race", "--set", "optimizers.sgd.learning_rate=-1")
    assert "optimizers.sgd.learning_rate: should be at least 0 and finite, found -1" in told
    told = fails("run", "keras_mnist", "--data-dir", tmp_path)
    assert str(tmp_path) in told
    assert "--data-dir" in told or "train-images" in told
    assert "Missing argument" in fails("run")
    fails("list", "everything")
    fails("run", "digits_race", "--sett", "a=b")


def test_a_model_that_does_not_fit_is_told(tmp_path):
    told = fails("run", "digits_race", "--set", "task.model=cnn", "--out", tmp_path / "x")
    assert "too small" in told
    assert not (tmp_path / "x").exists()  # what never began leaves nothing


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    out = file / "x"
    assert f"--out {out}: File exists ({file})" in fails("run", "digits_race", "--out", out)
    told = fails("run", "digits_race", "--set", f"output.folder={json.dumps(str(file))}")
    assert f"output.folder: {file}: File exists" in told
    file.unlink()
    assert not list(tmp_path.iterdir())


def test_what_comes_to_nothing_leaves_nothing(tmp_path):
    told = fails(
        "run", "digits_race", "--set", "task.validation_split=0.9999", "--out", tmp_path / "a" / "b"
    )
    assert "leaves none of 1437 examples to train on" in told
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()  # the user's own is kept
    fails("run", "mnist_race", "--data-dir", tmp_path, "--out", tmp_path / "empty")
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_an_optimizer_is_refused_before_the_data_is_looked_for(tmp_path):
    entry = "optimizers.sgd={method='rmsprop', learning_rate=0.1, nesterov=true}"
    told = fails("run", "keras_mnist", "--set", entry, "--data-dir", tmp_path)
    assert "optimizers.sgd.nesterov: rmsprop(nesterov=True) needs momentum" in told
    told = fails("run", "keras_mnist", "--set", "optimizers.sgd.learning_rate=-1")
    assert "optimizers.sgd.learning_rate: " in told


def test_texts_of_a_config_are_no_markup(tmp_path):
    labels = ("[/x]", "[red]fast", "_hid", ":smile:")
    entries = ", ".join(f"{json.dumps(x)}={{method='adam'}}" for x in labels)
    title = "[/b] cost $x_$"
    done = invoke(
        *("run", "digits_race", *SHORT, "--set", f"optimizers={{{entries}}}"),
        *("--set", f"title={json.dumps(title)}", "--out", tmp_path / "x"),
    )
    assert done.exit_code == 0, done.output
    for text in (*labels, title):
        assert text in done.stdout


def test_a_folder_of_data_that_is_not_needed_is_told(tmp_path):
    entry = "optimizers.sgd.learning_rate=-1"
    args = ("--data-dir", tmp_path, "--set", "training.epochs=1", "--set", TWO, "--out")
    done = invoke("run", "digits_race", *args, tmp_path / "x", "--quiet")
    assert done.exit_code == 0
    assert f"--data-dir {tmp_path} is not used: digits come with scikit-learn" in done.stderr
    assert "is not used" not in fails("run", "keras_mnist", *args[:2], "--set", entry)
    told = fails("run", "transformer", "--data-dir", tmp_path, "--out", tmp_path / "x")
    assert f"--data-dir {tmp_path} is not used: the text is made on the spot" in told


@pytest.mark.parametrize("said", [None, "RESOURCE_EXHAUSTED: 9 GB\nx", "INTERNAL: Out of memory"])
def test_what_does_not_fit_in_memory_is_told(said, tmp_path, monkeypatch):
    from jax.errors import JaxRuntimeError

    def race(config, data, on_row):
        raise JaxRuntimeError(said) if said else MemoryError

    monkeypatch.setattr(train, "race", race)
    told = fails("run", "digits_race", "--out", tmp_path / "x")
    assert told.startswith("gradxform: does not fit in memory: ")
    assert len(told.splitlines()) == 1


def test_an_interrupted_race_keeps_its_metrics(tmp_path, monkeypatch):
    def interrupted(config, data, on_row):
        on_row("sgd", {"epoch": 1, "cost": 2.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "race", interrupted)
    told = fails("run", "digits_race", "--out", tmp_path / "x", code=130)
    assert "interrupted" in told
    assert (tmp_path / "x" / "metrics.csv").read_text() == "optimizer,epoch,cost\nsgd,1,2.0\n"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "file.txt"
    results.write_atomically(target, "first")

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        results.write_atomically(target, "second")
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert target.read_text() == "first"


def test_version():
    done = invoke("--version")
    assert (done.exit_code, done.stdout) == (0, f"gradxform {gradxform.__version__}\n")


def test_help_teaches():
    for args in (["--help"], ["run", "--help"]):
        done = invoke(*args)
        assert done.exit_code == 0
        assert "gradxform run digits_race" in done.stdout
    assert "GRADXFORM_DATA" in done.stdout
    assert "runs/NAME-TIMESTAMP" in done.stdout


def test_list_shows_what_there_is():
    done = invoke("list")
    assert done.exit_code == 0
    for name in ("coordinate_descent", "optax.adamw", "linear_decay", "mnist", "keras_mnist"):
        assert name in done.stdout
    only = invoke("list", "configs").stdout
    assert "digits_race" in only
    assert "adadelta" not in only


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["list"],
        ["run", "digits_race", "--set", "training.epoch=3"],
        ["run", "digits_race", "--set", "optimizers.sgd.rate=3"],
    ],
    ids=["help", "run help", "version", "list", "wrong key", "wrong argument"],
)
def test_quick_answers_import_nothing_slow(args):
    code = (
        "import sys, gradxform.lab.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "found = {'jax', 'optax', 'flax', 'matplotlib', 'sklearn', 'pooch'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
