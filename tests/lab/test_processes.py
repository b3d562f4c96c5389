"""Several processes on one machine, which find each other by ``jax.distributed``."""

import json
import math
import os
import socket
import subprocess
import sys

from gradxform.lab.config import parse_config
from gradxform.lab.data import load
from gradxform.lab.sweep import sweep

CONFIG = {
    "name": "processes",
    "task": {
        "kind": "classification",
        "dataset": "digits",
        "model": "logistic",
        "validation_split": 0.2,
    },
    "training": {"epochs": 2},
    "optimizers": {"sgd": {"method": "sgd", "learning_rate": 0.1}},
    "sweep": {
        "axes": {"learning_rate": {"log": [0.001, 1.0], "points": 3}},
        "seeds": 2,
        "vary": "order",
        "rungs": [1],
    },
}

PROGRAM = f"""
import json, sys
import jax

number, count, port = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{{port}}", count, number)

from gradxform.lab.config import parse_config
from gradxform.lab.data import load
from gradxform.lab.sweep import sweep

assert jax.process_count() == count and jax.device_count() == 2 * count
result = sweep(parse_config({CONFIG!r}), load("digits"))
print("rows", json.dumps(result.rows))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_in_processes(program, count):
    """What each process prints after the word rows."""
    port = free_port()
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), str(count), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        (line,) = (line for line in out.splitlines() if line.startswith("rows "))
        found.append(json.loads(line.removeprefix("rows ")))
    return found


def test_sweep_divides_its_members_among_processes():
    expected = sweep(parse_config(CONFIG), load("digits")).rows
    for rows in run_in_processes(PROGRAM, 2):
        for row, alone in zip(rows, expected, strict=True):
            assert row.keys() == alone.keys()
            for name in row.keys() - {"seconds"}:
                same = row[name] == alone[name]
                assert same or math.isclose(row[name], alone[name], rel_tol=1e-5), name
    assert [row["dropped"] for row in expected] == [True] * 2 + [False] * 4
