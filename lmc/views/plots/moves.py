"""Permutations, rotations and couplings as pictures: which unit of B stands where."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.align.many import Matchings
from lmc.align.rotations.matching import RotationMatching
from lmc.align.transport.fusion import Fusion
from lmc.core.results import view
from lmc.errors import InputError
from lmc.symmetry.spec import Permutation
from lmc.views.plots.style import BLUE, SCALE, figure, styled

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
