"""Several processes on one machine, which do a run or a sweep together by ``jax.distributed``."""

import csv
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from gradxform import adam
from gradxform.lab.data.sets import load
from gradxform.lab.experiment.load import parse_config
from gradxform.lab.tasks.task import make_task
from gradxform.lab.training import epoch, processes
from gradxform.lab.training import race as train
from gradxform.lab.training.sweep import sweep
from tests.lab.commands.test_cli import fails, invoke
from tests.thinning import LONG, long_form

TASK = """
name = "processes"

[task]
kind = "classification"
dataset = "digits"
model = "logistic"
validation_split = 0.2

"""

# batches that the devices do not divide
RUN = f"""{TASK}
[training]
epochs = 60
batch_size = 301

[checkpoint]
every = 10

[optimizers.momentum]
method = "momentum"
learning_rate = 0.1

[optimizers.adam]
method = "adam"
"""

SWEEP = f"""{TASK}
[training]
epochs = 3

[checkpoint]
every = 1

[optimizers.sgd]
method = "sgd"
learning_rate = 0.1

[sweep]
seeds = 2
vary = "order"
rungs = [1]
axes = {{learning_rate = {{log = [0.001, 1.0], points = 3}}}}
"""

COMMAND = (sys.executable, "-c", "from gradxform.lab.cli import main; main()")


# says the largest piece of Python's and NumPy's memory at the first epoch's end
WATCHED = """
import sys
import tracemalloc
from gradxform.lab import cli
from gradxform.lab.training import race as train
race_on_task = train.race_on_task

def watched(*arguments, on_row, **options):
    def told(*row):
        traces = tracemalloc.take_snapshot().traces
        print("largest", max(trace.size for trace in traces), file=sys.stderr)
        on_row(*row)
    return race_on_task(*arguments, on_row=told, **options)

train.race_on_task = watched
tracemalloc.start()
cli.main()
"""


def begin(count, devices, *arguments, code=COMMAND[-1]):
    """Processes of so many devices each; of a list of arguments each takes its own."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [
                *COMMAND[:-1],
                code,
                *(a[number] if isinstance(a, list) else a for a in arguments),
                *("--distributed", f"{address},{number},{count}"),
            ],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def ended(begun):
    """What they said, once all have ended."""
    try:
        return [process.communicate(timeout=300)[1] for process in begun]
    finally:
        for process in begun:
            process.kill()


def wait_for_checkpoint(folder, number, begun):
    """Waits for a checkpoint of at least this number, as long as all processes run."""

    def checkpoints():
        found = folder.iterdir() if folder.is_dir() else ()
        return [int(path.name) for path in found if path.name.isdecimal()]

    while max(checkpoints(), default=0) < number:
        if any(process.poll() is not None for process in begun):
            pytest.fail(str(ended(begun)))
        time.sleep(0.02)


def rows_of(file):
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@long_form
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path):
    """With ``GRADXFORM_LONG=1`` it is four processes, then two that are stopped, then one."""
    file, out = tmp_path / "config.toml", tmp_path / "out"
    file.write_text(RUN, encoding="utf-8")
    first = begin(4 if LONG else 2, 1, "run", file, "--out", out)
    wait_for_checkpoint(out / "checkpoints", 20, first)
    first[-1].kill()
    told = ended(first)
    assert all(process.returncode != 0 for process in first)
    assert "another process has ended" in told[0]

    behind = tmp_path / "behind"
    shutil.copytree(out, behind)
    shutil.rmtree(max(p for p in (behind / "checkpoints").iterdir() if p.name.isdecimal()))
    unlike = begin(2, 1, "run", "--resume", [out, behind])
    told = ended(unlike)
    assert [process.returncode for process in unlike] == [2, 2], told
    assert all("the newest checkpoint is" in words for words in told), told

    if LONG:
        two = begin(2, 3, "run", "--resume", out)
        wait_for_checkpoint(out / "checkpoints", 70, two)
        two[1].send_signal(signal.SIGTERM)
        told = ended(two)
        assert [process.returncode for process in two] == [130, 130], told
        assert re.search(r"resuming from checkpoint \d+0\n", told[0]), told
        assert "resuming from" not in told[1]

    done = invoke("run", "--resume", out)
    assert done.exit_code == 0, done.output
    expected = train.race(parse_config(tomllib.loads(RUN)), load("digits"))
    rows = rows_of(out / "metrics.csv")
    assert len(rows) == 120
    for history in expected.histories:
        own = [row for row in rows if row["optimizer"] == history.label]
        for row, alone in zip(own, history.rows, strict=True):
            for name in ("cost", "train_loss", "validation_loss", "test_loss", "gradients"):
                assert math.isclose(float(row[name]), alone[name], rel_tol=1e-4), (name, row)


def test_processes_divide_the_members_of_a_sweep(tmp_path):
    file, out = tmp_path / "config.toml", tmp_path / "out"
    file.write_text(SWEEP, encoding="utf-8")
    two = begin(2, 2, "sweep", file, "--out", out)
    told = ended(two)
    assert [process.returncode for process in two] == [0, 0], told
    assert [f"Results are in {out}" in words for words in told] == [True, False]
    expected = sweep(parse_config(tomllib.loads(SWEEP)), load("digits")).rows
    assert [row["dropped"] for row in expected] == [True] * 2 + [False] * 4
    check_members(out, expected)

    # its second epoch was the last that was kept: the rest on eight devices of one process
    shutil.rmtree(out / "checkpoints" / "00000003")
    (out / "summary.json").unlink()
    (out / "members.csv").unlink()
    done = invoke("sweep", "--resume", out)
    assert done.exit_code == 0, done.output
    assert "resuming from checkpoint 2" in done.stderr
    check_members(out, expected)


def check_members(out, expected):
    for row, alone in zip(rows_of(out / "members.csv"), expected, strict=True):
        assert row.keys() - {"member"} == alone.keys()
        for name, value in alone.items():
            if isinstance(value, float) and name != "seconds":
                assert math.isclose(float(row[name]), value, rel_tol=1e-5), name


def test_no_device_holds_more_than_its_part_of_the_data():
    """Nor does an epoch send more than the batches, the gradients and some numbers."""
    mesh = processes.mesh_of("batch", jax.devices())
    task = make_task(load("digits"), "logistic")
    data = epoch.to_device(task.train, mesh)
    whole = NamedSharding(mesh, processes.WHOLE)
    assert {shard.data.shape for shard in data.x.addressable_shards} == {(180, 8, 8)}
    np.testing.assert_array_equal(np.asarray(data.x)[: len(task.train.x)], task.train.x)

    one = epoch.make_epoch(task, adam(), batch_size=20, mesh=mesh)
    state = epoch.init_state(adam(), task.init(jax.random.key(0)), jax.random.key(1))
    state = processes.put_all(state, mesh)
    text = jax.jit(one, out_shardings=whole).lower(state, data).compile().as_text()
    sent = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)\(", text)
    assert sent
    sizes = [
        math.prod(map(int, shape.split(",")))
        for shapes in sent
        for shape in re.findall(r"\[([\d,]+)\]", shapes)
    ]
    assert max(sizes) == 24 * 64  # the images of a batch


def test_a_process_keeps_its_own_part_of_the_data_alone(tmp_path):
    """Once it has read and verified all: no block of Python's memory is larger than its part."""
    rng = np.random.default_rng(0)
    for name, count in (("data_batch_1", 2000), ("data_batch_2", 1000), ("test_batch", 900)):
        records = rng.integers(0, 256, (count, 3073), np.uint8)
        records[:, 0] %= 10
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    file = tmp_path / "config.toml"
    alone = RUN.partition("[optimizers.adam]")[0]  # looking at all memory takes long
    cifar = alone.replace("digits", "cifar10").replace("epochs = 60", "epochs = 1")
    file.write_text(cifar, encoding="utf-8")
    options = ("run", file, "--data-dir", tmp_path, "--out", tmp_path / "out")
    two = begin(2, 1, *options, code=WATCHED)
    told = ended(two)
    assert [process.returncode for process in two] == [0, 0], told
    largest = [int(size) for words in told for size in re.findall(r"largest (\d+)", words)]
    assert len(largest) == 2
    training_part = 0.8 * 3000 * 3072
    assert max(largest) <= training_part / 2


@pytest.mark.parametrize("what", ["data", "config"])
def test_processes_that_are_not_alike_do_not_begin(what, tmp_path):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        (tmp_path / str(seed)).mkdir()
        for name in ("data_batch_1", "test_batch"):
            records = rng.integers(0, 10, (100, 3073), np.uint8)
            (tmp_path / str(seed) / f"{name}.bin").write_bytes(records.tobytes())
    file, out = tmp_path / "config.toml", tmp_path / "out"
    file.write_text(RUN.replace("digits", "cifar10"), encoding="utf-8")
    folders = [tmp_path / "0", tmp_path / ("1" if what == "data" else "0")]
    seeds = ["seed=1", "seed=2" if what == "config" else "seed=1"]
    two = begin(2, 1, "run", file, "--data-dir", folders, "--set", seeds, "--out", out)
    told = ended(two)
    assert [process.returncode for process in two] == [2, 2], told
    assert all(f"not all processes have read the same {what}" in words for words in told), told
    assert not out.exists()


def test_keys_and_what_is_not_finite_are_put_on_every_device():
    mesh = processes.mesh_of("batch", jax.devices())
    arrays = {"key": jax.random.key(3), "x": np.asarray([np.nan, 1.0], np.float32)}
    found = processes.put_all(arrays, mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(found)} == {8}
    np.testing.assert_array_equal(found["x"], arrays["x"])
    assert processes.read(found["key"]).tolist() == jax.random.key_data(arrays["key"]).tolist()


@pytest.mark.parametrize(
    "given",
    [
        *("localhost:1", "localhost:1,a,2", "localhost,0,2", ":1,0,2", "localhost:,0,2"),
        *("localhost:x,0,2", "localhost:0,0,2", "localhost:65536,0,2", "localhost:1,0,0"),
    ],
)
def test_mistakes_are_told(given, tmp_path):
    for command in ("run", "sweep"):
        told = fails(command, "learning_rate", "--out", tmp_path / "x", "--distributed", given)
        assert "should be auto, or HOST:PORT,PROCESS,PROCESSES" in told
    assert not any(tmp_path.iterdir())


def test_who_cannot_join_is_told(tmp_path, monkeypatch):
    def said(given):
        out = tmp_path / "x"
        return fails("run", "learning_rate", "--out", out, "--distributed", given)

    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert f"cannot listen at port {port}: Address already in use" in said(
            f"localhost:{port},0,2"
        )
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    assert "process 0 did not start to listen there within 0.1 s" in said(f"localhost:{port},1,2")
    assert "of 2 processes the last is number 1" in said("localhost:1,2,2")
    assert "no host is named" in said("no-such-host.invalid:1,1,2")
    assert not any(tmp_path.iterdir())


def test_data_on_other_devices_are_refused():
    task = make_task(load("digits"), "logistic")
    divided = epoch.on_devices(task, jax.devices())
    assert epoch.to_device(divided.train, epoch.batch_mesh(jax.devices())) is divided.train
    one = epoch.on_devices(task)
    member = processes.mesh_of("member", jax.devices())
    for call in (
        lambda: epoch.to_device(divided.train, epoch.batch_mesh(None)),
        lambda: epoch.to_device(one.train, epoch.batch_mesh(jax.devices())),
        lambda: epoch.to_every_device(divided.train, member),
        lambda: epoch.to_every_device(one.train, member),
    ):
        with pytest.raises(ValueError, match="give data on the host"):
            call()
