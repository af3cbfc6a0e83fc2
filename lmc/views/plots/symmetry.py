"""A picture of a specification: layers from top to bottom, one lane for each kind of group that ties them."""

from dataclasses import dataclass, field

import plotly.graph_objects as go

from lmc.core.results import view
from lmc.symmetry.report import generic, ordered_families, tensor_text
from lmc.symmetry.spec import PermutationSpec
from lmc.views.plots.style import CYCLE, GREY, GRID, figure

_MAX_ROWS = 44
_KINDS = {
    "writes": ("square", "makes these units (rows of its weight)"),
    "reads": ("circle-open", "reads these units (columns of its weight)"),
    "both": ("square-dot", "reads and makes these units"),
    "scales": ("diamond", "acts on each unit (bias, norm)"),
}
STAYS = "stays"


@dataclass
class _Lane:
    title: str
    units: str
    touched: dict[str, dict[str, list[str]]] = field(default_factory=dict)


@view(PermutationSpec, "plot")
def plot_spec(spec: PermutationSpec) -> go.Figure:
    """Draw modules as rows in the order of the state dict, groups as lanes; a mark says how a module touches a group.

    Where a network repeats a layer so often that rows would not fit, equal layers share a row and equal groups a lane.
    """
    modules = list(dict.fromkeys(_module(name) for name in spec.shapes))
    merge = len(modules) > _MAX_ROWS
    label = generic if merge else str
    rows = list(dict.fromkeys(label(module) for module in modules))
    lanes = _lanes(spec, label)
    longest = max((len(lane.title) for lane in lanes), default=0)
    fig = figure(width=max(640, 280 + 5 * longest + 54 * len(lanes)), height=180 + 24 * len(rows) + 6 * longest)
    place = {row: k for k, row in enumerate(rows)}
    for k, lane in enumerate(lanes):
        _draw(fig, lane, k, place, CYCLE[k % len(CYCLE)] if lane.title != STAYS else GREY)
    for kind, (symbol, meaning) in _KINDS.items():
        if any(kind == _kind(roles) for lane in lanes for roles in lane.touched.values()):
            fig.add_trace(_legend(symbol, meaning))
    names = [f"{lane.title}<br><sub>{lane.units}</sub>" for lane in lanes]
    fig.update_xaxes(
        tickmode="array", tickvals=list(range(len(lanes))), ticktext=names, side="top", tickangle=-45,
        range=[-0.6, len(lanes) - 0.4], showgrid=False, showline=False, ticks="",
    )  # fmt: skip
    fig.update_yaxes(
        tickmode="array", tickvals=list(range(len(rows))), ticktext=rows, range=[len(rows) - 0.4, -0.6], gridcolor=GRID
    )
    fig.update_layout(
        hovermode="closest",
        margin={"l": 20, "r": 20 + 5 * longest, "t": 60 + 6 * longest, "b": 20},
        legend={"orientation": "v", "x": 0, "y": -0.02, "yanchor": "top"},
    )
    return fig


def _lanes(spec: PermutationSpec, label) -> list[_Lane]:
    """One lane per family (or per kind of family, when merged), those nested in another right behind it."""
    lanes: dict[str, _Lane] = {}
    counts: dict[str, int] = {}
    for family in ordered_families(spec):
        names = spec.families[family]
        group = spec.groups[names[0]]
        title = label(family)
        counts[title] = counts.get(title, 0) + 1
        times = f" in each of {len(names)}" if group.within else ""
        lane = lanes.setdefault(title, _Lane(title, f"{group.size} units{times}"))
        for tensor, tables in group.tables.items():
            for table in tables:
                role = _role(spec, tensor, table.dims)
                text = label(tensor_text(spec, tensor, spec.patterns[tensor]))
                found = lane.touched.setdefault(label(_module(tensor)), {}).setdefault(role, [])
                if text not in found:
                    found.append(text)
    for title, lane in lanes.items():
        if counts[title] > 1:
            lane.units = f"{counts[title]} x {lane.units}"
    stays = _Lane(STAYS, "fixed axes")
    for (tensor, axis), reason in spec.frozen.items():
        found = stays.touched.setdefault(label(_module(tensor)), {}).setdefault(STAYS, [])
        text = f"{label(tensor)} axis {axis}: {reason}"
        if text not in found:
            found.append(text)
    return [*lanes.values(), *([stays] if stays.touched else [])]


def _draw(fig: go.Figure, lane: _Lane, column: int, place: dict[str, int], colour: str) -> None:
    rows = sorted(place[row] for row in lane.touched)
    if lane.title != STAYS:
        line = {"color": colour, "width": 3}
        ends = {"x": [column, column], "y": [rows[0], rows[-1]]}
        fig.add_trace(go.Scatter(**ends, mode="lines", line=line, opacity=0.45, hoverinfo="skip", showlegend=False))
    points = {place[row]: roles for row, roles in lane.touched.items()}
    fig.add_trace(
        go.Scatter(
            x=[column] * len(points),
            y=list(points),
            mode="markers",
            marker={
                "symbol": ["x-thin" if STAYS in roles else _KINDS[_kind(roles)][0] for roles in points.values()],
                "size": [8 if STAYS in roles else 12 for roles in points.values()],
                "color": colour,
                "line": {"width": 2, "color": colour},
            },
            text=["<br>".join(text for texts in roles.values() for text in texts) for roles in points.values()],
            hovertemplate=f"<b>{lane.title}</b><br>%{{text}}<extra></extra>",
            showlegend=False,
        )
    )


def _legend(symbol: str, meaning: str) -> go.Scatter:
    marker = {"symbol": symbol, "size": 11, "color": GREY, "line": {"width": 2, "color": GREY}}
    return go.Scatter(x=[None], y=[None], mode="markers", name=meaning, marker=marker)


def _role(spec: PermutationSpec, tensor: str, dims: tuple[int, ...]) -> str:
    if len(spec.shapes[tensor]) == 1:
        return "scales"
    return "writes" if 0 in dims else "reads"


def _kind(roles: dict[str, list[str]]) -> str:
    if "writes" in roles and "reads" in roles:
        return "both"
    return next((kind for kind in ("writes", "reads") if kind in roles), "scales")


def _module(tensor: str) -> str:
    return tensor.rsplit(".", 1)[0] if "." in tensor else tensor
