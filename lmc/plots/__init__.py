"""Plotly figures of result objects, all drawn in one style (`lmc.plots.style`)."""

from lmc.extras import require

require("plotly")
