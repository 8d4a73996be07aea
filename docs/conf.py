"""Settings of the site that `make docs` builds with Sphinx from the pages of this folder."""

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
