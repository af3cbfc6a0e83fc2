"""Single networks and pairs in numbers: variance that layers kept, curvature of the loss, likeness of two networks."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.curvature import Curvature
from lmc.landscape.similarity import Similarity
from lmc.landscape.variance import VarianceRatios
from lmc.views.legend import labelled
from lmc.views.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, colours, figure, styled


@view(VarianceRatios, "plot")
def plot_ratios(ratios: VarianceRatios, label: str = "merged", **others: VarianceRatios) -> go.Figure:
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


@view(Curvature, "plot")
def plot_curvature(curvature: Curvature) -> go.Figure:
    """Draw the eigenvalues that were found, with their residuals as error bars; the title has the trace."""
    values, residuals = [*curvature.eigenvalues, curvature.lowest], [*curvature.residuals, curvature.lowest_residual]
    names = [*(f"λ<sub>{i}</sub>" for i in range(1, len(values))), "lowest"]
    colour = [BLUE] * (len(values) - 1) + [ORANGE if curvature.lowest < 0.0 else GREY]
    fig = figure(height=400)
    bars = go.Bar(x=names, y=values, marker={"color": colour}, width=0.5, text=[f"{value:.3g}" for value in values])
    bars.update(
        textposition="outside", cliponaxis=False, error_y={"array": residuals, "color": BLACK, "thickness": 1.5}
    )
    fig.add_trace(bars.update(hovertemplate="%{x}: %{y:.5g}<extra></extra>"))
    error = "" if curvature.trace_error != curvature.trace_error else f" ± {curvature.trace_error:.2g}"
    title = f"trace {curvature.trace:.4g}{error}, {curvature.parameters:,} parameters"
    fig.update_yaxes(title_text="eigenvalue of the Hessian", zeroline=True, zerolinecolor=BLACK)
    return fig.update_layout(title={"text": title, "font": {"size": 15}}, margin={"t": 56})


@view(Similarity, "plot")
def plot_similarity(similarity: Similarity) -> go.Figure:
    """Draw the linear CKA of each layer, and which share of the examples both networks, one or none predict rightly."""
    wide = len(similarity.cka) > 6
    fig = styled(make_subplots(1, 2, horizontal_spacing=0.12, column_widths=[0.62, 0.38]), height=460 if wide else 400)
    layers = go.Scatter(x=list(similarity.cka), y=list(similarity.cka.values()), mode="lines+markers", showlegend=False)
    layers.update(line={"color": BLUE, "width": 3}, marker={"size": 8}, hovertemplate="%{x}: %{y:.3f}<extra></extra>")
    fig.add_trace(layers, row=1, col=1)
    error_a, _ = similarity.errors
    shares = {
        "both right": (1.0 - error_a - similarity.lost, BLUE), "only a right": (similarity.lost, ORANGE),
        "only b right": (similarity.won, GREEN), "both wrong": (error_a - similarity.won, SKY),
    }  # fmt: skip
    for name, (share, colour) in shares.items():
        bar = go.Bar(x=[similarity.split], y=[100.0 * share], name=name, marker={"color": colour}, width=0.4)
        fig.add_trace(bar.update(hovertemplate=f"{name}: %{{y:.1f}} %<extra></extra>"), row=1, col=2)
    fig.update_xaxes(title_text="layer", type="category", tickangle=-45 if wide else 0, col=1)
    fig.update_yaxes(title_text="linear CKA", range=[0.0, 1.04], col=1)
    fig.update_yaxes(title_text="examples (%)", range=[0.0, 100.0], col=2)
    fig.update_xaxes(title_text=f"{100.0 * similarity.disagreement:.1f} % predicted differently", col=2)
    return fig.update_layout(
        barmode="stack", hovermode="closest", legend={"orientation": "v", "x": 1.02, "y": 1.0, "yanchor": "top"}
    )
