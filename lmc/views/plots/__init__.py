"""Plotly figures of results, all drawn in one style (`lmc.views.plots.style`)."""

from lmc.core.extras import require

require("plotly")

from lmc.views.plots import (  # noqa: E402, F401 (they register themselves)
    alignment,
    epochs,
    matching,
    merging,
    path,
    plane,
    singular,
    soups,
    star,
    symmetry,
    triangle,
    variance,
)
