"""Plotly figures of results, all drawn in one style (`lmc.views.plots.style`)."""

from lmc.core.extras import require

require("plotly")

from lmc.views.plots import (  # noqa: E402, F401 (they register themselves)
    merging,
    path,
    plane,
    runs,
    studies,
    symmetry,
    triangle,
)
