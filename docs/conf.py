"""Settings of the documentation site: Sphinx with MyST Markdown and the furo theme.

The source folder is the repository, so that a relative link works in the site as it does in a checkout.
`make docs` builds into build/docs; warnings are errors. Nothing is loaded from another server.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cxrloop import __version__

project = "cxrloop"
release = version = __version__
author = "the cxrloop contributors"
copyright = author
language = "en"

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "bench/results/real_input.md"]
exclude_patterns = [
    ".venv",
    "build",
    "dist",
    "demo",
    "site",
    "mysite",
    "tests",
    "**/__pycache__",
    "**/.*",
]  # not walked
highlight_language = "text"  # a code block without a language is output
smartquotes = False  # quotes in settings stay as they must be typed
myst_heading_anchors = 4  # links such as operating.md#retention

templates_path = ["_templates"]
html_additional_pages = {"index": "forward.html"}  # build/docs/index.html leads to the start page
html_theme = "furo"
html_title = f"cxrloop {release}"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"footer_icons": []}
