"""Every optimisation method of a deep-learning lecture, as an Optax gradient transformation.

>>> import jax.numpy as jnp, gradxform as gx
>>> solution = gx.minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), gx.momentum(0.1))
>>> solution.params.round(3)
Array([1., 1., 1.], dtype=float32)
"""

import functools
import importlib
import sys
from typing import Any

__version__ = "0.2.0"


@functools.cache
def _modules() -> dict[str, str]:
    """The module of every public name, from ``__init__.pyi``, where type checkers read them."""
    import ast
    import pkgutil

    stub = pkgutil.get_data(__name__, "__init__.pyi")
    imports = [node for node in ast.parse(stub or b"").body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in imports for name in node.names}


# Imported at first use, so that the command line can print its help without waiting for JAX.
def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_modules())
    if name.startswith("__") or name not in _modules():
        package = sys.modules[__name__]  # with which Python suggests the nearest name
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=package)
    value = globals()[name] = getattr(importlib.import_module(_modules()[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
