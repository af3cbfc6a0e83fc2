"""Curves between two networks, and the lines of a star model."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.landscape.curve import Curve
from lmc.merge.with_training.star import Star, StarPaths
from lmc.views.labels import measure_title
from lmc.views.plots.style import BLACK, BLUE, COLOURS, GREEN, ORANGE, figure, styled
from lmc.weights.arithmetic import distance

_KINDS = {
    "regular": (ORANGE, "between two solutions"),
    "source": (BLUE, "centre to its sources"),
    "held out": (GREEN, "centre to held-out solutions"),
}


@view(Curve, "plot")
def plot_curve(curve: Curve) -> go.Figure:
    """Draw the way of the curve beside the straight line, and its training loss over the epochs.

    Across is the direction from a to b, up the direction in which the bends leave it most, both in distances of weights.
    """
    fig = styled(make_subplots(1, 2, horizontal_spacing=0.14), height=400)
    corners = _corners(curve)
    way = np.array([curve.shares(t) for t in np.linspace(0.0, 1.0, 101)]) @ corners
    for name, points, dash in (("naive", corners[[0, -1]], "dot"), ("curve", way, "solid")):
        line = {"color": COLOURS[name], "width": 3, "dash": dash}
        trace = go.Scatter(x=points[:, 0], y=points[:, 1], mode="lines", name=name, line=line, hoverinfo="name")
        fig.add_trace(trace.update(name="straight line" if name == "naive" else name), row=1, col=1)
    names = ["a", *(f"bend {i}" if len(corners) > 3 else "bend" for i in range(1, len(corners) - 1)), "b"]
    marker = {"size": 11, "color": "white", "line": {"color": BLACK, "width": 2}}
    dots = go.Scatter(x=corners[:, 0], y=corners[:, 1], mode="markers+text", text=names, textposition="top center")
    fig.add_trace(dots.update(marker=marker, showlegend=False, hoverinfo="text", cliponaxis=False), row=1, col=1)
    fig.update_xaxes(title_text="distance from a towards b", col=1)
    fig.update_yaxes(title_text="distance from the line", scaleanchor="x", col=1)
    _training(fig, curve.losses, 2)
    return fig.update_layout(hovermode="closest", margin={"t": 40})


@view(Star, "plot")
def plot_star(star: Star) -> go.Figure:
    """Draw the training loss over the epochs, the mean over random points of the lines; `paths` evaluates the lines."""
    fig = styled(make_subplots(1, 1), height=360)
    _training(fig, star.losses, 1)
    return fig


@view(StarPaths, "plot")
def plot_star_paths(paths: StarPaths) -> go.Figure:
    """Draw the loss over alpha for every line, coloured by its kind; the legend has the mean barrier of each kind."""
    fig = figure(height=430)
    for kind, lines in paths.kinds.items():
        colour, text = _KINDS[kind]
        for i, path in enumerate(lines):
            trace = go.Scatter(
                x=path.alphas,
                y=path.losses[path.split],
                mode="lines",
                name=f"{text}: barrier {paths.barriers[kind].mean():.3f} {path.unit}".rstrip(),
                legendgroup=kind,
                showlegend=i == 0,
                line={"color": colour, "width": 2.5},
                hovertemplate=f"{text} {i}: %{{y:.3g}}<extra></extra>",
            )
            fig.add_trace(trace)
    fig.update_xaxes(title_text="α, from the centre (0), or one solution, to another (1)")
    unit = next(iter(paths.kinds.values()))[0].unit
    return fig.update_yaxes(title_text=measure_title("loss", unit), rangemode="tozero")


def _corners(curve: Curve) -> np.ndarray:
    """(K, 2) the controls, seen in the plane of the line from a to b and of the direction in which they leave it most."""
    squares = np.array([[distance(u, v) ** 2 for v in curve.controls] for u in curve.controls])
    products = 0.5 * (squares[:1] + squares[:, :1] - squares)  # <u - a, v - a>, from |u - v|² alone
    along = products[-1] / max(np.sqrt(products[-1, -1]), 1e-30)
    sizes, directions = np.linalg.eigh(products - np.outer(along, along))
    up = directions[:, -1] * np.sqrt(max(sizes[-1], 0.0))
    return np.stack([along, up if up.sum() >= 0.0 else -up], axis=1)


def _training(fig: go.Figure, losses: np.ndarray, column: int) -> None:
    epochs = list(range(1, len(losses) + 1))
    line = go.Scatter(x=epochs, y=losses, mode="lines+markers", line={"color": BLUE, "width": 3}, showlegend=False)
    fig.add_trace(line.update(hovertemplate="epoch %{x}: %{y:.4g} nats<extra></extra>"), row=1, col=column)
    fig.update_xaxes(title_text="epoch", rangemode="tozero", tickformat="d", nticks=8, col=column)
    fig.update_yaxes(title_text="training loss (nats)", rangemode="tozero", col=column)
