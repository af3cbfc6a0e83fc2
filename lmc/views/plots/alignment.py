"""Methods of alignment side by side."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.align.study.compare import AlignmentComparison
from lmc.core.results import view
from lmc.views.plots.style import BLUE, GREEN, ORANGE, PURPLE, styled


@view(AlignmentComparison, "plot")
def plot(comparison: AlignmentComparison) -> go.Figure:
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
    time = go.Scatter(x=[row.seconds for row in rows], y=methods, mode="markers", showlegend=False)
    fig.add_trace(
        time.update(marker={"color": "black", "size": 9}, hovertemplate="%{x:.2g} s<extra></extra>"), row=1, col=3
    )
    fig.update_xaxes(title_text=f"{comparison.split} loss barrier (nats)", rangemode="tozero", col=1)
    fig.update_xaxes(title_text="similarity to A", nticks=4, col=2)
    fig.update_xaxes(title_text="seconds", type="log", nticks=4, tickangle=0, col=3)
    return styled(fig, height=120 + 48 * len(methods)).update_layout(
        hovermode="closest", barmode="group", legend={"y": 1.02, "yanchor": "bottom"}
    )
