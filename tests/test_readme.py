"""The README's code runs, and its table is the one that the tests measure."""

import re
import subprocess
import sys
from pathlib import Path

import gradxform as gx

README = Path(__file__).parents[1] / "README.md"


def test_its_code_runs(tmp_path: Path) -> None:
    loop, *snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = "fn = lambda x: jnp.sum((x - 1) ** 2)\nstart = jnp.zeros(3)\n"
    script = tmp_path / "readme.py"
    script.write_text("\n".join([loop, names, *snippets]))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.2


def test_it_names_every_method_and_links_to_what_exists() -> None:
    text = README.read_text()
    for name in gx.__all__:
        assert re.search(rf"\b{name}\b", text) or name in ("Solution", "Status"), name
    for name in re.findall(r"\bgx\.(\w+)", text):
        assert hasattr(gx, name), name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (README.parent / link).exists(), link
