"""Barriers over the epochs of two runs."""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from lmc.align.study.epochs import Epochs
from lmc.core.results import view
from lmc.views.plots.style import SCALE, colours, styled


@view(Epochs, "plot")
def plot(result: Epochs) -> go.Figure:
    """Draw the barrier of each path over the epochs, and beside it, for each path, its losses over alpha, one curve an epoch,
    the later the darker."""
    names = list(result.paths)
    unit = result.paths[names[0]][0].unit
    titles = ["barrier", *(f"{name}: loss on the way" for name in names)]
    fig = styled(make_subplots(1, 1 + len(names), horizontal_spacing=0.09, subplot_titles=titles), height=400)
    tints = colours(names)
    for name, found in result.barriers.items():
        line = {"color": tints[name], "width": 3}
        trace = go.Scatter(x=result.epochs, y=found, mode="lines+markers", name=name, line=line, marker={"size": 6})
        fig.add_trace(trace.update(hovertemplate=f"{name}: %{{y:.3g}} {unit}<extra></extra>"), row=1, col=1)
    shades = sample_colorscale([list(stop) for stop in SCALE], np.linspace(0.25, 1.0, len(result.epochs)).tolist())
    for column, name in enumerate(names, start=2):
        for epoch, path, shade in zip(result.epochs, result.paths[name], shades, strict=True):
            trace = go.Scatter(
                x=path.alphas, y=path.losses[path.split], mode="lines", line={"color": shade, "width": 2}
            )
            text = f"epoch {epoch}: %{{y:.3g}}<extra></extra>"
            fig.add_trace(trace.update(showlegend=False, hovertemplate=text), row=1, col=column)
        fig.update_xaxes(title_text="α, from A (0) to B (1)", row=1, col=column)
        fig.update_yaxes(rangemode="tozero", matches="y2", row=1, col=column)
    fig.update_xaxes(title_text="epoch", row=1, col=1)
    fig.update_yaxes(title_text=unit, rangemode="tozero", row=1, col=1)
    return fig
