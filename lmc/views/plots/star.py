"""The lines of a star model."""

import plotly.graph_objects as go

from lmc.core.results import view
from lmc.merge.with_training.star import StarPaths
from lmc.views.plots.style import BLUE, GREEN, ORANGE, figure

_KINDS = {
    "regular": (ORANGE, "between two solutions"),
    "source": (BLUE, "centre to its sources"),
    "held out": (GREEN, "centre to held-out solutions"),
}


@view(StarPaths, "plot")
def plot(paths: StarPaths) -> go.Figure:
    """Draw the loss over alpha for every line, coloured by its kind; the legend has the mean barrier of each kind."""
    fig = figure(height=430)
    for kind, lines in paths.kinds.items():
        colour, text = _KINDS[kind]
        for i, path in enumerate(lines):
            trace = go.Scatter(
                x=path.alphas,
                y=path.losses[path.split],
                mode="lines",
                name=f"{text}: barrier {paths.barriers[kind].mean():.3f} nats",
                legendgroup=kind,
                showlegend=i == 0,
                line={"color": colour, "width": 2.5},
                hovertemplate=f"{text} {i}: %{{y:.3g}}<extra></extra>",
            )
            fig.add_trace(trace)
    fig.update_xaxes(title_text="α, from the centre (0), or one solution, to another (1)")
    return fig.update_yaxes(title_text="loss (nats)", rangemode="tozero")
