"""Sphinx configuration; build with `python -m sphinx -W -b html docs docs/_build`."""

project = "mobilenets_zoo"
author = copyright = "The mobilenets_zoo authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and units

html_theme = "furo"
html_title = "mobilenets_zoo"
html_use_index = html_domain_indices = False  # the API page and the search say the same
