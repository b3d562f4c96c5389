"""Runs the notebooks of this folder, each in its own kernel. The first error ends the run.

    python notebooks/execute.py [--write] [NAME ...]

A notebook fails if a cell raises an exception or writes to stderr, for example a warning.
``--write`` stores the outputs in the notebook, without metadata that differs between runs.
"""

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
CELL_TIMEOUT = 600  # seconds
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path) -> NotebookNode:
    """Runs a notebook and returns it with its outputs.

    Raises:
      CellExecutionError: a cell raises.
      RuntimeError: a cell writes to stderr.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict(METADATA)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # hides the warning that ports are not encrypted
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds the version of Python
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"cell {cell.id} writes to stderr:\n{output.text}")
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = reduced(png)
    return notebook


def reduced(png: str) -> str:
    """The same figure with at most 256 colours, which takes less than half the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def find(name: str) -> Path:
    """The path of a notebook, given its name with or without the ending."""
    return FOLDER / Path(name).with_suffix(".ipynb").name


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks of this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a notebook; all if not given")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    options = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    paths = [find(name) for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in FOLDER.glob("*.ipynb")))
            sys.exit(f"no notebook is named {path.name}; choose from: {known}")
    for path in paths:
        started = time.perf_counter()
        try:
            notebook = run(path)
        except (CellExecutionError, RuntimeError) as error:
            sys.exit(f"{path.name}: {error}")
        if options.write:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
