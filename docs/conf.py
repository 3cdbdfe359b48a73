"""Sphinx: ``sphinx-build -W -b html docs docs/_build``."""

import importlib
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent / "src")]

project = "adaptax"
release = version = importlib.import_module("adaptax").__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "config_tables", "model_tables", "resume_tables"]
exclude_patterns = ["_build", "advanced/benchmarks", "config/memory_*.rst"]  # the latter are included
html_theme = "furo"
html_title = f"adaptax {release}"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
