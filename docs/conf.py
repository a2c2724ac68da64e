"""How Sphinx builds the documentation: `make docs`."""

import os
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

# JAX reads the platform when it is imported.
import vlae_jax

project = "vlae_jax"
author = copyright = "The vlae_jax authors"
version = release = vlae_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "extensions.equations",
    "extensions.links",
    "extensions.signatures",
]
exclude_patterns = ["_build"]
# Dashes, but no curly quotes: what stands between quotes is often a value to type.
smartquotes_action = "D"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4

# Docstrings write code between single backticks; what has an entry here becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Gradients", "returns_style"), ("References", "returns_style")]
maximum_signature_line_length = 88
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "vlae_jax"
html_math_renderer = "svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def _mark_tables_of_figures(app: Sphinx, document: nodes.document) -> None:
    for group in document.findall(nodes.tgroup):
        if group["cols"] > 5:
            group.parent["classes"].append("figures")


def setup(app: Sphinx) -> None:
    """Mark wide tables, which site.css sets smaller and without breaks inside of a figure."""
    app.connect("doctree-read", _mark_tables_of_figures)
