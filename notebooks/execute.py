"""Runs the notebooks of this folder, each in a kernel of its own; the first error ends the run.

    python notebooks/execute.py [--write] [NAME ...]

A notebook fails by an exception or by a word on stderr, such as a warning. ``--write`` stores the
outputs in the notebook, without what differs from one run to the next.
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
    """The notebook with the outputs of this run.

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
        extra_arguments=["--log-level=ERROR"],  # a kernel warns that its ports are not encrypted
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel notes its Python's version
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"cell {cell.id} writes to stderr:\n{output.text}")
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = reduced(png)
    return notebook


def reduced(png: str) -> str:
    """A figure in base64 with at most 256 colours, in well under half the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def find(name: str) -> Path:
    """The notebook of a file name, with or without its ending."""
    return FOLDER / Path(name).with_suffix(".ipynb").name


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks of this folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them if none is named")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    options = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    paths = [find(name) for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in FOLDER.glob("*.ipynb")))
            sys.exit(f"there is no notebook {path.name}; there are: {known}")
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
