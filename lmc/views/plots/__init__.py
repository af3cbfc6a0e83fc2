"""Plotly figures of result objects, all drawn in one style (`lmc.plots.style`)."""

from lmc.core.extras import require

require("plotly")
