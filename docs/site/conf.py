"""Sphinx: the site's first page is README.md, its chapters are docs/*.md, as they are read on GitHub.

The repository's root is the source folder, so a relative link leads to the same file here and there, and one that leads
to no page, heading or file is an error (make docs).
"""

import importlib.metadata

from sphinx.util import logging

import dsvl2_jax

project = "DeepSeek-VL2 in JAX"
copyright = "The dsvl2-jax developers"
version = release = importlib.metadata.version("dsvl2-jax")

# In the order of the table of contents; a chapter that is missing is an error too.
CONTENTS = {
    "Use": [
        *(
            "docs/install",
            "docs/python",
            "docs/serving",
            "docs/train",
            "docs/finetune",
            "docs/quantization",
            "docs/data",
            "docs/evaluation",
            "docs/pods",
        ),
        "docs/plan",
        "docs/contexts",
    ],
    "Reference": ["docs/site/api", "docs/architecture", "docs/parity", "docs/benchmarks", "configs/micro/README"],
    "Project": ["docs/development", "CONTRIBUTING", "CHANGELOG", "SECURITY"],
}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/site/*.rst", "configs/micro/README.md"]
exclude_patterns = [".venv*", "out", "runs", "shared"]

myst_heading_anchors = 4  # the anchors that GitHub makes of headings

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "literal"  # in docstrings single backquotes mean code
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes that a docstring lists are fields of the dataclass, which autodoc finds too

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sourcelink = False


def _add_contents(app, docname, source):
    """README.md itself has no table of contents, since GitHub would show the directive as text."""
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}\n", *pages, "```\n"])


def _check_api(app, env):
    documented = env.get_domain("py").objects
    missing = [name for name in dsvl2_jax.__all__ if f"dsvl2_jax.{name}" not in documented]
    if missing:
        logging.getLogger(__name__).warning("docs/site/api.rst lacks %s of dsvl2_jax", ", ".join(missing))


def setup(app):
    app.connect("source-read", _add_contents)
    app.connect("env-check-consistency", _check_api)
