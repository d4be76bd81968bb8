# SPDX-License-Identifier: GPL-2.0
#
# The site, which scripts/docs builds.

project = "vmgenid"
author = "The vmgenid authors"
copyright = author

extensions = ["myst_parser"]
exclude_patterns = ["bench/*.md"]

html_theme = "furo"
html_title = "vmgenid"
html_show_copyright = False
html_copy_source = False
# Sphinx copies these into the site's top folder: rustdoc's pages and the man pages.
html_extra_path = ["../out/docs-extra"]

myst_heading_anchors = 3
# The quick starts are a part of README.md, whose headings are of the third level.
suppress_warnings = ["myst.header"]
nitpicky = True
