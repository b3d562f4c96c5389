"""A run's folder may come from somebody else: whatever lies in it, a resumed run ends in a line.

Nothing outside the folder is read into a message, written or removed, and nothing inside is removed
that is not recognisably ours. ``GRADXFORM_FUZZ=10000`` forges as many checkpoints as that.
"""

import copy
import json
import os
import random
import re
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from typer.testing import CliRunner

from gradxform.lab.cli import app
from gradxform.lab.experiment import folders
from gradxform.lab.experiment.grid import Axis, members
from gradxform.lab.experiment.load import load_config
from gradxform.lab.experiment.messages import plain
from gradxform.lab.report import files
from gradxform.lab.report.tables import best_table, ranking_table
from gradxform.lab.training import race as train
from gradxform.lab.training import records
from gradxform.lab.training.checkpoints import CheckpointError, Snapshot, newest, save
from gradxform.lab.training.members import first_row
from gradxform.lab.training.outcomes import SweepResult
from tests.lab.test_fuzz import CASES, POOL, containers, near, no_hang, places
from tests.lab.test_security import signed

OPTIMIZERS = (
    "optimizers={sgd={method='sgd', learning_rate=0.5}, adam={method='adam', learning_rate=0.01}}"
)
RUN = [
    *("run", "digits_race", "--set", "training.epochs=2", "--set", "training.batch_size=512"),
    *("--set", OPTIMIZERS, "--set", "task.model=logistic", "--set", "task.model_options={}"),
    *("--set", "checkpoint.every=1", "--set", "checkpoint.keep=3", "--quiet", "--out"),
]
LAST = "checkpoints/00000003"


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that was stopped after three of four epochs."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    done = invoke(*RUN, folder)
    assert done.exit_code == 0, done.output
    for name in ("metrics.csv", "summary.json", "cost.png", "work.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "00000004")
    return folder


@pytest.fixture
def run(begun, tmp_path):
    """A copy of that folder, beside a folder of somebody else."""
    victim = tmp_path / "victim"
    for name in (".ssh/id", ".git/HEAD", "5/data", "00000007/data", "file"):
        (victim / name).parent.mkdir(parents=True, exist_ok=True)
        (victim / name).write_text("the victim's secret")
    shutil.copytree(begun, tmp_path / "x")
    return tmp_path / "x"


def listed(folder):
    """All that is in a folder, as it can be told from outside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        small = stat.S_ISREG(status.st_mode) and status.st_size < 10**6
        content = path.read_bytes() if small else b""
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns, content
    return found


def ends_in_a_line(run, *more):
    """What a resumed run tells, once it is seen that it did nothing else."""
    before = listed(run.parent)
    with no_hang(60):
        done = invoke("run", "--resume", run, *more)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2, done.output
    assert listed(run.parent) == before
    assert done.stdout == ""
    assert "secret" not in done.stderr
    assert plain(done.stderr) == done.stderr
    assert all(line.startswith(("gradxform: ", "  ")) for line in done.stderr.splitlines())
    return done.stderr


def replaced(path):
    """Nothing where a file or a folder was."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)


PLACES = [
    *("checkpoints", "checkpoints/00000005", "checkpoints/.gradxform-unfinished-x", LAST),
    *(f"{LAST}/arrays", f"{LAST}/arrays/d", f"{LAST}/manifest.json", f"{LAST}/told.json"),
    *("config.toml", "summary.json", "metrics.csv", "cost.png", "tensorboard", "tensorboard/sgd"),
    "somewhere/else",
]


@pytest.mark.parametrize("target", ["../victim", "../victim/file", "nowhere", ".", "/dev/zero"])
@pytest.mark.parametrize("place", PLACES)
def test_a_link_is_refused_by_name(place, target, run):
    path = run / place
    replaced(path)
    path.symlink_to(os.path.abspath(run / target) if target[0] == "." else target)
    assert f"{path}: is a link" in ends_in_a_line(run, "--tensorboard")


def test_the_folder_itself_may_be_a_link(run):
    (run.parent / "link").symlink_to(run)
    done = invoke("run", "--resume", run.parent / "link", "--quiet")
    assert done.exit_code == 0, done.output
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_neither_file_nor_folder_is_refused_by_name(place, kind, run, monkeypatch):
    path = run / place
    replaced(path)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            monkeypatch.chdir(path.parent)  # the name of a socket is short
            with socket.socket(socket.AF_UNIX) as there:
                there.bind(path.name)
        case "device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("only root makes devices")
    assert f"{path}: is a {kind}" in ends_in_a_line(run)


@pytest.mark.parametrize("place", ["config.toml", "summary.json", "metrics.csv", "cost.png"])
def test_a_folder_in_the_place_of_a_file_is_refused_by_name(place, run):
    replaced(run / place)
    (run / place).mkdir()
    assert f"{run / place}: is a folder" in ends_in_a_line(run)


@pytest.mark.parametrize("place", ["checkpoints", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_refused_by_name(place, run):
    replaced(run / place)
    (run / place).touch()
    assert f"{run / place}: is a file" in ends_in_a_line(run)


@pytest.mark.parametrize(
    "place", ["config.toml", f"{LAST}/told.json", f"{LAST}/manifest.json", f"{LAST}/arrays/d/x"]
)
def test_a_sparse_giant_is_not_read(place, run):
    with (run / place).open("ab") as file:
        file.truncate(2**41)
    if place != "config.toml":
        told = []
        with no_hang(60):
            found, _ = newest(run / "checkpoints", told.append)
        assert found.number == 2
        assert len(told) == 1
        assert re.search("holds more than|does not fit into memory", told[0])
    else:
        assert "config.toml: holds more than" in ends_in_a_line(run)


def test_a_folder_that_is_no_run_is_not_walked_for_ever(run, monkeypatch):
    monkeypatch.setattr(folders, "MOST_ENTRIES", 50)
    for number in range(60):
        (run / "checkpoints" / f"file{number}").touch()
    assert "holds more than 50 files" in ends_in_a_line(run)
    deep = run / "a"
    for _ in range(40):
        deep = deep / "a"
    monkeypatch.setattr(folders, "MOST_ENTRIES", 500)
    deep.mkdir(parents=True)
    assert "more than 32 levels" in ends_in_a_line(run)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("place", ["config.toml", "checkpoints", LAST, f"{LAST}/arrays", "."])
def test_what_another_owns_and_nobody_may_read_is_told(place, begun):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        run = Path(name, "x")
        shutil.copytree(begun, run)
        os.chmod(run / place, 0)
        os.seteuid(65534)
        try:
            done = invoke("run", "--resume", run)
        finally:
            os.seteuid(0)
        assert done.exit_code == 2, done.output
        assert isinstance(done.exception, SystemExit)
        assert len(done.stderr.splitlines()) == 1
        assert "Permission denied" in done.stderr or "no run has started there" in done.stderr


# -- what is removed


def test_only_checkpoints_of_ours_are_removed(tmp_path):
    folder = tmp_path / "c"
    save(folder, Snapshot(1, {}, {"w": jnp.arange(3.0)}), keep=1)
    kept = {
        ".ssh/id": "x",
        ".git/HEAD": "x",
        "5/data": "x",
        "00000000/data": "a name of ours, and no manifest",
        "20240101/photo": "a date",
        ".gradxform-removed-x/data": "no manifest",
        ".gradxform-unfinished-y/manifest.json": "{}",
        ".gradxform-unfinished-y/data": "nothing that a checkpoint has",
        "00000009/manifest.json": '{"../../victim": "' + "0" * 64 + '"}',
        "00000009/data": "x",
        "00000002/data": "in the place of the next one",
        "file": "x",
    }
    for name, content in kept.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (tmp_path / "victim").write_text("x")
    for number in (2, 3, 4):
        save(folder, Snapshot(number, {}, {"w": jnp.arange(3.0)}), keep=1)
    kept["set-aside-00000002-1/data"] = kept.pop("00000002/data")
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert {name: found[name].read_text() for name in kept} == kept
    assert {name.partition("/")[0] for name in found.keys() - kept.keys()} == {"00000004"}
    assert (tmp_path / "victim").exists()


def test_a_file_that_was_put_into_a_checkpoint_keeps_it(tmp_path):
    for number in (1, 2):
        save(tmp_path, Snapshot(number, {}, {"w": jnp.arange(3.0)}), keep=2)
    (tmp_path / "00000001" / "notes.txt").write_text("mine")
    for number in (3, 4, 5):
        save(tmp_path, Snapshot(number, {}, {"w": jnp.arange(3.0)}), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000004", "00000005"]
    assert (tmp_path / "00000001" / "notes.txt").read_text() == "mine"


def test_checkpoints_are_not_written_behind_a_link(tmp_path):
    (tmp_path / "victim" / "00000009").mkdir(parents=True)
    (tmp_path / "c").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="c: is a link"):
        save(tmp_path / "c", Snapshot(1, {}, {"w": jnp.arange(3.0)}), keep=1)
    with pytest.raises(OSError, match="c: is a link"):
        newest(tmp_path / "c", lambda message: None)
    assert [p.name for p in (tmp_path / "victim").iterdir()] == ["00000009"]


def test_arrays_that_do_not_fit_are_not_made(run, monkeypatch):
    monkeypatch.setattr(folders, "memory", lambda: 2000)
    told = []
    assert newest(run / "checkpoints", told.append) is None
    assert all("fit into memory" in line or "holds more than" in line for line in told)


@pytest.mark.parametrize(
    ("shape", "chunks", "told"),
    [
        ([10**12], [10**12], "bytes do not fit into memory"),
        ([2**62, 2**62], [1, 1], "bytes do not fit into memory"),
        ([10**8], [1], "in 100000000 pieces"),
        ([-1], [1], ""),
        ([3], [0], ""),
    ],
)
def test_a_forged_shape_takes_neither_memory_nor_time(shape, chunks, told, tmp_path):
    save(tmp_path, Snapshot(1, {}, {"w": jnp.arange(3.0)}), keep=1)
    arrays = tmp_path / "00000001" / "arrays"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{arrays}/"}).result()
    about = json.loads(store.read(b"0/.zarray").result().value)
    forgery = json.dumps(about | {"shape": shape, "chunks": chunks}).encode()
    store.write(b"0/.zarray", forgery).result()
    signed(arrays.parent)
    said = []
    with no_hang(60):
        assert newest(tmp_path, said.append) is None
    assert len(said) == 1
    assert told in said[0]


def test_nothing_of_a_strangers_file_is_logged(tmp_path, capfd):
    save(tmp_path, Snapshot(1, {}, {"w": jnp.arange(3.0)}), keep=1)
    for name in ("_METADATA", "_CHECKPOINT_METADATA"):
        (tmp_path / "00000001" / "arrays" / name).write_text('{"\x1b[2J')
    signed(tmp_path / "00000001")
    assert newest(tmp_path, lambda message: None) is None
    assert capfd.readouterr().err == ""


# -- what is told

CONTENTS = [
    *(b"", b"\xff", b"\xef\xbb\xbf{}", b"[" * 10**5, b"null", b"3", b"[]", b"{}", b'{"a": NaN}'),
    *(b'{"number": 3, "told": {}, "about": {}, "x": "\xff"}', b'{"number": true}', b"9" * 5000),
    *(b'"\\ud800"', b'"\x1b[2J"', b'{"\\u001b[2J": 1}', b"\x00" * 100, b'{"number": 1e999}'),
    *(b'{"number": 3, "number": 4}', b'{"number": 2, "told": {}, "about": {}}'),
]


@pytest.mark.parametrize("name", ["manifest.json", "told.json"])
def test_a_checkpoint_of_nonsense_is_damaged(name, run):
    for content in CONTENTS:
        (run / LAST / name).write_bytes(content)
        if name == "told.json":
            signed(run / LAST)
        told = []
        found, _ = newest(run / "checkpoints", told.append)
        assert found.number == 2
        assert len(told) == 1, content


def forged(run, change):
    file = run / LAST / "told.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))
    signed(run / LAST)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["told"]["histories"][0].update(rows=[]),
        lambda told: told["told"]["histories"][0]["rows"][0].update(cost="\x1b[2J1.5"),
        lambda told: told["told"]["histories"][0]["rows"][0].update({"\x1b[2J": 1}),
        lambda told: told["told"]["histories"][1].update(label="\x1b[2J"),
        lambda told: told["about"].update(command="\x1b[2J"),
        lambda told: told["about"].update(config="\x1b[2J\n" * 10**5),
        lambda told: told["about"]["made_with"].update(versions={"jax": 3}),
        lambda told: told["about"]["made_with"].update(device=None),
    ],
)
def test_a_forged_checkpoint_ends_in_a_line(change, run):
    forged(run, change)
    before = listed(run.parent)
    with no_hang(120):
        done = invoke("run", "--resume", run)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert plain(done.stderr) == done.stderr
    assert listed(run.parent) == before


def test_a_forged_device_sends_a_terminal_no_orders(run, monkeypatch):
    forged(run, lambda told: told["about"]["made_with"].update(device="\x1b]0;x\x07\u202e" * 9999))
    monkeypatch.setattr(train, "race", ends_here)
    told = invoke("run", "--resume", run).stderr
    assert r"\x1b]0;x\x07\u202e" in told
    assert plain(told) == told
    assert len(told) < 3000


def ends_here(*_, **__):
    raise OSError("ends here")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbf", "not valid TOML"),
        (b"title = '\xff'", "cannot be read: 'utf-8' codec"),
        (b"title = '\x1b[2J'", "not valid TOML"),
        (b'title = "\\u001b[2J"', r"title: should have no control characters, found '\x1b[2J'"),
        (b'"\\u001b[2J" = 1', r"\x1b[2J: unknown key"),
        (b"x = 1\n" * 10**6, "holds more than 1048576 bytes"),
        (b"seed = " + b"[" * 3000, "lists or tables are nested too deep"),
        (b'title = "\\u202e\\u009b2J\\u007f"', "missing"),
    ],
)
def test_a_config_of_nonsense_ends_in_a_line(content, told, run):
    (run / "config.toml").write_bytes(content)
    assert told in ends_in_a_line(run)


def test_names_that_are_no_text_are_shown(run):
    (run / os.fsdecode(b"\xff\x9b")).symlink_to("x")
    assert r"\udcff\udc9b: is a link" in ends_in_a_line(run)


def test_the_names_of_files_are_shown_on_one_line(run):
    path = run / "a\x1b[2J\ngradxform: all is well"
    path.symlink_to("x")
    told = ends_in_a_line(run)
    assert r"a\x1b[2J\ngradxform: all is well: is a link" in told
    assert len(told.splitlines()) == 1


# -- forged histories by the hundred


def spoilt(told, rng):
    """A record with one to three changes."""
    told = copy.deepcopy(told)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = list(places(told))
        if not spots:
            break
        owner, key = rng.choice(spots)
        match rng.randrange(5):
            case 0:
                del owner[key]
            case 1:
                owner[key] = near(owner[key], rng)
            case 2:
                rng.choice(list(containers(told)))[rng.choice(("rows", "x", "epoch", "cost"))] = 1
            case 3:
                owner[key] = [owner[key]] * rng.randrange(3)
            case _:
                owner[key] = copy.deepcopy(rng.choice(POOL))
    return told


def every(told, one):
    """Sees to it that a forgery is found, or does no harm."""
    found = []
    for number in range(max(CASES // 2, 100)):
        forgery = spoilt(told, random.Random(number))
        try:
            one(forgery)
        except CheckpointError as error:
            found.append(len(str(error)))
    assert 0 < max(found) < 1000


def test_forged_races(begun):
    found, _ = newest(begun / "checkpoints", print)
    epochs = {"sgd": 2, "adam": 2}
    assert len(records.race_rows(found.record, epochs)) == 3
    config = load_config(begun / "config.toml")

    def one(told):
        rows = records.race_rows(told, epochs)
        files.metrics_csv(rows)
        histories = tuple(train.History(**history) for history in told["histories"])
        result = train.RaceResult("x", "train_loss", histories, "nats")
        ranking_table(result, "x")
        files.summary_json(config, result, {})

    every(found.record, one)


def test_forged_sweeps():
    tables = {"sgd": {"method": "sgd"}, "adam": {"method": "adam"}}
    runs = members(tables, {"learning_rate": Axis((0.1, 0.2))}, {}, seeds=2)
    firsts = [first_row(member) for member in runs]
    measured = {"train_loss": 0.5, "validation_loss": 0.6}
    rows = {str(n): row | {"epochs": 3, "cost": 1.5} | measured for n, row in enumerate(firsts)}
    for number in (5, 7):
        del rows[str(number)]["train_loss"], rows[str(number)]["validation_loss"]
    told = {"group": 1, "epoch": 2, "rows": rows, "seconds": 1.0, "compile_seconds": 2.0}
    told |= {"members": [5, 7]}
    options = firsts, [(0, 1, 2, 3), (4, 5, 6, 7)], [3, 3], set(measured)
    assert records.check_sweep(told, *options).keys() == set(range(8))

    def one(forgery):
        kept = records.check_sweep(forgery, *options)
        files.members_csv(kept)
        done = [kept[n] | measured for n in range(8)]
        costs = np.full((8, 3), np.nan)
        result = SweepResult("x", "validation_loss", "nats", runs, tuple(done), costs, 1.0, 1.0)
        best_table(result, "x")

    every(told, one)


def test_forged_words_about_a_checkpoint():
    every({"about": ABOUT}, lambda forgery: records.made_with(forgery.get("about")))


ABOUT = {"command": "run", "config": "", "made_with": {"device": "cpu", "versions": {"jax": "1"}}}
