"""What runs tell: their telescoping account, barriers layer by layer, decisions that models do not share."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.landscape.layerwise import LayerwiseBarriers
from lmc.landscape.multiplicity import Multiplicity
from lmc.landscape.telescoping import Telescope
from lmc.training.intrinsic import IntrinsicDimension
from lmc.views.plots.style import BLACK, BLUE, GREY, ORANGE, SCALE, colours, dashes, figure, styled


@view(Telescope, "plot")
def plot_telescope(telescope: Telescope) -> go.Figure:
    """Draw the error of the first-order account after each step, and beside it how much of the change each layer makes."""
    titles = ["off by, on average", "moved by each layer, to first order"]
    fig = styled(make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12), height=400)
    steps = np.arange(1, len(telescope.errors))
    for name, errors, colour, dash in (
        ("linearised at the start", telescope.linear, GREY, "dash"),
        ("step by step", telescope.errors, BLACK, "solid"),
    ):
        line = go.Scatter(x=steps, y=np.maximum(errors[1:], 1e-16), name=name, line={"color": colour, "dash": dash})
        fig.add_trace(line.update(hovertemplate="%{y:.2e}"), row=1, col=1)
    tints, lines = colours(list(telescope.sizes)), dashes(list(telescope.sizes))
    for layer, colour in tints.items():
        line = go.Scatter(x=steps, y=np.cumsum(telescope.sizes[layer]), name=layer or "model")
        line.update(line={"color": colour, "dash": lines[layer]})
        fig.add_trace(line.update(hovertemplate="%{y:.3g}"), row=1, col=2)
    fig.update_yaxes(type="log", exponentformat="power", dtick=1, row=1, col=1).update_yaxes(
        rangemode="tozero", row=1, col=2
    )
    return fig.update_xaxes(title_text="step").update_layout(margin={"t": 50})


@view(LayerwiseBarriers, "plot")
def plot_layerwise(found: LayerwiseBarriers) -> go.Figure:
    """Draw the barrier of each layer inside a and inside b, and that of all layers as a line."""
    fig = figure()
    for name, values, colour in (("others of a", found.from_a, BLUE), ("others of b", found.from_b, ORANGE)):
        fig.add_trace(go.Bar(x=found.layers, y=values, name=name, marker_color=colour, hovertemplate="%{y:.3f}"))
    ends = [found.layers[0], found.layers[-1]]
    line = go.Scatter(x=ends, y=[found.full, found.full], mode="lines", name="all layers of both")
    fig.add_trace(line.update(line={"color": BLACK, "dash": "dash"}, hovertemplate="%{y:.3f}"))
    fig.update_xaxes(
        type="category", title_text=f"layers, joining: {found.cumulative}" if found.cumulative else "layer"
    )
    return fig.update_yaxes(title_text=f"barrier ({found.unit}, {found.split})")


@view(Multiplicity, "plot")
def plot_multiplicity(found: Multiplicity) -> go.Figure:
    """Draw the churn between every two models, and beside it how many examples have how high a capacity."""
    titles = ["decisions that differ (%)", "examples by capacity"]
    fig = styled(make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.27), height=400)
    heat = go.Heatmap(z=100 * found.churn, x=found.names, y=found.names, colorscale=SCALE, zmin=0.0, hoverongaps=False)
    heat.update(hovertemplate="%{y}, %{x}: %{z:.1f} %<extra></extra>", colorbar={"x": 0.37, "thickness": 12})
    fig.add_trace(heat, row=1, col=1)
    bars = go.Histogram(x=found.capacity, nbinsx=30, marker_color=BLUE, showlegend=False)
    fig.add_trace(bars.update(hovertemplate="%{x}: %{y} examples<extra></extra>"), row=1, col=2)
    fig.update_xaxes(type="category", showgrid=False, row=1, col=1)
    fig.update_yaxes(type="category", showgrid=False, autorange="reversed", row=1, col=1)
    fig.update_xaxes(title_text="models that an example tells apart", row=1, col=2)
    fig.update_yaxes(type="log", dtick=1, title_text="examples", row=1, col=2)
    return fig.update_layout(hovermode="closest", margin={"t": 50})


@view(IntrinsicDimension, "plot")
def plot_intrinsic(found: IntrinsicDimension) -> go.Figure:
    """Draw the accuracy over the dimension of the subspace, with the share of the baseline that counts as solved."""
    fig = figure()
    mean, spread = found.accuracies.mean(1), found.accuracies.std(1)
    line = go.Scatter(x=found.dimensions, y=mean, error_y={"array": spread}, mode="lines+markers", showlegend=False)
    fig.add_trace(line.update(line={"color": BLUE, "width": 3}, hovertemplate="%{y:.3f}"))
    fig.add_hline(
        y=found.share * found.baseline,
        line={"color": GREY, "dash": "dash"},
        annotation={"text": f"{found.share:.0%} of the baseline", "x": 0.01, "xanchor": "left", "yanchor": "bottom"},
    )
    if found.value is not None:
        fig.add_vline(x=found.value, line={"color": ORANGE, "dash": "dot"})
        # on an axis of logarithms a note, other than a line, is placed by the logarithm
        place = {"x": np.log10(found.value), "y": 1.0, "yref": "y domain", "xanchor": "left", "yanchor": "top"}
        fig.add_annotation(text=f"{found.value}", showarrow=False, **place)
    fig.update_xaxes(type="log", tickvals=found.dimensions, title_text="dimension of the subspace")
    return fig.update_yaxes(title_text="test accuracy")
