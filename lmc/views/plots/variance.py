"""How much variance the layers of merged networks kept."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from lmc.views.plots.style import BLACK, colours, figure

if TYPE_CHECKING:
    from lmc.landscape.variance import VarianceRatios


def plot_ratios(networks: Mapping[str, "VarianceRatios"]) -> go.Figure:
    """Variance relative to the ends over the layers, from input to output: a line for each network, and one at 1."""
    layers = list(next(iter(networks.values())).ends)
    many = len(layers) > 6  # their names are slanted, and need room
    fig = figure(height=540 if many else 420)
    tints = colours(list(networks))
    for name, found in networks.items():
        line = go.Scatter(x=layers, y=list(found.ratios.values()), mode="lines+markers", name=name)
        fig.add_trace(
            line.update(line={"color": tints[name], "width": 3}, hovertemplate=f"{name}: %{{y:.2f}}<extra></extra>")
        )
    fig.add_hline(1.0, line={"color": BLACK, "width": 1.5, "dash": "dot"})
    fig.update_xaxes(title_text="layer", type="category", tickangle=-45 if many else 0)
    fig.update_yaxes(title_text="variance, relative to the ends", rangemode="tozero")
    # Slanted names of layers take room that a legend below would cover.
    return fig.update_layout(legend={"y": 1.02, "yanchor": "bottom"})
