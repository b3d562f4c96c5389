"""Packages whose public names are imported at their first use."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(
    package: str, namespace: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that lists its names in ``__init__.pyi``.

    So the command line prints its help without importing JAX, and type checkers read the same list.

    Args:
      package: the name of the package.
      namespace: its ``globals()``, which keep what is imported.
    """

    @functools.cache
    def modules() -> dict[str, str]:
        """The module of every public name."""
        import ast
        import pkgutil

        stub = pkgutil.get_data(package, "__init__.pyi")
        imports = [node for node in ast.parse(stub or b"").body if isinstance(node, ast.ImportFrom)]
        return {name.name: str(node.module) for node in imports for name in node.names}

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(modules())
        if name.startswith("__") or name not in modules():
            # Python suggests the nearest name of ``obj``
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=sys.modules[package])
        value = namespace[name] = getattr(importlib.import_module(modules()[name]), name)
        return value

    return get, lambda: sorted({*namespace, *modules()})
