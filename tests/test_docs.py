"""The programs of the pages in docs/ run and print what they say, and links lead somewhere."""

import builtins
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

import gradxform as gx

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)


def program_of(page: Path) -> str:
    """All Python blocks of a page, each in the lines where the page has it."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").split("\n"):
        fence = line.startswith("```")
        inside = line == "```python" or (inside and not fence)
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


PROGRAMS = {
    page.relative_to(ROOT / "docs").as_posix(): program
    for page in PAGES
    if (program := program_of(page)).strip()
}


def test_most_pages_have_a_program() -> None:
    assert len(PROGRAMS) > 15


@pytest.mark.skipif("GRADXFORM_STRICT" in os.environ, reason="readers need not be strict")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_and_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: dict[int, str] = {}

    def record(*values: Any, **options: Any) -> None:
        printed[sys._getframe(1).f_lineno] = " ".join(map(str, values))
        builtins.print(*values, **options)

    page = types.ModuleType("page")
    page.print = record
    monkeypatch.setitem(sys.modules, "page", page)
    monkeypatch.chdir(tmp_path)
    program, x64 = PROGRAMS[name], jax.config.jax_enable_x64
    try:
        exec(compile(program, name, "exec"), page.__dict__)
    finally:
        jax.config.update("jax_enable_x64", x64)
    for number, line in enumerate(program.split("\n"), start=1):
        if expected := re.fullmatch(r" *print\(.*\)  # prints (.+)", line):
            assert printed[number] == expected[1], f"{name}:{number}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"\bgx\.(\w+)|`gradxform\.(\w+)`", text):
        assert hasattr(gx, name[0] or name[1]), name
