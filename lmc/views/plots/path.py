"""Loss and accuracy along paths between two networks."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.landscape.paths.path import Path
from lmc.views.labels import labelled_paths
from lmc.views.plots.style import BLACK, DASHES, colours, styled


@view(Path, "plot")
def plot(path: Path, label: str | None = None, **others: Path) -> go.Figure:
    """Draw loss and (for classifications) accuracy over alpha: `aligned.plot(naive=naive)` draws both paths.

    Colours stand for paths, dashes for splits. On the split that barriers are taken on, an arrow stands for the
    barrier: from the straight line between the ends to the curve, where their difference is largest.

    Args:
        label: what the path is called (default: "aligned" beside a path called "naive", else "path").
        others: further paths, by name.

    Raises:
        InputError: two paths of one name.
    """
    paths = labelled_paths(path, label, others)
    shown = list(paths.values())
    panels = ["loss", *(["accuracy"] if all(path.accuracies for path in shown) else [])]
    titles = {"loss": "loss (nats)", "accuracy": "accuracy (%)"}
    fig = styled(make_subplots(1, len(panels), horizontal_spacing=0.11), height=430)
    tints = colours(list(paths))
    for column, panel in enumerate(panels, start=1):
        for name, path in paths.items():
            _curves(fig, name, path, panel, tints[name], column)
            _barrier(fig, path, panel, tints[name], column, 0.05 * _span(shown, panel))
        fig.update_xaxes(title_text="α, from A (0) to B (1)", col=column)
        fig.update_yaxes(title_text=titles[panel], rangemode="tozero" if panel == "loss" else "normal", col=column)
    _dash_legend(fig, {split for path in shown for split in path.values})
    return fig


def _curves(fig: go.Figure, name: str, path: Path, panel: str, colour: str, column: int) -> None:
    for split, measures in path.values.items():
        heights = measures[panel] * (100.0 if panel == "accuracy" else 1.0)
        known = ~np.isnan(heights)
        main = split == path.split
        trace = go.Scatter(
            x=path.alphas[known],
            y=heights[known],
            mode="lines+markers" if main else "lines",
            name=f"{name}: barrier {path.barrier:.3f} nats" if panel == "loss" else name,
            legendgroup=name,
            showlegend=main and column == 1,
            line={"color": colour, "width": 3 if main else 2, "dash": DASHES.get(split, "dash")},
            marker={"size": 5},
            hovertemplate=f"{name}, {split}: %{{y:.3g}}<extra></extra>",
        )
        fig.add_trace(trace, row=1, col=column)


def _span(paths: list[Path], panel: str) -> float:
    """The height of what a panel shows, in its unit."""
    heights = np.concatenate([measures[panel] for path in paths for measures in path.values.values()])
    if panel == "accuracy":
        return 100.0 * float(np.nanmax(heights) - np.nanmin(heights))
    return float(np.nanmax(heights))


def _barrier(fig: go.Figure, path: Path, panel: str, colour: str, column: int, shortest: float) -> None:
    """An arrow from the baseline up to the loss (down to the accuracy) where the barrier is attained."""
    found = path.barrier_of("loss" if panel == "loss" else "error")
    base = (1.0 - found.alpha) * found.start + found.alpha * found.end
    ends = (base, base + found.value)
    if panel == "accuracy":
        ends = (100.0 - base, 100.0 - base - found.value)
    if found.value < shortest:
        return  # too short to be seen; the legend says what it is
    fig.add_annotation(
        {"x": found.alpha, "y": ends[1], "ax": found.alpha, "ay": ends[0]},
        **{"axref": "x" if column == 1 else f"x{column}", "ayref": "y" if column == 1 else f"y{column}"},
        **{"arrowhead": 2, "arrowsize": 1.2, "arrowwidth": 1.8, "arrowcolor": colour, "showarrow": True, "text": ""},
        row=1,
        col=column,
    )
    fig.add_annotation(
        x=found.alpha,
        y=0.5 * (ends[0] + ends[1]),
        text=f"{found.value:.2f} nats" if panel == "loss" else f"{found.value:.1f} points",
        font={"color": colour},
        bgcolor="rgba(255, 255, 255, 0.85)",
        showarrow=False,
        xanchor="left",
        xshift=6,
        row=1,
        col=column,
    )


def _dash_legend(fig: go.Figure, splits: set[str]) -> None:
    if len(splits) < 2:
        return
    for split in sorted(splits):
        line = {"color": BLACK, "width": 2.5, "dash": DASHES.get(split, "dash")}
        fig.add_trace(
            go.Scatter(x=[None], y=[None], mode="lines", line=line, name=split, hoverinfo="skip"), row=1, col=1
        )
