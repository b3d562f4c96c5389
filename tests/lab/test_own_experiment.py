"""The guide to an own experiment: its files and commands work in an empty folder."""

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from gradxform.lab.cli import app
from gradxform.lab.experiment import own_files, registry

PAGE = Path(__file__).parents[2] / "docs/guides/own_experiment.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
FILES = {
    found[1]: text
    for kind, text in BLOCKS
    if kind in ("py", "toml") and (found := re.match(r"# ([\w.]+)\n", text))
}


class Client:
    """What the guide's logger uses of MLflow."""

    runs: ClassVar[list[dict]] = []

    def __init__(self, address: str) -> None:
        assert address.startswith("file:")

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str, run_name: str):
        self.runs.append({"name": run_name, "metrics": []})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=len(self.runs) - 1))

    def log_param(self, run: int, key: str, value: object) -> None:
        self.runs[run][key] = value

    def log_metric(self, run: int, name: str, value: float, step: int) -> None:
        self.runs[run]["metrics"].append((name, step))

    def set_terminated(self, run: int) -> None:
        self.runs[run]["ended"] = True


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    random = np.random.default_rng(0)
    size, rooms, age = (
        random.uniform(30, 200, 1000),
        random.integers(1, 7, 1000),
        random.random(1000),
    )
    price = 1000 * size + 5000 * rooms - 3e4 * age + random.normal(0, 5000, 1000)
    table = np.column_stack([size, rooms, age, price])
    np.savetxt("houses.csv", table, "%.2f", ",", header="size,rooms,age,price", comments="")
    time = np.arange(8.0)
    signal = 3 * np.exp(-0.5 * time) + 0.01 * np.cos(9 * time)
    table = np.column_stack([time, signal])
    np.savetxt("decay.csv", table, "%.6f", ",", header="time,signal", comments="")
    yield
    registry.forget()
    own_files.load([])


def gradxform(command: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "gradxform"
    done = CliRunner().invoke(app, [*arguments, "-q"] if arguments[0] != "movie" else arguments)
    assert done.exit_code == 0, f"{command}\n{done.output}"
    return done.output


def folder_of(command: str) -> Path:
    return Path(shlex.split(command)[shlex.split(command).index("--out") + 1])


def test_the_first_example_has_few_lines():
    lines = [FILES["mylab.py"], FILES["houses.toml"], "\n".join(COMMANDS[:3])]
    written = [line for text in lines for line in text.splitlines() if line.strip()]
    assert len(written) - 2 < 30  # without the names of the files


@pytest.mark.parametrize("command", [c for c in COMMANDS if "mlflow" not in c], ids=str)
def test_a_command_of_the_guide_runs(command):
    gradxform(command)
    made = {file.name for file in folder_of(command).iterdir()}
    wanted = {"sweep": "best.toml", "movie": "movie.gif"}
    assert wanted.get(command.split()[1], "summary.json") in made
    if "decay" in command:
        text = (folder_of(command) / "estimates.csv").read_text().splitlines()[1:]
        found = {name: float(x) for name, x, _ in (line.split(",") for line in text)}
        assert found == pytest.approx({"height": 3.0, "rate": 0.5}, rel=0.02)
        assert "fit.png" in made


MLFLOW = next(command for command in COMMANDS if "mlflow" in command)


def test_the_logger_of_the_guide_sends_every_row(monkeypatch):
    module = types.ModuleType("mlflow")
    monkeypatch.setattr(module, "MlflowClient", Client, raising=False)
    monkeypatch.setattr(Client, "runs", [])
    monkeypatch.setitem(sys.modules, "mlflow", module)
    two = 'optimizers={Adam={method="adam", learning_rate=0.01}, B={method="newton_cg"}}'
    gradxform(f"{MLFLOW} --set training.epochs=2 --set '{two}'")
    assert [run["name"] for run in Client.runs] == ["Adam", "B"]
    for run in Client.runs:
        assert len([step for name, step in run["metrics"] if name == "train_loss"]) == 2
        assert run["ended"]
    assert Client.runs[0]["learning_rate"] == 0.01


def test_the_logger_of_the_guide_writes_local_files_of_mlflow():
    pytest.importorskip("mlflow")
    gradxform(f"{MLFLOW} --set training.epochs=1")
    assert list((folder_of(MLFLOW) / "mlflow").rglob("metrics/train_loss"))
