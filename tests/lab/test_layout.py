"""The rooms of the lab: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import gradxform.lab
from gradxform.lab.experiment.kinds import KINDS, at

LAB = Path(gradxform.lab.__file__).parent

#: Each package may import itself and those before it.
ORDER = ("experiment", "data", "tasks", "training", "report", "commands")


def imports(source: str) -> Iterator[str]:
    """The modules that a source text imports, at any depth, and names taken from the lab."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The package of the lab that a module belongs to."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["gradxform", "lab"] and len(parts) > 2 else None


def too_high(source: str, own: str) -> set[str]:
    """The modules of the lab that a module of the package ``own`` may not import."""
    allowed = ORDER[: ORDER.index(own) + 1]
    return {name for name in imports(source) if (found := room(name)) and found not in allowed}


def test_each_package_imports_only_those_above_it():
    assert {folder.parent.name for folder in LAB.glob("*/__init__.py")} == set(ORDER)
    for own in ORDER:
        for file in (LAB / own).glob("*.py"):
            assert too_high(file.read_text(encoding="utf-8"), own) == set(), file


def test_this_check_sees_an_import_that_goes_up():
    source = "def f():\n    from gradxform.lab import report\n    import gradxform.lab.data.sets"
    assert too_high(source, "training") == {"gradxform.lab.report"}
    assert too_high(source, "experiment") == {"gradxform.lab.report", "gradxform.lab.data.sets"}
    assert too_high(source, "report") == set()


def test_the_kind_of_a_task_is_asked_in_one_table():
    """No module compares a config with the class of a kind of task."""
    schemas = {kind.schema.__name__ for kind in KINDS.values()}
    for file in LAB.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "isinstance",
                "issubclass",
            ):
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not named & schemas, (file, ast.unparse(node))


def test_every_place_of_the_table_is_there():
    for name, kind in KINDS.items():
        places = (kind.data, kind.task, kind.race, kind.sweep, kind.figures, kind.extra, kind.read)
        for place in places:
            assert place is None or callable(at(place)), name
        assert callable(at(kind.sweep_figures)), name
