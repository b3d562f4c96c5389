"""The notebooks as pages of the gallery, each with a picture for its card.

They are copied into ``docs/gallery/notebooks`` before the pages are read; git ignores the copies.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from files import write
from sphinx.application import Sphinx

FIGURES = {"01": "paths", "02": "second_order", "03": "sensitivity"}


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _copy(app: Sphinx) -> None:
    source, target = Path(app.srcdir).parent / "notebooks", Path(app.srcdir, "gallery", "notebooks")
    for file in sorted(source.glob("*.ipynb")):
        notebook = json.loads(file.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _with_links("".join(cell["source"]))
        write(target / file.name, json.dumps(notebook, indent=1, ensure_ascii=False))
        write(target / f"{file.stem}.png", _picture(source, file.stem, notebook))


def _with_links(text: str) -> str:
    """Links of a page: benchmarks have one page, and docs/ is two levels up."""
    text = re.sub(r"\(\.\./benchmarks/results/\w+\.md\)", "(../../benchmarks.md)", text)
    return text.replace("(../docs/", "(../../")


def _picture(source: Path, name: str, notebook: dict[str, Any]) -> bytes:
    """A figure of the README where there is one for the notebook, else the notebook's first."""
    if figure := FIGURES.get(name[:2]):
        return (source / "figures" / f"{figure}.png").read_bytes()
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
    return next(
        base64.b64decode("".join(output["data"]["image/png"]))
        for output in outputs
        if "image/png" in output.get("data", {})
    )
