"""Several processes on one machine, which divide the members of a sweep by ``jax.distributed``."""

import csv
import math
import os
import socket
import subprocess
import sys
import tomllib

import pytest

from gradxform.lab.config import parse_config
from gradxform.lab.data import load
from gradxform.lab.sweep import sweep
from tests.lab.test_cli import fails

CONFIG = """
name = "processes"

[task]
kind = "classification"
dataset = "digits"
model = "logistic"
validation_split = 0.2

[training]
epochs = 2

[optimizers.sgd]
method = "sgd"
learning_rate = 0.1

[sweep]
seeds = 2
vary = "order"
rungs = [1]
axes = {learning_rate = {log = [0.001, 1.0], points = 3}}
"""
COMMAND = (sys.executable, "-c", "from gradxform.lab.cli import main; main()", "sweep")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_processes_divide_the_members_of_a_sweep(tmp_path):
    file, out, port = tmp_path / "config.toml", tmp_path / "out", free_port()
    file.write_text(CONFIG, encoding="utf-8")
    flags = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [*COMMAND, file, "--out", out, "--distributed", f"localhost:{port},{number},2"],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [f"Results are in {out}" in told for _, told in outputs] == [True, False]

    with (out / "members.csv").open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    expected = sweep(parse_config(tomllib.loads(CONFIG)), load("digits")).rows
    for row, alone in zip(rows, expected, strict=True):
        assert row.keys() - {"member"} == alone.keys()
        for name, value in alone.items():
            if isinstance(value, float) and name != "seconds":
                assert math.isclose(float(row[name]), value, rel_tol=1e-5), name
    assert [row["dropped"] for row in expected] == [True] * 2 + [False] * 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--distributed", "localhost:1"], "should be auto, or HOST:PORT,PROCESS,PROCESSES"),
        (["--distributed", "localhost:1,a,2"], "should be auto, or HOST:PORT,PROCESS,PROCESSES"),
        (
            ["--distributed", "localhost:1,0,2", "--set", "checkpoint.every=1"],
            "--distributed localhost:1,0,2: checkpoints are of one process",
        ),
    ],
)
def test_mistakes_are_told(given, told, tmp_path):
    assert told in fails("sweep", "learning_rate", "--out", tmp_path / "x", *given)
    assert not any(tmp_path.iterdir())
