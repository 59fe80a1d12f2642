"""Sphinx: the pages of this folder as a site, with the reference of the Python package. ``make docs`` builds it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pyheadkv import __version__  # noqa: E402

project, author, copyright = "pyheadkv", "the authors of pyheadkv", "the authors of pyheadkv, MIT"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "pyheadkv"
html_show_sphinx = False
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # what pages link to

# the notebook is run when the site is built, with the model that PYHEADKV_MODEL names, else SmolLM2
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # what a parameter is stands in its text
autodoc_preserve_defaults = True
napoleon_use_rtype = False


def read_page(app: Any, name: str, source: list[str]) -> None:
    """The README is the front page; a link that leaves this folder becomes a download."""
    text = source[0]
    if name == "index":
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!docs/|\w+://)", "](../", readme).replace("](docs/", "](") + text
    source[0] = re.sub(r"\]\((?=\.\./)", "](path:", text)


def split_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What stands behind ``name : `` is text, not a type."""
    found = [re.fullmatch(r"([\w*]+(?:, [\w*]+)*) : (.*)", line) for line in lines]
    lines[:] = [part for line, at in zip(lines, found) for part in ((at[1], f"    {at[2]}") if at else (line,))]


def setup(app: Any) -> None:
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", split_text, priority=1)  # before napoleon
