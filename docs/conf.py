"""Sphinx configuration; build with `python -m sphinx -W -b html docs docs/_build`."""

import sys

import mobilenets_zoo
import mobilenets_zoo.finetuning

# The API page calls everything by the name that users type.
sys.modules |= {
    name.replace("mobilenets_zoo", "mz", 1): module
    for name, module in sys.modules.items()
    if name.partition(".")[0] == mobilenets_zoo.__name__
} | {"mz.onnx": mobilenets_zoo.onnx}

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
