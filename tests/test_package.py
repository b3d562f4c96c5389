"""What importing costs and touches."""

import ast
import subprocess
import sys
from pathlib import Path

import gradxform as gx

PACKAGE = Path(gx.__file__).parent


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_initialises_no_backend_and_changes_no_configuration() -> None:
    print_state = "print(dict(jax.config.values), xla_bridge.backends_are_initialized())"
    before = python(f"import jax; from jax._src import xla_bridge; {print_state}")
    after = python(
        "import jax; from jax._src import xla_bridge; import gradxform as gx;"
        f"[getattr(gx, name) for name in gx.__all__]; {print_state}"
    )
    assert after == before
    assert after.endswith("False")


def test_the_core_imports_neither_the_lab_nor_its_libraries() -> None:
    modules = python(
        "import sys, gradxform as gx; [getattr(gx, name) for name in gx.__all__];"
        "print(*(m for m in ('flax', 'matplotlib', 'pydantic', 'sklearn', 'gradxform.lab')"
        " if m in sys.modules))"
    )
    assert modules == ""
    for file in PACKAGE.rglob("*.py"):
        if "lab" in file.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.startswith("gradxform.lab") for name in names), file


def test_public_names_are_documented_with_an_example() -> None:
    for name in gx.__all__:
        value = getattr(gx, name)
        assert value.__doc__, name
        if callable(value) and not isinstance(value, type):
            assert ">>>" in value.__doc__, name


def test_names_do_not_depend_on_what_was_imported_first() -> None:
    """A submodule that is imported by its path must not shadow a function of the package."""
    modules = [
        ".".join(("gradxform", *file.relative_to(PACKAGE).with_suffix("").parts))
        for file in PACKAGE.rglob("*.py")
        if file.stem != "__init__" and "lab" not in file.relative_to(PACKAGE).parts
    ]
    code = f"import importlib; [importlib.import_module(m) for m in {modules}];"
    assert (
        python(
            code
            + "import gradxform as gx; print(all(callable(getattr(gx, n)) for n in gx.__all__))"
        )
        == "True"
    )
    assert set(gx.__all__) <= set(dir(gx))
