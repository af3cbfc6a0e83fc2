"""Explorers of results: live in Jupyter (anywidget), and the same drawing code in pages that need no kernel."""

from lmc.core.extras import require

require("anywidget")

from lmc.views.widgets import epochs, matching, mixer, path, plane, simplex  # noqa: E402, F401 (they register themselves)
