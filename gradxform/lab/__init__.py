"""The lab around the methods: races, sweeps and movies of optimisers, from Python.

The functions do what the commands of ``gradxform`` do, and return the results. The decorators
register your own data sets, models, tasks, surfaces, curves, methods and loggers. Names are
imported at their first use, so importing the lab is quick and does not import JAX.

>>> import gradxform.lab as lab
>>> result = lab.race({
...     "name": "walk", "task": {"kind": "surface", "surface": "saddle", "start": [1.0, 0.5]},
...     "training": {"steps": 2}, "optimizers": {"SGD": {"method": "sgd", "learning_rate": 0.25}},
... })
>>> round(result.rows[-1]["value"], 2)
-0.67
"""

import functools
import importlib
import sys
from typing import Any


@functools.cache
def _modules() -> dict[str, str]:
    """The module of every public name, from ``__init__.pyi``, which type checkers read too."""
    import ast
    import pkgutil

    stub = pkgutil.get_data(__name__, "__init__.pyi")
    imports = [node for node in ast.parse(stub or b"").body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in imports for name in node.names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_modules())
    if name.startswith("__") or name not in _modules():
        package = sys.modules[__name__]  # so that Python can suggest the nearest name
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=package)
    value = globals()[name] = getattr(importlib.import_module(_modules()[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
