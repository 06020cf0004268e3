"""Sphinx's configuration: `make docs` builds the site into docs/_build/html."""

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import generated  # noqa: E402

project = "jax_it"
author = "the authors of jax_it"
version = release = installed("jax-it")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
nitpicky = True  # a reference that leads nowhere is an error
nitpick_ignore_regex = [("py:class", ".*")]  # but for types in signatures, which have no pages
default_role = "code"  # docstrings write `names` so
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "jax_it"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}


class LinkSettings(SphinxPostTransform):
    """Links `train.batch_size`, in code font, to its entry in the reference; an unknown setting is an error."""

    default_priority = 5

    def run(self, **options: Any) -> None:
        confvals = self.env.domains["std"].objects
        for literal in list(self.document.findall(nodes.literal)):
            name = generated.canonical(literal.astext())
            if isinstance(literal.parent, nodes.reference) or not generated.looks_like_a_setting(name):
                continue
            if ("confval", name) not in confvals:
                if self.env.docname == "reference/settings":
                    continue  # a comment that names a setting of its own section, such as a task's data.path
                logging.getLogger(__name__).warning("%r is not a setting", literal.astext(), location=literal)
                continue
            document, anchor = confvals["confval", name]
            literal.replace_self(
                make_refnode(self.app.builder, self.env.docname, document, anchor, literal.deepcopy(), name)
            )


def add_generated(app: Sphinx, document: str, source: list[str]) -> None:
    """Puts what is generated from the code in the place of its mark."""
    for mark, make in generated.PARTS.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_generated)
    app.add_post_transform(LinkSettings)
