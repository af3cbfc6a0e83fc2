"""Contours of loss and accuracy over planes in weight space."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.planes.plane_result import Plane
from lmc.views.legend import measure_title, named_points, track_colours, tracked
from lmc.views.plots.style import BLACK, GRID, SCALE, dashes, styled

LEVELS = 14  # contours
SPACING = 0.4  # between panels, as a share of the figure, divided by their number
FEW = 40  # points of a track that are marked one by one
PANEL = 230.0  # pixels across, in the narrowest figure that is stored
AROUND = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1))  # a point: to the right, and up


@view(Plane, "plot")
def plot(
    plane: Plane,
    split: str | None = None,
    measures: Sequence[str] | None = None,
    *,
    tracks: Mapping[str, Any] | None = None,
) -> go.Figure:
    """Draw a panel for each measure over the plane: loss and (for classifications) accuracy in percent unless named; dark is bad.

    Losses span orders of magnitude, so their colours go by the logarithm where all are positive. What is not known, and
    what is NaN, stays grey; gaps are counted above the panel. The models are drawn in their places, lines of the plane's
    tracks between them.

    Args:
        split: the data (default: the test split, if there is one).
        measures: which to draw.
        tracks: further curves, name -> points (K, 2) in the plane or weights, as `{"run": checkpoints}`.

    Raises:
        InputError: a split or a measure that the plane lacks.
    """
    plane = tracked(plane, tracks)
    split = plane.split if split is None else split
    if split not in plane.values:
        raise InputError(f"split={split!r}; this plane has {', '.join(plane.values)}")
    known = plane.values[split]
    panels = [m for m in ("loss", "accuracy") if m in known] if measures is None else list(measures)
    if not panels or not set(panels) <= set(known):
        raise InputError(f"measures={measures!r}; this plane has {', '.join(known)}")
    titles = [_title(plane, split, panel) for panel in panels]
    spacing = SPACING / len(panels)
    height = round(min(max(170.0 + 300.0 * (plane.y[-1] - plane.y[0]) / (plane.x[-1] - plane.x[0]), 320.0), 460.0))
    fig = styled(make_subplots(1, len(panels), horizontal_spacing=spacing, subplot_titles=titles), height=height)
    for column, panel in enumerate(panels, start=1):
        right = column * (1.0 + spacing) / len(panels) - spacing  # where this panel ends
        fig.add_trace(_contours(plane, split, panel, right), row=1, col=column)
        _draw(fig, plane, column)
        fig.update_xaxes(
            title_text=plane.axes[0], showgrid=False, range=[plane.x[0], plane.x[-1]], constrain="domain", col=column
        )
        anchor = "x" if column == 1 else f"x{column}"
        fig.update_yaxes(title_text=plane.axes[1], showgrid=False, scaleanchor=anchor, constrain="domain", col=column)
        fig.update_yaxes(range=[plane.y[0], plane.y[-1]], col=column)
    return fig.update_layout(hovermode="closest", plot_bgcolor=GRID)


def _title(plane: Plane, split: str, panel: str) -> str:
    gaps = int((np.isnan(plane.values[split][panel]) & plane.done).sum())
    return f"{split} {measure_title(panel, plane.unit)}" + (f", NaN at {gaps} point{'s' * (gaps > 1)}" if gaps else "")


def _contours(plane: Plane, split: str, panel: str, right: float) -> go.Contour:
    heights = plane.values[split][panel] * (100.0 if panel == "accuracy" else 1.0)
    known = heights[np.isfinite(heights)]
    shown, bar = np.where(np.isfinite(heights), heights, np.nan), {}
    if panel == "loss" and len(known) and known.min() > 0.0:
        shown = np.log10(shown)
        bar = logarithmic_ticks(float(known.min()), float(known.max()))
    elif len(known):
        bar = round_ticks(float(known.min()), float(known.max()))
    unit = " %" if panel == "accuracy" else ""
    low, high = (float(edge(shown)) for edge in (np.nanmin, np.nanmax)) if len(known) else (0.0, 1.0)
    return go.Contour(
        x=plane.x,
        y=plane.y,
        z=shown,
        customdata=heights,
        text=np.where(plane.done & plane.interpolated, " (interpolated)", ""),
        colorscale=SCALE,
        reversescale=panel in plane.higher,
        contours={"start": low, "end": high, "size": max(high - low, 1e-9) / LEVELS},
        line={"width": 0.5, "color": "rgba(255, 255, 255, 0.6)"},
        connectgaps=False,
        colorbar={"x": right, "xanchor": "left", "thickness": 12, "outlinewidth": 0, "tickformat": ".3g", **bar},
        hovertemplate=f"(%{{x:.3g}}, %{{y:.3g}}): {panel} %{{customdata:.4g}}{unit}%{{text}}<extra></extra>",
    )


def round_ticks(low: float, high: float) -> dict[str, list]:
    """Round numbers to be named on a colour bar, about five of them."""
    step = 10.0 ** np.floor(np.log10(max(high - low, 1e-12) / 4.0))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5.0)
    values = [float(i * step) for i in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]
    return {"tickvals": values, "ticktext": [f"{value:.6g}" for value in values]}


def logarithmic_ticks(low: float, high: float) -> dict[str, list]:
    """Losses to be named on a logarithmic colour bar: 1, 2 and 5 times powers of ten, in a narrow range other round numbers."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    losses = [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low <= step * 10.0**decade <= high]
    if len(losses) > 8:
        losses = [loss for loss in losses if f"{loss:.0e}"[0] == "1"]
    if len(losses) < 2:
        losses = round_ticks(low, high)["tickvals"]
    return {"tickvals": [float(np.log10(loss)) for loss in losses], "ticktext": [f"{loss:.6g}" for loss in losses]}


def _draw(fig: go.Figure, plane: Plane, column: int) -> None:
    """The tracks, and the models on top of them."""
    tints, lines = track_colours(list(plane.tracks)), dashes(list(plane.tracks))
    for name, track in plane.tracks.items():
        line = {"color": tints[name], "dash": lines[name], "width": 3}
        mode = "lines+markers" if len(track) <= FEW else "lines"
        halo = go.Scatter(x=track[:, 0], y=track[:, 1], mode="lines", line={"color": "white", "width": 6}, opacity=0.7)
        fig.add_trace(halo.update(showlegend=False, hoverinfo="skip"), row=1, col=column)
        trace = go.Scatter(x=track[:, 0], y=track[:, 1], mode=mode, name=name, line=line, legendgroup=name)
        fig.add_trace(trace.update(showlegend=column == 1, hoverinfo="name"), row=1, col=column)
    x, y = zip(*plane.places.values(), strict=True)
    marker = {"size": 12, "color": "white", "line": {"color": BLACK, "width": 2}}
    models = go.Scatter(x=x, y=y, mode="markers", marker=marker, text=list(plane.places), showlegend=False)
    fig.add_trace(models.update(hovertemplate="%{text}<extra></extra>"), row=1, col=column)
    for label in _labels(plane, tints):
        fig.add_annotation(label, showarrow=False, bgcolor="rgba(255, 255, 255, 0.8)", row=1, col=column)


def _labels(plane: Plane, tints: dict[str, str]) -> list[dict[str, Any]]:
    """The names of models and of points of tracks: each on the map, and on no other name, model or track. A model's name that finds
    no such place stands above it, a track's is left out. Pixels are those of the narrowest figure that is stored."""
    low, high = np.array([plane.x[0], plane.y[0]]), np.array([plane.x[-1], plane.y[-1]])
    scale = PANEL / (high[0] - low[0])
    discs = {name: scale * (np.array(at) - low) for name, at in plane.places.items()}
    tracks = {name: scale * (track - low) for name, track in plane.tracks.items()}
    # middles, and how far from them: across, up
    taken = [np.array([*at, 8.0, 8.0]) for at in discs.values()]
    taken += [np.array([*at, 2.0, 2.0]) for track in tracks.values() for at in _fine(track)]
    edge = scale * (high - low)
    found = []

    def put(text: str, at: np.ndarray, font: dict[str, Any], shown: np.ndarray, *, always: bool = False) -> None:
        half = np.array([0.31 * font["size"] * len(text) + 3.0, 0.5 * font["size"] + 3.0])
        shifts = [np.array(way) * (half + far) for far in (9.0, 20.0) for way in AROUND]
        chosen = shifts[0] if always else None
        for shift in shifts:
            middle = at + shift
            inside = (middle >= half).all() and (middle <= edge - half).all()
            if inside and not any((np.abs(middle - other[:2]) < half + other[2:]).all() for other in taken):
                chosen = shift
                break
        if chosen is not None:
            taken.append(np.array([*(at + chosen), *half]))
            place = {"x": shown[0], "y": shown[1], "xshift": float(chosen[0]), "yshift": float(chosen[1])}
            found.append({**place, "text": f"<b>{text}</b>" if always else text, "font": font})

    for name, at in discs.items():
        put(name, at, {"size": 14}, np.array(plane.places[name]), always=True)
    for name, track in tracks.items():
        names = named_points(plane, name)
        for i in sorted(names, key=lambda i: i not in (0, len(track) - 1)):
            put(names[i], track[i], {"size": 12, "color": tints[name]}, plane.tracks[name][i])
    return found


def _fine(track: np.ndarray) -> np.ndarray:
    """A curve in steps of pixels."""
    steps = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(track, axis=0), axis=1))])
    at = np.linspace(0.0, steps[-1], int(steps[-1] / 3.0) + 2)
    return np.stack([np.interp(at, steps, track[:, axis]) for axis in (0, 1)], axis=1)
