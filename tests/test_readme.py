"""The README runs, it is short, and every public name has its place in the table of methods."""

import re
import subprocess
import sys
from pathlib import Path

import gradxform as gx

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_its_code_runs(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(snippets), encoding="utf-8")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loss, converged = map(float, result.stdout.split())
    assert loss < 0.2
    assert converged > 0.99


def test_it_is_one_screen_of_each_thing() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 140


def test_the_table_of_methods_has_every_public_name_and_no_other() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bgx\.(\w+)", text))
    assert named == set(gx.__all__)
