"""Explorers of result objects: live in Jupyter (anywidget), and the same drawing code in pages that need no kernel."""
