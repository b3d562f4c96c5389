"""The documentation site: ``make docs`` builds it into ``docs/_build/html``."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]

import inventories  # noqa: E402

import gradxform  # noqa: E402

project = "gradxform"
author = "The gradxform authors"
version = release = gradxform.__version__
copyright = author

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "benchmark_pages",  # the ones from here on are in docs/_extensions
    "notebook_pages",
    "reference_pages",
    "lab_pages",
    "outside_names",
]
exclude_patterns = ["_build", "_extensions"]
nitpicky = True

# Names of other projects link to their sites where the build can reach them.
intersphinx_mapping = inventories.reachable(
    {
        "python": "https://docs.python.org/3",
        "numpy": "https://numpy.org/doc/stable",
        "jax": "https://docs.jax.dev/en/latest",
        "optax": "https://optax.readthedocs.io/en/latest",
        "flax": "https://flax.readthedocs.io/en/latest",
    },
    HERE / "_build" / "inventories",
)

myst_enable_extensions = [
    "amsmath",
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold their outputs: `make notebooks` runs them

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "gradxform"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
}
