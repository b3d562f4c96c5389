"""What importing costs and touches."""

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_a_misspelt_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(AttributeError, match="'gradxform' has no attribute 'adamm'") as caught:
        gx.adamm  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert (caught.value.name, caught.value.obj) == ("adamm", gx)


def test_type_checkers_know_the_public_names_and_their_arguments(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    lines = [
        "import gradxform as gx",
        *(f"gx.{name}" for name in gx.__all__),
        "gx.adam(learning_rate=0.1, b1=0.9)",
        "gx.adamm(0.1)",
        "gx.adam(learning_rat=0.1)",
        "gx.sgd('fast')",
    ]
    snippet.write_text("\n".join(lines))
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(PACKAGE.parent)], "reportUnusedExpression": "none"})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(tmp_path)], capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not run here: {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = {lines[d["range"]["start"]["line"]]: d["rule"] for d in found}
    assert errors == {
        "gx.adamm(0.1)": "reportAttributeAccessIssue",
        "gx.adam(learning_rat=0.1)": "reportCallIssue",
        "gx.sgd('fast')": "reportArgumentType",
    }


def test_the_names_are_found_in_a_zipped_package_and_by_a_star(tmp_path: Path) -> None:
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in (PACKAGE / "__init__.py", PACKAGE / "__init__.pyi"):
            packed.write(file, f"gradxform/{file.name}")
    zipped = f"import sys; sys.path.insert(0, {str(archive)!r}); import gradxform as gx;"
    assert python(f"{zipped} print(gx.__file__, len(gx.__all__))").endswith(
        f"packed.zip/gradxform/__init__.py {len(gx.__all__)}"
    )
    # and no name waits for JAX before it is used
    assert python("import sys, gradxform as gx; dir(gx); print('jax' in sys.modules)") == "False"
    names = python(
        "before = set(globals()); from gradxform import *; print(*sorted(set(globals()) - before))"
    )
    assert set(gx.__all__) <= set(names.split())
