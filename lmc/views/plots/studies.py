"""Studies of alignment (methods side by side, matchings on the way, singular vectors that meet, barriers over the epochs of
two runs) and of networks (similarity, curvature, variance)."""

import math

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from lmc.align.study.compare import AlignmentComparison
from lmc.align.study.epochs import Epochs
from lmc.align.study.inspect import Matching
from lmc.align.study.singular import LayerAlignment, SingularAlignment
from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.curvature import Curvature
from lmc.landscape.similarity import Similarity
from lmc.landscape.variance import VarianceRatios
from lmc.views.legend import labelled, measure_title
from lmc.views.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SCALE, SKY, colours, dashes, figure, styled

SHORTEST = 1e-3  # seconds; what takes less is drawn there


@view(Matching, "plot")
def plot_matching(matching: Matching, group: str | None = None) -> go.Figure:
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


@view(AlignmentComparison, "plot")
def plot_comparison(comparison: AlignmentComparison) -> go.Figure:
    """Draw a row for each method in three panels: barriers plain and repaired, similarity of the weights, seconds (log)."""
    methods = list(comparison)[::-1]  # plotly draws bars from the bottom up
    rows = [comparison[method] for method in methods]
    fig = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.04, column_widths=[0.5, 0.25, 0.25])
    bars = [
        ("barrier", [row.barrier for row in rows], ORANGE, 1),
        ("barrier with REPAIR", [row.barrier_repaired for row in rows], GREEN, 1),
        ("R, agreement of singular vectors", [row.r for row in rows], BLUE, 2),
        ("cosine of the weights", [row.cosine for row in rows], PURPLE, 2),
    ]
    for name, values, colour, column in bars:
        bar = go.Bar(x=values, y=methods, name=name, orientation="h", marker={"color": colour})
        fig.add_trace(bar.update(hovertemplate="%{x:.3g}"), row=1, col=column)
    seconds = [row.seconds for row in rows]
    at = [max(value, SHORTEST) for value in seconds]
    time = go.Scatter(x=at, y=methods, text=seconds, mode="markers", showlegend=False)
    fig.add_trace(
        time.update(marker={"color": "black", "size": 9}, hovertemplate="%{text:.2g} s<extra></extra>"), row=1, col=3
    )
    fig.update_xaxes(
        title_text=f"{comparison.split} loss {measure_title('barrier', comparison.unit)}", rangemode="tozero", col=1
    )
    fig.update_xaxes(title_text="similarity to A", nticks=4, col=2)
    fig.update_xaxes(title_text="seconds", type="log", nticks=4, tickangle=0, col=3)
    decades = range(math.ceil(math.log10(min(at))), math.floor(math.log10(max(at))) + 1)
    if len(decades) > 2:  # plotly would name each of them, and names touch in a panel this narrow
        fig.update_xaxes(tickvals=[10.0**decade for decade in decades[:: math.ceil(len(decades) / 2)]], col=3)
    return styled(fig, height=120 + 48 * len(methods)).update_layout(
        hovermode="closest", barmode="group", legend={"y": 1.02, "yanchor": "bottom"}
    )


@view(SingularAlignment, "plot")
def plot_singular(
    alignment: SingularAlignment, layer: str | None = None, *, before: SingularAlignment | None = None, top: int = 40
) -> go.Figure:
    """Draw the spectra of one layer, and how the `top` left singular vectors of A and B meet, the size of `u_i . u'_j`.

    Args:
        layer: a key of `layers` (default: the one with most singular values).
        before: the same networks before they were aligned, drawn beside it.

    Raises:
        InputError: a layer that neither network has.
    """
    layer = layer or max(alignment.layers, key=lambda key: len(alignment.layers[key].values_a))
    if layer not in alignment.layers or (before is not None and layer not in before.layers):
        raise InputError(f"layer={layer!r}; expected one of {', '.join(alignment.layers)}")
    found = alignment.layers[layer]
    maps = [("before:", before.layers[layer]), ("after:", found)] if before else [("", found)]
    titles = [f"values of {layer}", *(f"{when} R = {each.r:.2f}".strip() for when, each in maps)]
    fig = styled(make_subplots(1, 1 + len(maps), subplot_titles=titles, horizontal_spacing=0.09), height=400)
    for name, values, colour in (("A", found.values_a, BLUE), ("B", found.values_b, ORANGE)):
        ranks = list(range(1, len(values) + 1))
        line = go.Scatter(x=ranks, y=values.tolist(), name=name, mode="lines", line={"color": colour, "width": 2.5})
        fig.add_trace(line, row=1, col=1)
    for column, (_, each) in enumerate(maps, start=2):
        fig.add_trace(_meetings(each, top, column == 1 + len(maps)), row=1, col=column)
        fig.update_xaxes(title_text="vector of B, by size", showgrid=False, col=column)
        anchor = "x" if column == 1 else f"x{column}"
        fig.update_yaxes(autorange="reversed", showgrid=False, scaleanchor=anchor, constrain="domain", col=column)
    fig.update_xaxes(title_text="rank", type="log", dtick=1, col=1)
    fig.update_yaxes(title_text="vector of A, by size", col=2)
    return fig.update_layout(hovermode="closest")


def _meetings(layer: LayerAlignment, top: int, bar: bool) -> go.Heatmap:
    return go.Heatmap(
        z=layer.left[:top, :top].abs().tolist(),
        x0=1,
        y0=1,
        zmin=0.0,
        zmax=1.0,
        colorscale=SCALE,
        showscale=bar,
        colorbar={"thickness": 12, "outlinewidth": 0},
        hovertemplate="A's %{y} and B's %{x}: %{z:.2f}<extra></extra>",
    )


@view(Epochs, "plot")
def plot_epochs(result: Epochs) -> go.Figure:
    """Draw the barrier of each path over the epochs, and beside it, for each path, its losses over alpha, one curve an epoch,
    the later the darker."""
    names = list(result.paths)
    unit = result.paths[names[0]][0].unit
    titles = ["barrier", *(f"{name}: loss on the way" for name in names)]
    fig = styled(make_subplots(1, 1 + len(names), horizontal_spacing=0.09, subplot_titles=titles), height=400)
    tints, lines = colours(names), dashes(names)
    for name, found in result.barriers.items():
        line = {"color": tints[name], "dash": lines[name], "width": 3}
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
    tints, lines = colours(list(networks)), dashes(list(networks))
    for name, found in networks.items():
        line = go.Scatter(x=layers, y=list(found.ratios.values()), mode="lines+markers", name=name)
        line.update(line={"color": tints[name], "dash": lines[name], "width": 3})
        fig.add_trace(line.update(hovertemplate=f"{name}: %{{y:.2f}}<extra></extra>"))
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
