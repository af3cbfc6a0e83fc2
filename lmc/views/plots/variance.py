"""How much variance the layers of merged networks kept."""

import plotly.graph_objects as go

from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.variance import VarianceRatios
from lmc.views.labels import labelled
from lmc.views.plots.style import BLACK, colours, figure


@view(VarianceRatios, "plot")
def plot(ratios: VarianceRatios, label: str = "merged", **others: VarianceRatios) -> go.Figure:
    """Draw the variance relative to the ends over the layers, from input to output: `repaired.plot("repaired", naive=naive)`.

    Args:
        label: what the network is called.
        others: further networks with the same layers, by name.

    Raises:
        InputError: networks with other layers, or two of one name.
    """
    networks = labelled(ratios, label, others)
    for name, other in others.items():
        if other.ends.keys() != ratios.ends.keys():
            raise InputError(f"{name}: expected the VarianceRatios of a network with the same layers")
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
