"""Pictures of a specification (layers from top to bottom, one lane for each kind of group that ties them) and of what moved:
permutations, rotations, transport plans."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lmc.align.many import Matchings
from lmc.align.rotations.matching import RotationMatching
from lmc.align.rotations.whole_group import GroupMatching
from lmc.align.transport.fusion import Fusion
from lmc.core.results import view
from lmc.errors import InputError
from lmc.symmetry.element import Element
from lmc.symmetry.notation.grammar import generic
from lmc.symmetry.report import ordered_families, tensor_text
from lmc.symmetry.spec import Permutation, PermutationSpec
from lmc.views.plots.style import BLUE, CYCLE, GREY, GRID, SCALE, figure, styled

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
    beyond: str = ""
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
    names = [f"{lane.title}<br><sub>{lane.units}{lane.beyond}</sub>" for lane in lanes]
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
        more = f" + {spec.beyond(family)}" if spec.beyond(family) else ""
        lane = lanes.setdefault(title, _Lane(title, f"{group.size} units{times}", more))
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


FEW = 3  # groups that are drawn unless others are named


@view(Permutation, "plot")
def plot_permutation(permutation: Permutation, groups: Sequence[str] | None = None) -> go.Figure:
    """Draw for some groups a mark for each unit of A, over the unit of B in its place; the diagonal is the identity.

    Args:
        groups: which (default: the first three).

    Raises:
        InputError: a group that the permutation lacks.
    """
    shown = _some(permutation, groups)
    titles = [
        f"{name}: {int((permutation[name].numpy() != np.arange(len(permutation[name]))).sum())} of "
        f"{len(permutation[name])} move"
        for name in shown
    ]
    fig = _panels(titles, "B's unit", "A's unit")
    for column, name in enumerate(shown, start=1):
        index = permutation[name].numpy()
        marker = {"size": max(2.5, min(11.0, 240.0 / len(index))), "symbol": "square", "color": BLUE}
        dots = go.Scatter(x=index, y=np.arange(len(index)), mode="markers", marker=marker, showlegend=False)
        dots.update(hovertemplate="A's %{y}: B's %{x}<extra></extra>")
        fig.add_trace(dots, row=1, col=column)
        fig.update_xaxes(range=[-0.7, len(index) - 0.3], col=column)
        fig.update_yaxes(range=[len(index) - 0.3, -0.7], col=column)
    return fig


@view(Element, "plot")
def plot_element(element: Element, groups: Sequence[str] | None = None) -> go.Figure:
    """Draw for some groups the sizes of the entries of the matrix by which B's units are mixed and permuted, at the first
    occurrence, as shares of the largest.

    Args:
        groups: which (default: the first three that are scaled or mixed, or the first three).

    Raises:
        InputError: a group that there is not.
    """
    shown = _some(element.indices, groups or list(element.factors)[:FEW] or None)
    maps, titles = {}, []
    for name in shown:
        index = element.indices[name]
        where, factor = next(iter(element.factors.get(name, {}).items()), ("", torch.ones(len(index))))
        sizes = (torch.diag(factor) if factor.ndim == 1 else factor)[index].abs()
        maps[name] = (sizes / sizes.max()).numpy()
        titles.append(
            f"{name}: {f'{where} scaled' if where and factor.ndim == 1 else f'{where} mixed' if where else 'permuted'}"
        )
    return _maps(maps, titles, "size")


@view(GroupMatching, "plot")
def plot_group_matching(matching: GroupMatching, groups: Sequence[str] | None = None) -> go.Figure:
    """Draw for some groups the sizes of the entries of the matrix by which B's units are mixed and permuted, as of an element.

    Args:
        groups: which (default: the first three that are scaled or mixed, or the first three).

    Raises:
        InputError: a group that there is not.
    """
    return plot_element(matching.element, groups)


@view(Matchings, "plot")
def plot_matchings(matchings: Matchings) -> go.Figure:
    """Draw for each model and group the share of the units that move."""
    groups = list(matchings[0])
    shares = [
        [100.0 * float((pi[name].numpy() != np.arange(len(pi[name]))).mean()) for pi in matchings] for name in groups
    ]
    fig = figure(height=150 + 30 * max(3, len(groups)))
    models = [f"model {i}" for i in range(len(matchings))]
    heat = go.Heatmap(x=models, y=groups, z=shares, colorscale=SCALE, zmin=0.0, zmax=100.0, xgap=2, ygap=2)
    heat.update(texttemplate="%{z:.0f} %", showscale=False, hovertemplate="%{x}, %{y}: %{z:.1f} % move<extra></extra>")
    fig.add_trace(heat)
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False).update_xaxes(showgrid=False, side="top")
    return fig.update_layout(
        hovermode="closest", title={"text": "units that move", "font": {"size": 15}}, margin={"t": 80}
    )


@view(Fusion, "plot")
def plot_fusion(fusion: Fusion, groups: Sequence[str] | None = None, *, model: int = 0) -> go.Figure:
    """Draw for some groups how the mass of each unit of B is spread over the units of A.

    Args:
        groups: which (default: the first three).
        model: of several transported ones.

    Raises:
        InputError: a group or a model that there is not.
    """
    if not 0 <= model < len(fusion.couplings):
        raise InputError(f"model={model}; expected 0 to {len(fusion.couplings) - 1}")
    plans = fusion.couplings[model]
    spread = {name: plans[name].double() / plans[name].double().sum(1, keepdim=True) for name in _some(plans, groups)}
    return _maps({name: plan.numpy(force=True).T for name, plan in spread.items()}, list(spread), "share")


@view(RotationMatching, "plot")
def plot_rotations(matching: RotationMatching, groups: Sequence[str] | None = None) -> go.Figure:
    """Draw for some groups the sizes of the entries of the orthogonal matrix by which B's units were mixed.

    Args:
        groups: which (default: the first three).

    Raises:
        InputError: a group that there is not.
    """
    shown = _some(matching.matrices, groups)
    titles = [f"{name}, {'rotated' if name in matching.rotated else 'permuted'}" for name in shown]
    return _maps({name: matching.matrices[name].abs().numpy(force=True) for name in shown}, titles, "size")


def _some(known: Mapping[str, object], groups: Sequence[str] | None) -> list[str]:
    if groups is None:
        return list(known)[:FEW]
    for name in groups:
        if name not in known:
            raise InputError(f"groups: no group {name!r}; there are {', '.join(known)}")
    return list(groups)


def _maps(matrices: Mapping[str, np.ndarray], titles: Iterable[str], what: str) -> go.Figure:
    """A map of each matrix, rows for A's units and columns for B's; 0 is light, 1 is dark."""
    fig = _panels(list(titles), "B's unit", "A's unit")
    for column, matrix in enumerate(matrices.values(), start=1):
        heat = go.Heatmap(z=matrix, colorscale=SCALE, zmin=0.0, zmax=1.0, showscale=column == len(matrices))
        heat.update(colorbar={"thickness": 12, "outlinewidth": 0, "title": {"text": what}})
        heat.update(hovertemplate=f"A's %{{y}}, B's %{{x}}: {what} %{{z:.3f}}<extra></extra>")
        fig.add_trace(heat, row=1, col=column)
        fig.update_yaxes(autorange="reversed", col=column)
    return fig


def _panels(titles: list[str], across: str, down: str) -> go.Figure:
    """Square panels in a row."""
    fig = styled(make_subplots(1, max(1, len(titles)), subplot_titles=titles, horizontal_spacing=0.08), height=400)
    for column in range(1, len(titles) + 1):
        anchor = "x" if column == 1 else f"x{column}"
        fig.update_xaxes(title_text=across, showgrid=False, constrain="domain", col=column)
        fig.update_yaxes(showgrid=False, scaleanchor=anchor, constrain="domain", col=column)
    fig.update_yaxes(title_text=down, col=1)
    return fig.update_layout(hovermode="closest", margin={"t": 50})
