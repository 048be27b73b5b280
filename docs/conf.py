"""Sphinx configuration. Builds without a network: no intersphinx, no fonts or scripts from elsewhere."""

import paged

project = "paged"
author = "The paged developers"
project_copyright = "The paged developers. Apache-2.0"
release = paged.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# Notebooks are run by their own make target, not by the documentation.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
