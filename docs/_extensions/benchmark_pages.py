"""A page for each file of ``benchmarks/results``, and a table of all files.

A page has the table itself, by inclusion, and what the benchmark's docstring says about it. A new
file of results gets a page without a change here.
"""

import ast
import itertools
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from files import remove_others, write
from sphinx.application import Sphinx


class Result(NamedTuple):
    """A file of results."""

    name: str
    title: str
    made_on: str  #: its first paragraph, which names the machine and the versions
    script: str  #: the module of ``benchmarks`` that writes it, "" if none is found
    day: str  #: of the last change, "" where Git does not tell


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write_pages(app: Sphinx) -> None:
    folder, measured = Path(app.srcdir).parent / "benchmarks", Path(app.srcdir, "measured")
    results = [_read(file, folder) for file in sorted((folder / "results").glob("*.md"))]
    for result in results:
        write(measured / f"{result.name}.md", _page(result, folder))
    lines = ["| results | command | on | last changed |", "|---|---|---|---|"]
    lines += [
        f"| [{r.title}](measured/{r.name}.md) | `{_command(r)}` | {r.made_on} | {r.day} |"
        for r in results
    ]
    write(measured / "overview.txt", "\n".join(lines) + "\n")
    remove_others(measured, {f"{result.name}.md" for result in results}, "*.md")


def _read(file: Path, folder: Path) -> Result:
    first, *paragraphs = file.read_text().split("\n\n")
    title = first.lstrip("# ").strip()
    return Result(file.stem, title, _made_on(paragraphs), _script(file, folder), _day(file))


def _made_on(paragraphs: list[str]) -> str:
    """The sentences before the first table, without those that explain or name a command."""
    prose = itertools.takewhile(lambda text: not text.startswith(("|", "#")), paragraphs)
    sentences = re.split(r"(?<=\.) +", " ".join(" ".join(prose).replace("**", "").split()))
    kept = [text for text in sentences if not re.search(r"python -m|columns mean|its head", text)]
    return " ".join(kept)


def _script(file: Path, folder: Path) -> str:
    scripts = {script.stem: script for script in folder.glob("*.py")}
    alike = [name for name in scripts if file.stem.startswith(name)]
    named = [name for name, script in scripts.items() if file.name in script.read_text()]
    return max(alike, key=len, default=next(iter(named), ""))


def _day(file: Path) -> str:
    command = ["git", "log", "-1", "--date=short", "--format=%ad", "--", file.name]
    try:
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _command(result: Result) -> str:
    if not result.script:
        return "make bench"
    precision = re.search(r"float\d+$", result.name)
    option = f" --precision {precision[0]}" if precision else ""
    return f"python -m benchmarks.{result.script}{option}"


def _page(result: Result, folder: Path) -> str:
    parts = [f"# {result.title}", f"`{_command(result)}` makes this table again."]
    if result.day:
        parts.append(f"`benchmarks/results/{result.name}.md` last changed on {result.day}.")
    if (folder / "results" / f"{result.name}.png").exists():
        picture = f"../../benchmarks/results/{result.name}.png"
        parts.append(f"```{{image}} {picture}\n:alt: {result.title}\n:width: 90%\n```")
    table = f"../../benchmarks/results/{result.name}.md"
    options = ":start-line: 1\n:heading-offset: 1"
    parts += ["## The table", f"```{{include}} {table}\n{options}\n```"]
    if result.script:
        text = ast.get_docstring(ast.parse((folder / f"{result.script}.py").read_text())) or ""
        parts += ["## What was measured", text]
    return "\n\n".join(parts) + "\n"
