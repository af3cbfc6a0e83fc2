"""Mixtures of three models as a triangle, of more as pairs and as a cloud."""

import math

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.simplices.simplex_result import Mixture, Simplex, Triangle
from lmc.views.legend import measure_title
from lmc.views.plots.plane import LEVELS, logarithmic_ticks, round_ticks
from lmc.views.plots.style import BLACK, BLUE, ORANGE, SCALE, styled

HEIGHT = math.sqrt(3.0) / 2.0
CORNERS = np.array([(0.5, HEIGHT), (0.0, 0.0), (1.0, 0.0)])  # of the first, second and third model
PIXELS = 91
SPACING = 0.14  # between two panels, a colour bar with its numbers
REACH = 0.03  # how far colours are drawn beyond the edges, before they are covered


@view(Triangle, "plot")
def plot_triangle(triangle: Triangle, split: str | None = None) -> go.Figure:
    """Draw loss and (for classifications) accuracy over the triangle of mixtures, models in the corners; dark is bad.

    Between the evaluated points values are interpolated linearly. Losses span orders of magnitude, so their colours go by
    the logarithm where all are positive. Unknown points are left white.

    Raises:
        InputError: a split that there is not.
    """
    split = triangle.split if split is None else split
    panels = _panels(triangle, split)
    titles = [f"{split} {measure_title(panel, triangle.unit)}" for panel in panels]
    fig = styled(make_subplots(1, len(panels), horizontal_spacing=SPACING, subplot_titles=titles), height=380)
    for column, panel in enumerate(panels, start=1):
        right = column * (1.0 + SPACING) / len(panels) - SPACING  # where this panel ends
        fig.add_trace(_contours(triangle, split, panel, right), row=1, col=column)
        _frame(fig, column)
        _models(fig, triangle, split, panel, column)
        axis = "x" if column == 1 else f"x{column}"
        fig.update_xaxes(range=[-0.15, 1.15], visible=False, constrain="domain", col=column)
        fig.update_yaxes(range=[-0.14, HEIGHT + 0.13], visible=False, scaleanchor=axis, constrain="domain", col=column)
    fig.update_annotations(selector={"xref": "paper"}, yshift=8)
    return fig.update_layout(hovermode="closest", margin={"l": 10, "r": 10, "t": 46, "b": 20}, legend={"y": 0.0})


@view(Simplex, "plot")
def plot_simplex(mixtures: Simplex, split: str | None = None) -> go.Figure:
    """Draw the loss halfway between each two models (the models themselves on the diagonal), and the loss of every mixture against
    the effective number of models in it, `1 / sum_i s_i^2`: 1 for a model, K for the uniform soup.

    Raises:
        InputError: a split that there is not.
    """
    split = mixtures.split if split is None else split
    _panels(mixtures, split)
    fig = styled(make_subplots(1, 2, horizontal_spacing=0.24, column_widths=[0.42, 0.58]), height=430)
    count = len(mixtures.names)
    halves = np.array([[_halfway(mixtures, split, i, j) for j in range(count)] for i in range(count)])
    shown, bar = _logarithmic(halves)
    heat = go.Heatmap(
        x=mixtures.names, y=mixtures.names, z=shown, text=halves, texttemplate="%{text:.2f}", xgap=2, ygap=2
    )
    heat.update(colorscale=SCALE, colorbar={"x": 0.345, "thickness": 12, "outlinewidth": 0, **bar})
    heat.update(hovertemplate="½ %{y} + ½ %{x}: loss %{text:.4g}<extra></extra>")
    fig.add_trace(heat, row=1, col=1)
    fig.update_yaxes(autorange="reversed", showgrid=False, col=1).update_xaxes(showgrid=False, side="top", col=1)
    effective = 1.0 / np.square(mixtures.shares).sum(1)
    dots = go.Scatter(x=effective, y=mixtures.losses[split], mode="markers", name="mixture", showlegend=False)
    text = [
        " + ".join(f"{s:.2g} {n}" for s, n in zip(row, mixtures.names, strict=True) if s) for row in mixtures.shares
    ]
    dots.update(marker={"size": 6, "color": BLUE, "opacity": 0.5}, text=text)
    fig.add_trace(dots.update(hovertemplate="%{text}: loss %{y:.4g}<extra></extra>"), row=1, col=2)
    for name, mixture, symbol in _named(mixtures, split):
        x = 1.0 / sum(share**2 for share in mixture.shares.values())
        marker = {"size": 15, "color": ORANGE, "symbol": symbol, "line": {"color": "white", "width": 1.5}}
        mark = go.Scatter(x=[x], y=[mixture.values[split]["loss"]], mode="markers", name=name, marker=marker)
        fig.add_trace(mark.update(hovertemplate=f"{name}: loss %{{y:.4g}}<extra></extra>"), row=1, col=2)
    low, high = np.nanmin(mixtures.losses[split]), np.nanmax(mixtures.losses[split])
    wide = high > 5.0 * low > 0.0  # wide enough to hold two of 1, 2, 5, 10, ...
    kind = "log" if low > 0 else "linear"
    fig.update_yaxes(
        title_text=f"{split} {measure_title('loss', mixtures.unit)}", type=kind, dtick="D2" if wide else None, col=2
    )
    fig.update_xaxes(title_text="effective number of models, 1 / Σ s²", col=2)
    return fig.update_layout(hovermode="closest")


def _panels(mixtures: Simplex, split: str) -> list[str]:
    if split not in mixtures.values:
        raise InputError(f"split={split!r}; these mixtures have {', '.join(mixtures.values)}")
    return ["loss", *(["accuracy"] if split in mixtures.accuracies else [])]


def _halfway(mixtures: Simplex, split: str, i: int, j: int) -> float:
    shares = [0.0] * len(mixtures.names)
    shares[i] += 0.5
    shares[j] += 0.5
    return mixtures.interpolate(shares, "loss", split)


def _named(mixtures: Simplex, split: str) -> list[tuple[str, Mixture, str]]:
    known = np.isfinite(mixtures.losses[split]).any()
    best = [("lowest loss", mixtures.best_on(split), "star")] if known else []
    return [("uniform soup", mixtures.uniform, "diamond"), *best]


def _contours(triangle: Triangle, split: str, panel: str, right: float) -> go.Contour:
    x = np.linspace(-REACH, 1.0 + REACH, PIXELS)
    y = np.linspace(-REACH, HEIGHT + REACH, PIXELS)
    heights = _values(triangle, split, panel, x, y) * (100.0 if panel == "accuracy" else 1.0)
    shown, bar = (heights, {}) if panel == "accuracy" else _logarithmic(heights)
    known = shown[np.isfinite(shown)]
    if panel == "accuracy" and len(known):
        bar = round_ticks(float(known.min()), float(known.max()))
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    unit = " %" if panel == "accuracy" else ""
    return go.Contour(
        x=x,
        y=y,
        z=shown.astype(np.float32),  # half the size in a stored notebook
        customdata=heights.astype(np.float32),
        colorscale=SCALE,
        reversescale=panel == "accuracy",
        contours={"start": low, "end": high, "size": max(high - low, 1e-9) / LEVELS},
        line={"width": 0.5, "color": "rgba(255, 255, 255, 0.6)"},
        colorbar={"x": right, "xanchor": "left", "thickness": 12, "outlinewidth": 0, "tickformat": ".3g", **bar},
        hovertemplate=f"{panel} %{{customdata:.4g}}{unit}<extra></extra>",
    )


def _values(triangle: Triangle, split: str, panel: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(Y, X) values at points of the drawing; just outside, those of points on the edge; NaN farther off."""
    across, up = np.meshgrid(x, y / HEIGHT)
    shares = np.stack([up, 1.0 - across - 0.5 * up, across - 0.5 * up], axis=-1).reshape(-1, 3)
    inside = np.clip(shares, 0.0, None)
    inside /= inside.sum(1, keepdims=True)
    values = triangle.interpolate(inside, panel, split)
    return np.where(shares.min(1) < -2.5 * REACH, math.nan, values).reshape(len(y), len(x))


def _logarithmic(heights: np.ndarray) -> tuple[np.ndarray, dict[str, list]]:
    """The logarithms and the ticks that name them, where all are positive."""
    known = heights[np.isfinite(heights)]
    if not len(known) or known.min() <= 0.0:
        return heights, {}
    return np.log10(heights), logarithmic_ticks(float(known.min()), float(known.max()))


def _frame(fig: go.Figure, column: int) -> None:
    """White over what lies outside, and the edges."""
    wide = np.array([(0.5, HEIGHT + 1.0), (-1.0, -0.5), (2.0, -0.5)])
    around = np.vstack([wide, wide[:1], CORNERS, CORNERS[:1], wide[:1]])
    quiet = {"hoverinfo": "skip", "showlegend": False, "mode": "lines"}
    ring = np.vstack([CORNERS, CORNERS[:1], wide[:1], wide[::-1], CORNERS[:1]])
    cover = go.Scatter(x=ring[:, 0], y=ring[:, 1], fill="toself", fillcolor="white", line={"width": 0}, **quiet)
    fig.add_trace(cover, row=1, col=column)
    edges = around[4:8]
    fig.add_trace(
        go.Scatter(x=edges[:, 0], y=edges[:, 1], line={"color": BLACK, "width": 2}, **quiet), row=1, col=column
    )


def _models(fig: go.Figure, triangle: Triangle, split: str, panel: str, column: int) -> None:
    """The models in the corners, the uniform soup and the point of lowest loss."""
    marker = {"size": 13, "color": "white", "line": {"color": BLACK, "width": 2}}
    models = go.Scatter(x=CORNERS[:, 0], y=CORNERS[:, 1], mode="markers", marker=marker, text=triangle.names)
    fig.add_trace(models.update(hovertemplate="%{text}<extra></extra>", showlegend=False), row=1, col=column)
    for (x, y), name, value, above in zip(
        CORNERS, triangle.names, triangle.own[split][panel], (True, False, False), strict=True
    ):
        text = f"{100 * value:.1f} %" if panel == "accuracy" else f"{value:.3g}"
        label = {"text": f"<b>{name}</b> {text}", "showarrow": False, "yshift": 20 if above else -20}
        fig.add_annotation(x=x, y=y, **label, row=1, col=column)
    for name, mixture, symbol in _named(triangle, split):
        x, y = np.array(list(mixture.shares.values())) @ CORNERS
        marker = {"size": 14, "color": ORANGE, "symbol": symbol, "line": {"color": "white", "width": 1.5}}
        trace = go.Scatter(x=[x], y=[y], mode="markers", marker=marker, name=name, legendgroup=name)
        value = mixture.values[split][panel] * (100.0 if panel == "accuracy" else 1.0)
        trace.update(hovertemplate=f"{name}: {panel} {value:.4g}<extra></extra>", showlegend=column == 1)
        fig.add_trace(trace, row=1, col=column)
