"""Settings of the site that `make docs` builds with Sphinx from the pages of this folder."""

import re

project = "Stepwise DPO"
author = "The stepwise DPO contributors"
copyright = f"2026, {author}"

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "results"]

html_theme = "furo"
html_title = project


def link_root_pages(app, page, source):
    """Links to pages of the repository's root, which the site lacks, become downloads."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./\w+\.md)\)", r"{download}`\1 <\2>`", source[0])


def setup(app):
    app.connect("source-read", link_root_pages)
