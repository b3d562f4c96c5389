"""What the shell completes, and what is listed of the shipped configs."""

import os
import subprocess
import sys

from gradxform.lab.commands import completing
from gradxform.lab.experiment.load import shipped_configs
from tests.lab.commands.test_cli import invoke

MAIN = "import sys; sys.argv[0] = 'gradxform'; from gradxform.__main__ import main; main()"


def completed(words, **environment):
    asked = {"_GRADXFORM_COMPLETE": "complete_bash", "COMP_WORDS": words}
    asked["COMP_CWORD"] = str(len(words.split()) - 1)
    command = [sys.executable, "-c", MAIN]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    return done.stdout.split()


def test_the_shell_completes_the_names_of_configs():
    assert completed("gradxform run digits_") == ["digits_race", "digits_second_order"]


def test_files_are_completed_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_mine.toml").touch()
    (tmp_path / "digits_folder").mkdir()
    shipped = ["digits_race", "digits_second_order"]
    assert completing.configs("digits_") == [*shipped, "digits_folder/", "digits_mine.toml"]


def test_keys_and_methods_are_completed():
    assert completing.settings("checkpoint.") == ["checkpoint.every=", "checkpoint.keep="]
    names = completing.settings("optimizers.a.method=optax.ada")
    assert "optimizers.a.method=optax.adam" in names
    assert completing.settings("optimizers.a.learning_rate=0") == []


def test_python_finds_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "gradxform", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("gradxform ")


def test_every_shipped_config_has_its_time():
    shown = invoke("list", "configs").stdout
    assert "two CPU cores" in " ".join(shown.split())
    from gradxform.lab.commands.listing import TIMES

    assert set(TIMES) == set(shipped_configs())
