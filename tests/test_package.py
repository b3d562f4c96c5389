"""What importing costs and touches."""

import ast
import inspect
import pydoc
import re
import subprocess
import sys
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path

import optax
import pytest

import gradxform as gx
from gradxform.hyperparameters import LearningRate
from tests.snippets import errors_of

PACKAGE = Path(gx.__file__).parent
ROOT = PACKAGE.parent

#: Longer than the house allows today. An entry goes with the first change that makes it short.
LONG_MODULES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


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


def test_public_names_are_documented_with_an_example() -> None:
    for name in gx.__all__:
        value = getattr(gx, name)
        assert value.__doc__, name
        if callable(value) and not isinstance(value, type):
            assert ">>>" in value.__doc__, name


def test_docstrings_have_plain_formulas_for_a_terminal() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not re.search(r":math:|\.\. math::", read(file)), file
    for name in ("newton", "newton_cg"):
        safe = f"gx.with_line_search(gx.scale_by_{name}())"
        assert safe in getattr(gx, name).__doc__.partition("\n")[0]


def test_help_prints_signatures_with_the_names_of_the_type_aliases() -> None:
    assert str(inspect.signature(gx.adam)) == (
        "(learning_rate: LearningRate = 0.001, b1: Fraction = 0.9, b2: Fraction = 0.999, "
        "eps: NonNegative = 1e-08, eps_root: NonNegative = 0.0) -> GradientTransformationExtraArgs"
    )
    for name in gx.__all__:
        value = getattr(gx, name)
        if inspect.isfunction(value):
            assert not re.search(r"Annotated|Interval|jaxlib|_src", str(inspect.signature(value)))
            first = pydoc.plain(pydoc.render_doc(value)).splitlines()[2]
            assert first.startswith(f"{name}("), first


def test_the_true_types_are_the_annotations() -> None:
    hints = typing.get_type_hints(gx.adam, include_extras=True)
    assert hints["learning_rate"] == LearningRate
    assert hints["return"] is optax.GradientTransformationExtraArgs
    assert inspect.signature(gx.adam).parameters["b1"].annotation.annotation == hints["b1"]


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
    lines = [
        "import gradxform as gx",
        *(f"gx.{name}" for name in gx.__all__),
        "gx.adam(learning_rate=0.1, b1=0.9)",
        "gx.adamm(0.1)",
        "gx.adam(learning_rat=0.1)",
        "gx.sgd('fast')",
    ]
    assert errors_of(lines, tmp_path, PACKAGE.parent) == {
        "gx.adamm(0.1)": "reportAttributeAccessIssue",
        "gx.adam(learning_rat=0.1)": "reportCallIssue",
        "gx.sgd('fast')": "reportArgumentType",
    }


def test_the_names_are_found_in_a_zipped_package_and_by_a_star(tmp_path: Path) -> None:
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("__init__.py", "__init__.pyi", "lazy_names.py"):
            packed.write(PACKAGE / name, f"gradxform/{name}")
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


# -- the house: who imports whom, and how long things are


def imported(source: str) -> set[str]:
    """Every module that a source text imports, at any depth, with the names taken from it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_that_import(folder: Path, module: str) -> list[str]:
    """The files of a folder that import this module or a part of it."""
    return [
        file.relative_to(ROOT).as_posix()
        for file in sorted(folder.rglob("*.py"))
        if any(name == module or name.startswith(f"{module}.") for name in imported(read(file)))
    ]


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def function_lengths(source: str) -> Iterator[tuple[str, int]]:
    """Each function and the lines of its body, docstring and inner functions not counted."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef

    def walk(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            is_named = isinstance(child, kinds | ast.ClassDef)
            inner = (*path, child.name) if is_named else path
            if isinstance(child, kinds):
                yield ".".join(inner), length(child)
            yield from walk(child, inner)

    def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        body = function.body[ast.get_docstring(function, clean=False) is not None :]
        if not body:
            return 0
        return (body[-1].end_lineno or 0) - body[0].lineno + 1 - sum(map(hidden, body))

    def hidden(node: ast.AST) -> int:
        """The lines that inner functions take up within a statement."""
        if isinstance(node, kinds):
            first = min((d.lineno for d in node.decorator_list), default=node.lineno)
            return (node.end_lineno or first) - first + 1
        return sum(map(hidden, ast.iter_child_nodes(node)))

    return walk(ast.parse(source), ())


def test_tests_and_benchmarks_do_not_import_each_other() -> None:
    assert files_that_import(ROOT / "tests", "benchmarks") == []
    assert files_that_import(ROOT / "benchmarks", "tests") == []
    for module in ("tests", "benchmarks"):
        assert files_that_import(ROOT / "testbed", module) == []
        assert files_that_import(PACKAGE, module) == []


def test_the_core_does_not_import_the_lab() -> None:
    files = files_that_import(PACKAGE, "gradxform.lab")
    others = [file for file in files if not file.startswith("gradxform/lab/")]
    assert others == ["gradxform/__main__.py"]  # the command; the package does not import it


def test_no_module_has_over_400_lines() -> None:
    lines = {f.relative_to(ROOT).as_posix(): read(f).count("\n") for f in PACKAGE.rglob("*.py")}
    assert {name for name, count in lines.items() if count > 400} == LONG_MODULES


def test_no_function_has_a_body_of_over_60_lines() -> None:
    long = {
        f"{file.relative_to(ROOT).as_posix()}: {name}"
        for file in PACKAGE.rglob("*.py")
        for name, lines in function_lengths(read(file))
        if lines > 60
    }
    assert long == LONG_FUNCTIONS


def test_the_loops_of_searches_and_regions_fit_on_a_page() -> None:
    updates = {
        "line_search.py": "search.update",
        "second_order/region.py": "region.update",
        "second_order/hessian_free.py": "hessian_free.update",
    }
    lengths = [dict(function_lengths(read(PACKAGE / file)))[name] for file, name in updates.items()]
    assert max(lengths) <= 50


def test_these_checks_see_what_they_look_for() -> None:
    assert {"a.b", "a.b.c", "d"} <= imported("def f():\n    from a.b import c\n    import d")
    source = """
def outer():
    '''A docstring of
    two lines.'''
    a = 1

    @decorated
    def inner(
        x,
    ):
        b = 2
        return b

    return (
        a
    )

class C:
    def method(self):
        if self:
            def deep():
                return 1
            return 2
"""
    assert dict(function_lengths(source)) == {
        "outer": 6,
        "outer.inner": 2,
        "C.method": 2,
        "C.method.deep": 1,
    }
