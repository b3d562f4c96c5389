"""Names of other projects, where no inventory knows them, become plain text without a warning.

Names of our own are not excused: a misspelt ``gradxform.…`` fails the build.
"""

import builtins
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PROJECTS = {"chex", "flax", "jax", "numpy", "np", "optax", "orbax"}
OUTSIDE = PROJECTS | set(sys.stdlib_module_names) | set(dir(builtins))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", _as_text, priority=900)  # after intersphinx has looked
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _as_text(app: Sphinx, env: Any, node: Any, text: nodes.Node) -> nodes.Node | None:
    first = node.get("reftarget", "").partition(".")[0]
    return text if node.get("refdomain") == "py" and first in OUTSIDE else None
