"""A matching before and after, and on the way."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.align.study.inspect import Matching
from lmc.core.results import view
from lmc.views.plots.style import BLUE, ORANGE, SCALE, styled


@view(Matching, "plot")
def plot(matching: Matching, group: str | None = None) -> go.Figure:
    """Draw how alike the units of a group are (cosine of all they own) in B's own order and in A's, and beside it the
    barrier (without paths: the mean cosine) while the places are filled.

    Raises:
        InputError: a group that is not among those of the matching.
    """
    group = matching.known(group)
    shown = matching.groups[group]
    titles = [
        f"{group}: before",
        f"{group}: after",
        f"barrier ({matching.paths[0].unit})" if matching.paths else "mean cosine",
    ]
    fig = styled(make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.09), height=390)
    high = max(0.1, float(np.quantile(shown.similarity[-1].diagonal(), 0.9)))
    for column, step in ((1, 0), (2, -1)):
        heat = go.Heatmap(z=shown.similarity[step], colorscale=SCALE, zmin=0.0, zmax=high)
        heat.update(hovertemplate="A %{y}, B %{x}: cosine %{z:.2f}<extra></extra>", showscale=False)
        fig.add_trace(heat, row=1, col=column)
        fig.update_xaxes(title_text="place of B's unit", showgrid=False, constrain="domain", row=1, col=column)
        anchor = "x" if column == 1 else "x2"
        fig.update_yaxes(
            autorange="reversed", scaleanchor=anchor, constrain="domain", showgrid=False, row=1, col=column
        )
    fig.update_yaxes(title_text="A's unit", row=1, col=1)
    heights = matching.barriers if matching.paths else shown.agreement
    colour = ORANGE if matching.paths else BLUE
    line = go.Scatter(x=100 * matching.shares, y=heights, mode="lines+markers", line={"color": colour, "width": 3})
    fig.add_trace(line.update(showlegend=False, hovertemplate="%{y:.3f}"), row=1, col=3)
    fig.update_xaxes(title_text="places filled (%)", row=1, col=3)
    fig.update_yaxes(rangemode="tozero", row=1, col=3)
    return fig.update_layout(hovermode="closest", margin={"t": 50})
