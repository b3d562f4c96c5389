"""Checkpoints: a run that was stopped in any way goes on to the numbers of one that was not."""

import csv
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import gradxform as gx
from gradxform.lab.cli import app
from gradxform.lab.data.sets import Dataset, Split
from gradxform.lab.experiment.grid import Axis, members
from gradxform.lab.tasks.task import make_task
from gradxform.lab.training import checkpoints, surfaces
from gradxform.lab.training import race as train
from gradxform.lab.training.checkpoints import CheckpointError, Snapshot, fit, keeping, newest, save
from gradxform.lab.training.sweep import sweep_on_task
from tests.thinning import LONG, every, long_form

TIMES = ("seconds", "steps_per_second")
KILLS = int(os.environ.get("GRADXFORM_KILLS", "1"))  # 50 for a long look
OPTIMIZERS = (
    "optimizers={sgd={method='sgd', learning_rate=0.5}, adam={method='adam', learning_rate=0.01}}"
)
RUN = [
    *("run", "digits_race", "--set", "training.epochs=5", "--set", "training.batch_size=256"),
    *("--set", OPTIMIZERS, "--set", "task.model=logistic", "--set", "task.model_options={}"),
    *("--set", "checkpoint.every=1"),
]


def silent(message):
    raise AssertionError(f"told {message!r}")


def same(a, b):
    """Equal bit for bit, and of the same types."""
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.dtype, x.shape) == (y.dtype, y.shape) and x.tobytes() == y.tobytes()
        for x, y in zip(map(np.asarray, leaves), map(np.asarray, others), strict=True)
    )


# -- files


TREE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "half": jnp.asarray([1.5, -0.0], jnp.bfloat16),
    "count": jnp.asarray(7, jnp.int32),
    "nothing": (jnp.zeros((0, 4)), optax.EmptyState()),
    "flags": jnp.asarray([True, False]),
    "lost": jnp.asarray([jnp.nan, jnp.inf]),
}


def snapshot(number, arrays=TREE):
    return Snapshot(number, {"rows": [{"epoch": number, "cost": float("nan"), "x": 0.1}]}, arrays)


def test_what_is_saved_is_restored(tmp_path):
    save(tmp_path / "c", snapshot(3), keep=1, about={"config": "é\n"})
    found, about = newest(tmp_path / "c", silent)
    assert same(fit(found.arrays, TREE), TREE)
    assert (found.number, about) == (3, {"config": "é\n"})
    (row,) = found.record["rows"]
    assert (row["epoch"], row["x"]) == (3, 0.1)
    assert type(row["epoch"]) is int
    assert np.isnan(row["cost"])


def test_random_keys_are_restored(tmp_path):
    key = jax.random.key(5, impl="rbg")
    save(tmp_path, snapshot(1, key), keep=1)
    restored = fit(newest(tmp_path, silent)[0].arrays, jax.eval_shape(lambda: key))
    assert jax.random.key_impl(restored) == "rbg"
    assert jax.random.uniform(restored) == jax.random.uniform(key)


def test_arrays_of_another_run_are_refused(tmp_path):
    save(tmp_path, snapshot(1), keep=1)
    arrays = newest(tmp_path, silent)[0].arrays
    for other in (
        TREE | {"w": jnp.zeros((3, 2))},
        TREE | {"count": jnp.float32(0)},
        TREE | {"z": jnp.float32(0)},
        {name: x for name, x in TREE.items() if name != "w"},
    ):
        with pytest.raises(CheckpointError, match="not those of this run"):
            fit(arrays, other)


def test_the_last_ones_are_kept_whatever_the_clock_says(tmp_path):
    for number in (1, 2, 9, 10, 11):
        save(tmp_path, snapshot(number), keep=2)
        os.utime(tmp_path / f"{number:08d}", (1e9 - number, 1e9 - number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000011"]
    assert newest(tmp_path, silent)[0].number == 11


def test_no_checkpoint_is_none(tmp_path):
    assert newest(tmp_path / "absent", silent) is None
    assert newest(tmp_path, silent) is None


def flipped(data, at):
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def test_damage_to_any_file_is_seen_and_the_one_before_used(tmp_path):
    good = tmp_path / "good"
    save(good, snapshot(1), keep=2)
    save(good, snapshot(2), keep=2)
    files = [p.relative_to(good) for p in (good / "00000002").rglob("*") if p.is_file()]
    assert len(files) > 5
    rng = random.Random(0)
    for file in files:
        data = (good / file).read_bytes()
        for damage in ("flip", "truncate", "remove"):
            folder = tmp_path / "damaged"
            shutil.copytree(good, folder)
            match damage:
                case "flip":
                    (folder / file).write_bytes(flipped(data, rng.randrange(8 * len(data))))
                case "truncate":
                    (folder / file).write_bytes(data[: len(data) // 2])
                case "remove":
                    (folder / file).unlink()
            told = []
            found, _ = newest(folder, told.append)
            assert found.number == 1, (file, damage)
            assert len(told) == 1
            assert "checkpoint 2 is damaged" in told[0]
            assert same(fit(found.arrays, TREE), TREE)
            shutil.rmtree(folder)


def test_a_checkpoint_takes_the_place_of_damaged_and_unfinished_ones(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, snapshot(number), keep=3)
    for number in (2, 3):
        (tmp_path / f"0000000{number}" / "told.json").unlink()
    left = tmp_path / ".gradxform-unfinished-x"  # as a process leaves it that is killed
    (left / "arrays.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (left / "arrays.orbax-checkpoint-tmp" / "d" / "0").write_text("")
    (left / "manifest.json").write_text("{}")
    save(tmp_path, snapshot(2), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]
    assert newest(tmp_path, silent)[0].number == 2


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    big = jax.random.normal(jax.random.key(0), (1000, 100))
    told = []
    with keeping(tmp_path / "c", every=1, keep=1, about=None, say=told.append) as on_state:
        on_state(1, lambda: snapshot(1))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            on_state(2, lambda: snapshot(2, big))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["00000001"]
        assert len(told) == 1
        assert told[0].startswith("checkpoint 2 cannot be written, the last one is 1: ")
        on_state(3, lambda: snapshot(3, big))
    assert newest(tmp_path / "c", silent)[0].number == 3


def test_a_checkpoint_is_due_every_so_many_epochs(tmp_path):
    with keeping(tmp_path, every=3, keep=9, about=None, say=silent) as on_state:
        for number in range(1, 8):
            on_state(number, functools.partial(snapshot, number))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 6]


def test_an_interruption_ends_between_epochs_with_a_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for stop in (signal.SIGINT, signal.SIGTERM):
        told, heard = [], threading.Event()

        def say(message, told=told, heard=heard):
            told.append(message)
            heard.set()

        folder = tmp_path / stop.name

        def run(folder=folder, say=say, heard=heard, stop=stop):
            options = {"every": 100, "keep": 1, "about": None, "say": say}
            with keeping(folder, **options) as on_state:
                on_state(1, lambda: snapshot(1))
                signal.raise_signal(stop)
                assert heard.wait(60)
                assert not folder.exists()  # the epoch is not over
                on_state(2, lambda: snapshot(2))

        with pytest.raises(KeyboardInterrupt):
            run()
        assert told == [
            "stopping after this epoch, with a checkpoint; press Ctrl-C again to stop at once"
        ]
        assert newest(folder, silent)[0].number == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_interruption_ends_at_once(tmp_path):
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from gradxform.lab.training.checkpoints import keeping\n"
        "say = lambda message: print(message, flush=True)\n"
        "with keeping(Path(sys.argv[1]), every=1, keep=1, about=None, say=say):\n"
        "    say('ready')\n"
        "    lock = threading.Lock()\n"
        "    lock.acquire()\n"
        "    lock.acquire()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline().startswith("stopping after this epoch")
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130


# -- races


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    splits = [
        Split(rng.integers(0, 17, (n, 4, 4)).astype(np.uint8), rng.integers(0, 3, n, np.int32))
        for n in (50, 20)
    ]
    return make_task(Dataset("noise", *splits, 3, 16.0), "logistic")


def untimed(history):
    rows = [{k: x for k, x in row.items() if k not in TIMES} for row in history.rows]
    return history.label, repr(rows), history.diverged  # as text NaN equals NaN


def test_a_race_goes_on_from_any_epoch_bit_for_bit(task, tmp_path):
    transformations = {
        "adam": gx.adam(0.01),
        "wild": optax.scale(float("nan")),  # diverges in its first epoch
        "noisy": gx.polyak_average(optax.chain(optax.add_noise(0.1, 0.5, key=3), gx.sgd(0.1))),
    }
    options = {"epochs": 2, "batch_size": 16, "seed": 1}
    taken = []

    def on_state(number, make):
        save(tmp_path / str(number), make(), keep=1)
        taken.append(number)

    whole = train.race_on_task(task, transformations, on_state=on_state, **options)
    assert taken == list(range(1, 1 + sum(len(history.rows) for history in whole.histories)))
    assert [history.diverged for history in whole.histories] == [False, True, False]
    for number in (1, 4, 5):  # at an optimiser's second epoch, its last, and the end
        found, _ = newest(tmp_path / str(number), silent)
        rows = []
        rest = train.race_on_task(
            task,
            transformations,
            resume=found,
            on_row=lambda label, row, rows=rows: rows.append(label),
            **options,
        )
        assert len(rows) == taken[-1] - number
        for history, expected in zip(rest.histories, whole.histories, strict=True):
            assert untimed(history) == untimed(expected)
            assert same(history.params, expected.params)
    with pytest.raises(CheckpointError, match="of the optimisers adam"):
        train.race_on_task(task, {"sgd": gx.sgd(0.1)}, resume=found, **options)


@pytest.mark.parametrize("vary", ["initialisation", "both"] if LONG else ["both"])
def test_a_sweep_goes_on_from_any_epoch_bit_for_bit(vary, task, tmp_path):
    """In several blocks, before and after a rung."""
    tables = {
        "sgd": {"method": "sgd", "learning_rate": 0.1},
        "momentum": {"method": "momentum", "learning_rate": 0.1},
    }
    rates = {"learning_rate": Axis((0.01, 0.1, 1e38))}
    runs = members(tables, rates, {}, seeds=8)
    options = {"epochs": 3, "batch_size": 16, "rungs": (1,), "vary": vary, "block_size": 8}
    whole = sweep_on_task(
        task,
        tables,
        runs,
        on_state=lambda number, make: save(tmp_path / str(number), make(), keep=1),
        **options,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == list("123456")
    for number in (2, 3):  # after a rung, and between two programs
        epochs = []
        found, _ = newest(tmp_path / str(number), silent)
        rest = sweep_on_task(
            task,
            tables,
            runs,
            resume=found,
            on_epoch=lambda label, epoch, rows, epochs=epochs: epochs.append(epoch),
            **options,
        )
        assert epochs == [1, 2, 3, 1, 2, 3][number:]
        np.testing.assert_array_equal(rest.costs, whole.costs)
        without_times = [
            repr([{k: x for k, x in row.items() if k not in TIMES} for row in result.rows])
            for result in (rest, whole)
        ]
        assert without_times[0] == without_times[1]
    del found.record["group"]
    with pytest.raises(CheckpointError, match="another version"):
        sweep_on_task(task, tables, runs, resume=found, **options)
    found.record.update(group=1, members=[0])
    with pytest.raises(CheckpointError, match="members should be of the program"):
        sweep_on_task(task, tables, runs, resume=found, **options)


# -- the command


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def untimed_csv(folder, name="metrics.csv"):
    with (folder / name).open(newline="") as file:
        return [{k: x for k, x in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = invoke(*RUN, "--out", folder)
    assert done.exit_code == 0, done.output
    return folder


def stopped(finished, folder, number):
    """The folder of a run as if it had been killed after the last checkpoint."""
    shutil.copytree(finished, folder)
    for name in ("metrics.csv", "summary.json", "cost.png", "work.png"):
        (folder / name).unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > number:
            shutil.rmtree(path)
    return folder


def test_a_run_keeps_its_last_checkpoints(finished):
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["00000009", "00000010"]


def test_a_run_goes_on_in_its_folder(finished, tmp_path):
    folder = stopped(finished, tmp_path / "x", 9)
    done = invoke("run", "--resume", folder)
    assert done.exit_code == 0, done.output
    assert "resuming from checkpoint 9" in done.stderr
    assert "adam: epoch 5/5" in done.stderr
    assert "adam: epoch 4/5" not in done.stderr
    assert "numbers may differ" not in done.stderr
    assert untimed_csv(folder) == untimed_csv(finished)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in finished.iterdir())


def test_a_finished_run_says_so(finished):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    done = invoke("run", "--resume", finished)
    assert done.exit_code == 0
    assert "is finished" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_without_a_whole_checkpoint_it_starts_again(finished, tmp_path):
    folder = stopped(finished, tmp_path / "x", 10)
    for manifest in (folder / "checkpoints").rglob("manifest.json"):
        manifest.write_text("{}")
    done = invoke("run", "--resume", folder, "--quiet")
    assert done.exit_code == 0, done.output
    for words in ("checkpoint 10 is damaged", "checkpoint 9 is damaged", "from the beginning"):
        assert words in done.stderr
    assert untimed_csv(folder) == untimed_csv(finished)


def refused(*args):
    done = invoke("run", *args)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    return done.stderr


def test_another_config_is_refused_with_the_difference(finished, tmp_path):
    folder = stopped(finished, tmp_path / "x", 9)
    told = refused("--resume", folder, "--set", "optimizers.adam.learning_rate=0.02")
    assert "\n-learning_rate = 0.01\n+learning_rate = 0.02" in told
    assert "+title" in refused("digits_second_order", "--resume", folder)
    assert "stays in its folder" in refused("--resume", folder, "--out", tmp_path / "y")
    assert "no run has started there" in refused("--resume", tmp_path)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 1"))
    assert "\n-seed = 0\n+seed = 1" in refused("--resume", folder)


def test_the_same_config_is_accepted(finished, tmp_path):
    folder = stopped(finished, tmp_path / "x", 10)
    done = invoke(*RUN, "--resume", folder, "--quiet")
    assert done.exit_code == 0, done.output


def test_a_folder_is_for_one_process(finished, tmp_path):
    folder = stopped(finished, tmp_path / "x", 9)
    with checkpoints.locked(folder):
        assert "another process is using this folder" in refused("--resume", folder)
    with checkpoints.locked(folder):
        pass


def test_other_versions_are_told(finished, tmp_path, monkeypatch):
    folder = stopped(finished, tmp_path / "x", 10)
    monkeypatch.setattr(optax, "__version__", "9.9")
    done = invoke("run", "--resume", folder, "--quiet")
    assert done.exit_code == 0, done.output
    assert "numbers may differ" in done.stderr


def test_what_is_told_in_another_way_is_refused(finished, tmp_path):
    folder = stopped(finished, tmp_path / "x", 9)
    checkpoint = folder / "checkpoints" / "00000009"
    kept = json.loads((checkpoint / "told.json").read_text())
    wrong = ("about", {}), ("about", 3), ("told", {"histories": 3}), ("told", {"histories": [{}]})
    for key, value in wrong:
        (checkpoint / "told.json").write_text(json.dumps(kept | {key: value}))
        manifest = json.dumps(checkpoints.digests_of(checkpoint))
        (checkpoint / "manifest.json").write_text(manifest)
        assert "another version has written it" in refused("--resume", folder)


def test_a_sweep_goes_on_in_its_folder(tmp_path):
    folder = tmp_path / "x"
    axes = "sweep.axes.learning_rate=[0.1, 0.5]"
    done = invoke("sweep", *RUN[1:], "--set", axes, "--out", folder, "--quiet")
    assert done.exit_code == 0, done.output
    before = untimed_csv(folder, "members.csv")
    assert "is finished" in invoke("sweep", "--resume", folder).stderr
    for path in (folder / "summary.json", folder / "members.csv"):
        path.unlink()
    shutil.rmtree(folder / "checkpoints" / "00000010")
    assert f"gradxform sweep --resume {folder}" in refused("--resume", folder)
    done = invoke("sweep", "--resume", folder)
    assert done.exit_code == 0, done.output
    assert "resuming from checkpoint 9" in done.stderr
    assert "adam: epoch 5/5" in done.stderr
    assert "adam: epoch 4/5" not in done.stderr
    assert untimed_csv(folder, "members.csv") == before


def test_a_surface_has_no_checkpoints():
    assert "checkpoint: unknown key" in refused("valley", "--set", "checkpoint.every=1")


COMMAND = [sys.executable, "-c", "from gradxform.lab.cli import main; main()"]


def start(*args):
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def resumed(finished, folder):
    """Whether a run that is gone on with ends as the one that nothing stopped."""
    config = folder / "config.toml"
    if not config.exists() or not config.stat().st_size:
        assert "no run has started there" in refused("--resume", folder)
        return True
    done = invoke("run", "--resume", folder, "--quiet")
    assert done.exit_code == 0, done.output
    return untimed_csv(folder) == untimed_csv(finished)


def test_an_interrupted_run_goes_on(finished, tmp_path):
    with start(*RUN, "--out", tmp_path / "x") as run:
        assert run.stderr.readline().startswith("sgd: epoch 1/5")
        run.send_signal(signal.SIGINT)
        told = run.stderr.read()
        assert run.wait(60) == 130
    assert f"interrupted; to continue: gradxform run --resume {tmp_path / 'x'}" in told
    assert (tmp_path / "x" / "metrics.csv").is_file()
    assert resumed(finished, tmp_path / "x")


KILLED = """
import os, signal, sys
from gradxform.lab import cli
from gradxform.lab.training import checkpoints

name, count, *sys.argv[1:] = sys.argv[1:]
owner = checkpoints if hasattr(checkpoints, name) else os
original, calls = getattr(owner, name), 0

def killing(*args, **options):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)

setattr(owner, name, killing)
cli.main()
"""


@pytest.mark.parametrize(("where", "call"), every(2, [("digests_of", 4), ("discard", 2)]))
def test_a_run_killed_while_it_writes_goes_on(where, call, finished, tmp_path):
    args = [sys.executable, "-c", KILLED, where, str(call), *RUN, "--out", str(tmp_path / "x")]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert resumed(finished, tmp_path / "x")


@long_form
def test_a_run_killed_at_random_goes_on(finished, tmp_path):
    rng = random.Random(KILLS)
    tried = {"killed": 0, "killed again": 0, "over before": 0, "lost": 0}
    for trial in range(KILLS):
        folder = tmp_path / str(trial)
        again = KILLS > 2 and rng.random() < 0.5
        for kind in ("killed", "killed again")[: 1 + again]:
            begun = kind == "killed again"
            with start("run", "--resume", folder) if begun else start(*RUN, "--out", folder) as run:
                run.stderr.readline()  # until here all is as in any other run
                time.sleep(rng.uniform(0, 1.5))
                run.kill()
            tried[kind if run.returncode == -signal.SIGKILL else "over before"] += 1
        tried["lost"] += not resumed(finished, folder)
    print(tried)
    assert not tried["lost"]


INTERRUPTED = """
import os, signal, sys
from gradxform.lab import cli

where, *sys.argv[1:] = sys.argv[1:]
if where == "import":
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "jax":
                os.kill(os.getpid(), signal.SIGINT)
    sys.meta_path.insert(0, Finder())
else:
    import jax
    from gradxform.lab.data import sets as data
    from gradxform.lab.training import race as train
    owner, name = {
        "data": (data, "load"), "compile": (train, "init_state"), "epoch": (train, "of_first")
    }[where]
    original = getattr(owner, name)

    asked = []

    def interrupting(*args, **options):
        try:
            if not asked:  # the second one would end the process at once
                asked.append(os.kill(os.getpid(), signal.SIGINT))
        except KeyboardInterrupt:
            pass  # as Python does where it is raised inside a callback
        return original(*args, **options)

    setattr(owner, name, interrupting)
cli.main()
"""


@pytest.mark.parametrize("where", ["import", "data", "compile", "epoch"])
def test_no_interruption_is_lost_or_kills_the_interpreter(where, tmp_path):
    """Whether there are checkpoints or not, and in the middle of whatever."""
    without = ("--set", "checkpoint.every=0", "--out", tmp_path / "x")
    args = [sys.executable, "-X", "faulthandler", "-c", INTERRUPTED, where, *RUN, *without]
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    begun = where in ("compile", "epoch")
    hint = "; --set checkpoint.every=1 keeps checkpoints, from which a run continues"
    assert done.stderr.endswith(f"gradxform: interrupted{hint if begun else ''}\n")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "x" / "metrics.csv").exists() == begun
    assert (tmp_path / "x").exists() == begun
    if begun:
        assert done.stderr.count("sgd: epoch") == 1
        assert "stopping after this epoch; press Ctrl-C again to stop at once" in done.stderr


def test_an_interrupted_walk_ends_after_an_optimiser(tmp_path, monkeypatch):
    heard = []

    def interrupting(*args, walk=surfaces.make_walk):
        if not heard:  # the second one would end this process
            heard.append(signal.raise_signal(signal.SIGINT))
        return walk(*args)

    monkeypatch.setattr(surfaces, "make_walk", interrupting)
    done = invoke("run", "valley", "--set", "training.steps=2", "--out", tmp_path / "x")
    assert done.exit_code == 130, done.output
    assert "stopping after this optimiser" in done.stderr
    assert done.stderr.endswith("gradxform: interrupted\n")
