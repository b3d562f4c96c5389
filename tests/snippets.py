"""What Pyright says about lines of code that a user would write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def errors_of(lines: list[str], folder: Path, root: Path) -> dict[str, str]:
    """The rule that each wrong line breaks; the package is found in ``root``."""
    (folder / "snippet.py").write_text("\n".join(lines))
    options = {"extraPaths": [str(root)], "reportUnusedExpression": "none"}
    (folder / "pyrightconfig.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(folder)], capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not run here: {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {lines[d["range"]["start"]["line"]]: d["rule"] for d in found}
