"""The command line: what it prints and keeps, how it fails, and that it answers without JAX."""

import collections
import csv
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import gradxform
from gradxform.lab import cli
from gradxform.lab.cli import app
from gradxform.lab.commands import progress
from gradxform.lab.experiment import experiment, methods
from gradxform.lab.experiment.experiment import prepared
from gradxform.lab.experiment.load import ConfigError, load_config, parse_config, shipped_configs
from gradxform.lab.experiment.messages import plain
from gradxform.lab.report import folder as places
from gradxform.lab.training import race as train

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
    folders = [places.new_folder(tmp_path, "race") for _ in range(3)]
    assert all(folder.is_dir() and folder.name.startswith("race-") for folder in folders)
    assert len(set(folders)) == 3


def test_of_two_runs_begun_at_once_one_gets_the_folder(tmp_path):
    config = load_config("digits_race")
    for number in range(20):
        out, start = tmp_path / str(number), threading.Barrier(4)
        if number % 2:
            out.mkdir()  # an empty one may be there

        def begin(name, out=out, start=start):
            own = config.model_copy(update={"name": name})
            start.wait()
            try:
                with places.run_folder(prepared(own), out) as folder:
                    (folder / f"of_{name}").touch()
                return name
            except OSError as error:
                return str(error)

        with ThreadPoolExecutor(4) as pool:
            first, *others = sorted(pool.map(begin, "abcd"), key=len)
        assert all(told.startswith(f"--out {out}: ") for told in others)
        assert sorted(file.name for file in out.iterdir()) == ["config.toml", f"of_{first}"]
        assert load_config(out / "config.toml").name == first


def test_a_run_that_comes_a_moment_later_leaves_the_first_alone(tmp_path, monkeypatch):
    config = load_config("digits_race")
    with places.run_folder(prepared(config), tmp_path / "x") as folder:
        before = (folder / "config.toml").read_bytes()
        monkeypatch.setattr(places, "any", lambda _: False, raising=False)  # it looked before
        told = fails("run", "digits_race", "--set", "seed=7", "--out", folder)
        assert "is there already; name a new folder" in told
        assert (folder / "config.toml").read_bytes() == before


def test_a_folder_without_permission_is_told(monkeypatch, tmp_path):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    told = fails("run", "digits_race", "--out", tmp_path / "x")
    assert f"--out {tmp_path / 'x'}: Permission denied ({tmp_path / 'x'})" in told
    told = fails("run", "digits_race", "--set", f"output.folder={json.dumps(str(tmp_path))}")
    assert f"output.folder: {tmp_path}: Permission denied" in told


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the users of Unix")
def test_a_folder_that_is_read_only_is_told():
    config, user = load_config("digits_race"), os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "read_only")
        folder.mkdir()
        for path in (name, folder):
            os.chmod(path, 0o555)
        try:
            if user == 0:  # whom no permission stops
                os.seteuid(65534)
            for out in (folder, folder / "x"):
                with (
                    pytest.raises(OSError, match=f"^--out {out}: Permission denied"),
                    places.run_folder(prepared(config), out),
                ):
                    pass
        finally:
            os.seteuid(user)
            os.chmod(name, 0o755)
        assert not any(folder.iterdir())


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
    assert "missing argument CONFIG" in fails("run")
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
    assert f"--data-dir {tmp_path} is not used: the text is generated" in told


@pytest.mark.parametrize("said", [None, "RESOURCE_EXHAUSTED: 9 GB\nx", "INTERNAL: Out of memory"])
def test_what_does_not_fit_in_memory_is_told(said, tmp_path, monkeypatch):
    from jax.errors import JaxRuntimeError

    def race(config, data, on_row, **_):
        raise JaxRuntimeError(said) if said else MemoryError

    monkeypatch.setattr(train, "race", race)
    told = fails("run", "digits_race", "--out", tmp_path / "x")
    assert told.startswith("gradxform: does not fit in memory: ")
    assert len(told.splitlines()) == 1


def test_an_interrupted_race_keeps_its_metrics(tmp_path, monkeypatch):
    def interrupted(config, data, on_row, **_):
        on_row("sgd", {"epoch": 1, "cost": 2.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "race", interrupted)
    told = fails("run", "digits_race", "--out", tmp_path / "x", code=130)
    assert "interrupted" in told
    assert (tmp_path / "x" / "metrics.csv").read_text() == "optimizer,epoch,cost\nsgd,1,2.0\n"


def test_the_advice_after_an_interruption_is_the_whole_command(tmp_path, monkeypatch):
    def interrupted(*args, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "race", interrupted)
    (tmp_path / "own.py").touch()
    options = ("--with", tmp_path / "own.py", "--set", "checkpoint.every=1")
    told = fails("run", "digits_race", *options, "--out", tmp_path / "x", code=130)
    assert f"gradxform run --resume {tmp_path / 'x'} --with {tmp_path / 'own.py'}" in told


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "file.txt"
    places.write_atomically(target, "first")

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        places.write_atomically(target, "second")
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


QUICK = (
    ["--help"],
    ["run", "--help"],
    ["--version"],
    ["list"],
    ["run", "digits_race", "--set", "training.epoch=3"],
    ["run", "digits_race", "--set", "optimizers.sgd.rate=3"],
    ["movie", "--help"],
    ["movie", "digits_race"],
    ["sweep", "--help"],
    ["sweep", "digits_race"],
)


def test_quick_answers_import_nothing_slow():
    code = (
        "import json, sys, gradxform.lab.cli as cli\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = args\n"
        "    try: cli.main()\n"
        "    except SystemExit: pass\n"
        "    slow = {'jax', 'optax', 'flax', 'matplotlib', 'sklearn', 'pooch'} & set(sys.modules)\n"
        "    if slow: sys.exit(f'{args} imported {slow}')\n"
        "print('answered all')\n"
    )
    done = program(json.dumps(QUICK), code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("answered all\n")


# -- sweeps

AXES = "sweep={seeds=2, axes={learning_rate=[0.1, 0.5]}, overrides={adam={b2=[0.9, 0.99]}}}"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A short sweep of two optimisers, one by two axes: its output and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    small = ("--set", "task.model=logistic", "--set", AXES)
    done = invoke("sweep", "digits_race", *SHORT, "--set", TWO, *small, "--out", folder)
    assert done.exit_code == 0, done.output
    return done, folder


def test_a_sweep_keeps_its_results(swept):
    _, folder = swept
    figures, tables = ["heatmap.png", "sensitivity.png"], ["costs.csv", "members.csv"]
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(["best.toml", "config.toml", *figures, *tables, "summary.json"])
    for name in figures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_a_sweep_have_every_member(swept):
    _, folder = swept
    with (folder / "members.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["member"] for row in rows] == [str(i) for i in range(12)]
    assert [row["optimizer"] for row in rows] == ["sgd"] * 4 + ["adam"] * 8
    assert {"learning_rate", "b2", "seed", "cost", "validation_loss", "diverged"} <= set(rows[0])
    assert (rows[0]["b2"], rows[-1]["b2"]) == ("", "0.99")
    with (folder / "costs.csv").open(newline="") as file:
        costs = list(csv.DictReader(file))
    assert len(costs) == 24
    assert float(costs[-1]["cost"]) == pytest.approx(float(rows[-1]["cost"]), rel=1e-6)


def test_the_best_points_of_a_sweep_can_be_raced(swept, tmp_path):
    _, folder = swept
    best = load_config(folder / "best.toml")
    assert best.sweep is None
    with (folder / "members.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["optimizer"] == "sgd"]
    losses = {rate: 0.0 for rate in ("0.1", "0.5")}
    for row in rows:
        losses[row["learning_rate"]] += float(row["validation_loss"])
    assert best.optimizers["sgd"]["learning_rate"] == float(min(losses, key=losses.__getitem__))
    ran = invoke("run", folder / "best.toml", "--out", tmp_path / "x", "--quiet")
    assert ran.exit_code == 0, ran.output
    (entry,) = (
        entry
        for entry in json.loads((tmp_path / "x" / "summary.json").read_text())["ranking"]
        if entry["optimizer"] == "sgd"
    )
    swept_loss = json.loads((folder / "summary.json").read_text())["best"]
    (point,) = (point for point in swept_loss if point["optimizer"] == "sgd")
    member = point["members"][0]
    assert entry["final"]["validation_loss"] == pytest.approx(member["validation_loss"], rel=1e-5)


def test_a_sweep_prints_the_best_points(swept):
    done, folder = swept
    for words in ("best point", "learning_rate 0.", "b2 0.9", "sgd", "adam", "0 of 8"):
        assert words in done.stdout
    assert "sgd: epoch 2/2, 4 members" in done.stderr
    assert str(folder) in done.stderr


def test_a_run_ignores_the_sweep(swept, tmp_path):
    _, folder = swept
    one = ("--set", "training.epochs=1", "--out", tmp_path / "x", "--quiet")
    done = invoke("run", folder / "config.toml", *one)
    assert done.exit_code == 0, done.output
    assert load_config(tmp_path / "x" / "config.toml").sweep is not None


def test_a_surface_can_be_swept(tmp_path):
    sweep = "sweep={starts={points=3}, axes={learning_rate=[1e-3, 0.01]}}"
    one = "optimizers={sgd={method='sgd', learning_rate=0.1}}"
    args = ("--set", one, "--set", sweep, "--set", "training.steps=500", "--out", tmp_path / "x")
    done = invoke("sweep", "valley", *args)
    assert done.exit_code == 0, done.output
    assert "sgd: epoch 1/1, 18 members" in done.stderr
    names = sorted(file.name for file in (tmp_path / "x").iterdir())
    tables = ["best.toml", "config.toml", "members.csv", "summary.json"]
    assert names == sorted([*tables, "sensitivity.png", "starts.png"])


def test_mistakes_in_a_sweep_are_told(tmp_path):
    told = fails("sweep", "digits_race", "--out", tmp_path / "x")
    assert "sweep: missing, for instance [sweep.axes] with learning_rate" in told
    told = fails("sweep", "digits_race", "--set", "sweep.axes.momentm=[0.5]")
    assert "sweep.axes.momentm: no optimiser has such a number, did you mean 'momentum'?" in told
    told = fails("sweep", "keras_mnist", "--set", "sweep.seeds=2", "--data-dir", tmp_path)
    assert str(tmp_path) in told
    file = tmp_path / "file"
    file.write_text("")
    told = fails("sweep", "digits_race", "--set", AXES, "--set", TWO, "--out", file / "x")
    assert f"--out {file / 'x'}: File exists ({file})" in told


def test_no_sweep_is_overwritten(swept):
    _, folder = swept
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert "is there already" in fails("sweep", "digits_race", "--set", AXES, "--out", folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("code", [130, 2])
def test_an_interrupted_sweep_keeps_its_members(code, tmp_path, monkeypatch):
    from gradxform.lab.training import sweep as lab_sweep

    def interrupted(config, data, on_epoch, **_):
        on_epoch("sgd", 1, {1: {"optimizer": "sgd", "cost": 2.0}, 0: {"optimizer": "sgd"}})
        raise KeyboardInterrupt if code == 130 else MemoryError

    monkeypatch.setattr(lab_sweep, "sweep", interrupted)
    args = ("--set", TWO, "--set", AXES, "--out", tmp_path / "x")
    told = fails("sweep", "digits_race", *args, code=code)
    assert ("interrupted" if code == 130 else "does not fit in memory") in told
    kept = (tmp_path / "x" / "members.csv").read_text()
    assert kept == "member,optimizer,cost\n0,sgd,\n1,sgd,2.0\n"


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    from gradxform.lab.training import sweep as lab_sweep

    def full(path, content, write=places.write_atomically):
        if path.name == "members.csv":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(places, "write_atomically", full)
    emptied = lambda *args, **_: args[2]("sgd", 1, {0: {"cost": 1.0}})
    monkeypatch.setattr(lab_sweep, "sweep", emptied)
    args = ("--set", TWO, "--set", AXES, "--out", tmp_path / "x")
    told = fails("sweep", "digits_race", *args)
    assert "No space left on device" in told
    assert "members.csv" in told


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_config_is_written_and_its_optimisers_are_built_once(tmp_path, monkeypatch, command):
    counts = collections.Counter()

    def count(module, name):
        original = getattr(module, name)

        def counting(*args):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, counting)

    count(methods, "build_all")
    count(experiment, "to_toml")
    args = ("--set", TWO, "--set", "sweep.axes.learning_rate=[0.1, 0.5]", "--quiet")
    done = invoke(command, "digits_race", *SHORT, *args, "--out", tmp_path / "x")
    assert done.exit_code == 0, done.output
    assert counts == {"build_all": 1, "to_toml": 1}


def test_the_bars_show_the_remaining_time(monkeypatch):
    text = io.StringIO()
    on_terminal = functools.partial(Console, file=text, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **options: on_terminal())
    config = load_config("digits_race", ["training.epochs=3", TWO])
    row = {"epoch": 1, "cost": 0.5}
    with progress.of_race(config, False, [("sgd", row), ("sgd", row)]):
        pass
    assert re.search(r"sgd.*2/3.*cost 0\.5.*remaining", text.getvalue())


# -- where it runs

MAIN = "from gradxform.lab.__main__ import main; main()"


def program(*args, code=MAIN, **environment):
    """What the command does in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    told = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, env=os.environ | environment, **told, errors="replace")


@pytest.mark.parametrize("lacking", ["typer", "rich", "pydantic"])
def test_without_the_extra_the_command_tells_what_to_install(lacking):
    code = f"import sys; sys.modules[{lacking!r}] = None; {MAIN}"
    done = program("run", "digits_race", code=code)
    assert done.returncode == 1
    mend = 'which is not installed: pip install "gradxform[lab]"\n'
    assert done.stderr == f"gradxform: the command needs {lacking}, {mend}"


def test_the_command_is_the_one_that_tells():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["scripts"]["gradxform"] == "gradxform.lab.__main__:main"


def test_help_swallows_no_bracket():
    for command in (cli.run, cli.sweep, cli.movie, cli.list_):
        name = command.__name__.strip("_")
        shown = "".join(invoke(name, "--help").stdout.split())
        written = (command.__doc__ or "").replace("\\[", "[")
        for bracket in re.findall(r"\[[^]]*\]", written):
            assert "".join(bracket.split()) in shown
    assert "The config's [sweep]" in " ".join(invoke("sweep", "--help").stdout.split())


def test_a_run_does_not_mind_a_sweep_that_does_not_fit(tmp_path):
    args = ("--set", "sweep={rungs=[3], axes={learning_rate=[0.1, 0.5], b9=[1.0]}}", "--set", TWO)
    done = invoke("run", "digits_race", *SHORT, *args, "--out", tmp_path / "x", "--quiet")
    assert done.exit_code == 0, done.output
    assert "is finished" in invoke("run", "--resume", tmp_path / "x").stderr
    told = fails("sweep", tmp_path / "x" / "config.toml")
    assert "sweep.axes.b9: no optimiser has such a number" in told
    assert "sweep.rungs: should be before the last epoch, 2, found 3" in told
    assert "sweep.rungs: should be a list" in fails("run", "digits_race", "--set", "sweep.rungs=3")


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_terminal_without_unicode_is_no_mistake(tmp_path):
    done = program("list", **ASCII)
    assert done.returncode == 0, done.stderr
    assert "coordinate_descent" in done.stdout
    assert done.stdout.isascii()
    file = tmp_path / "walk.toml"
    file.write_text(
        'name = "walk"\ntitle = "Höhe – θ"\ntask = {kind = "surface", surface = "quadratic"}\n'
        "training = {steps = 2}\nsweep = {starts = {points = 3}}\n"
        'optimizers = {"θ" = {method = "newton"}}\n'
    )
    code = (
        "import sys; from gradxform.lab.__main__ import main\n"
        "file, folder = sys.argv[1:]\n"
        "for command in ('run', 'sweep'):\n"
        "    print('begin')\n"
        "    sys.argv[1:] = command, file, '--out', f'{folder}/{command}'\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
    )
    done = program(file, tmp_path, code=code, **ASCII)
    assert done.returncode == 0, done.stderr
    _, *told = done.stdout.split("begin\n")
    assert ["H?he ? ?" in words for words in told] == [True, True]


def test_a_config_may_be_a_pipe(tmp_path, monkeypatch):
    file = tmp_path / "pipe"
    os.mkfifo(file)
    text = shipped_configs()["valley"].read_text()
    writer = threading.Thread(target=file.write_text, args=(text,), daemon=True)
    writer.start()
    done = invoke("run", file, "--set", "training.steps=2", "--out", tmp_path / "x", "--quiet")
    assert done.exit_code == 0, done.output
    writer.join(60)
    assert load_config(tmp_path / "x" / "config.toml").name == "valley"
    monkeypatch.chdir(tmp_path)
    os.mkfifo("digits_race")
    assert load_config("digits_race").name == "digits_race"


def test_what_cannot_be_a_config_is_told(tmp_path):
    assert "cannot be read: more than 1048576 bytes" in fails("run", "/dev/zero")
    assert "no such file" in fails("run", "x" * 5000)
    assert "is a folder" in fails("run", tmp_path)


def test_orders_to_a_terminal_are_written_out(tmp_path):
    folder = tmp_path / "a\x1b[2J\u202e"
    one = "optimizers.sgd={method='sgd', learning_rate=0.1}"
    sets = ("--set", one, "--set", "title=\u202eevil\u2066", "--set", "training.steps=2")
    done = invoke("run", "valley", *sets, "--set", f"output.folder={json.dumps(str(folder))}")
    assert done.exit_code == 0, done.output
    assert plain(done.output) == done.output
    assert r"a\x1b[2J\u202e" in done.stderr
    assert r"\u202eevil\u2066" in done.stdout
    (folder / "file").touch()
    args = ("--set", "output.folder=" + json.dumps(str(folder / "file")))
    told = fails("run", "valley", *args)
    assert r"a\x1b[2J\u202e" in told
    assert plain(told) == told


@pytest.mark.parametrize("name", ["learning_rat", "b2"])
def test_many_axes_of_many_optimisers_are_refused_at_once(name):
    count = 1000
    axes = {f"{name}{i}": [2.0] for i in range(count)}
    entries = {f"o{i}": {"method": "adam"} for i in range(count)}
    task = {"kind": "surface", "surface": "saddle"}
    table = {"name": "x", "task": task, "training": {"steps": 1}, "optimizers": entries}
    started = time.process_time()
    with pytest.raises(ConfigError):
        parse_config(table | {"sweep": {"axes": axes}})
    assert time.process_time() - started < 10  # 150 s if each pair is looked at
