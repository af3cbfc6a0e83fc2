"""How the singular vectors of two networks meet."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.views.plots.style import BLUE, ORANGE, SCALE, styled

if TYPE_CHECKING:
    from lmc.align.study.singular import LayerAlignment, SingularAlignment


def plot_singular(
    alignment: "SingularAlignment", layer: str, before: "SingularAlignment | None", top: int
) -> go.Figure:
    """Panels for one layer: the singular values of both networks, and the size of `u_i . u'_j`, perhaps before as well."""
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


def _meetings(layer: "LayerAlignment", top: int, bar: bool) -> go.Heatmap:
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
