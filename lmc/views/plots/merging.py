"""Models before they are merged, methods of merging side by side, and networks zipped into one."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.merge.partial.widening import Zipped
from lmc.merge.study.compare import MergeComparison
from lmc.merge.study.inspect import Inspection, mean_cosine
from lmc.views.plots.style import BLUE, GREEN, GREY, ORANGE, SCALE, SKY, colours, figure, styled

MOST_NAMED, LONGEST = 10, 16  # names of layers under an axis, and their letters
# From opposite to alike, white in the middle.
DIVERGING = ((0.0, "#D55E00"), (0.5, "#FFFFFF"), (1.0, "#0072B2"))


@view(Inspection, "plot")
def plot_inspection(inspection: Inspection) -> go.Figure:
    """Draw cosines between models, barriers if they were measured, and by layer norms and agreement."""
    what = "task vectors" if inspection.based else "weights"
    titles = [f"cosine of {what}", *(["barrier (nats)"] if inspection.barriers is not None else [])]
    by_layer = [
        "norm" + (" relative to the base" if inspection.based else ""),
        "sign conflict" if inspection.based else "mean cosine",
    ]
    top, bottom = [{"colspan": 2 // len(titles)}, None if len(titles) == 1 else {}], [{}, {}]
    fig = make_subplots(2, 2, specs=[top, bottom], subplot_titles=[*titles, *by_layer], vertical_spacing=0.2)
    names = list(inspection.names)
    fig.add_trace(_matrix(names, inspection.matrices.cosines, DIVERGING, (-1.0, 1.0)), row=1, col=1)
    if inspection.barriers is not None:
        high = max(float(inspection.barriers.max()), 1e-3)
        fig.add_trace(_matrix(names, inspection.barriers, SCALE, (0.0, high)), row=1, col=2)
    _add_layers(fig, inspection)
    fig.update_xaxes(type="category")  # names of models and layers may be numbers
    fig.update_yaxes(type="category", autorange="reversed", row=1)
    fig.update_yaxes(rangemode="tozero", row=2)
    step = -(-len(inspection.layers) // MOST_NAMED)
    named = [_layer(layer.name) for layer in inspection.layers][::step]
    fig.update_xaxes(tickvals=named, ticktext=[_short(name) for name in named], tickangle=-45, row=2)
    # Slanted names of layers take room that a legend below would cover.
    return styled(fig, height=720).update_layout(hovermode="closest", legend={"y": 1.07, "yanchor": "bottom"})


def _layer(name: str) -> str:
    return name or "(top)"


def _short(name: str) -> str:
    """The end of a long name, which tells it from its neighbours."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _matrix(names: list[str], values: np.ndarray, scale, limits: tuple[float, float]) -> go.Heatmap:
    return go.Heatmap(
        x=names, y=names, z=values, colorscale=scale, zmin=limits[0], zmax=limits[1], showscale=False,
        texttemplate="%{z:.2f}", hovertemplate="%{y} and %{x}: %{z:.4f}<extra></extra>", xgap=1, ygap=1,
    )  # fmt: skip


def _add_layers(fig: go.Figure, inspection: Inspection) -> None:
    layers = [_layer(layer.name) for layer in inspection.layers]
    unit = np.array([layer.base_norm if inspection.based and layer.base_norm else 1.0 for layer in inspection.layers])
    palette = colours(list(inspection.names))
    for i, name in enumerate(inspection.names):
        norms = np.array([layer.norms[i] for layer in inspection.layers]) / unit
        line = go.Scatter(x=layers, y=norms, name=name, mode="lines+markers", line={"color": palette[name]})
        fig.add_trace(line, row=2, col=1)
    agreement = [layer.conflict if inspection.based else mean_cosine(layer.cosines) for layer in inspection.layers]
    fig.add_trace(go.Bar(x=layers, y=agreement, marker={"color": GREY}, showlegend=False), row=2, col=2)


@view(MergeComparison, "plot")
def plot_merges(comparison: MergeComparison) -> go.Figure:
    """Draw a row for each method, best on top: validation and held-out scores, and the single tasks small behind them."""
    entries = [entry for entry in comparison.entries if not entry.note]
    methods = [entry.method for entry in entries]
    sign, unit = (100.0, "%") if comparison.metric == "accuracy" else (1.0, comparison.unit)
    fig = go.Figure()
    if any(len(entry.tasks) > 1 for entry in entries):
        dots = [(entry.method, task, sign * score) for entry in entries for task, score in entry.tasks.items()]
        places, tasks, scores = zip(*dots, strict=True)
        points = go.Scatter(x=scores, y=places, text=tasks, mode="markers", name="held-out, each task")
        points.update(marker={"color": SKY, "size": 7}, hovertemplate="%{text}: %{x:.4g}<extra></extra>")
        fig.add_trace(points)
    marks = [
        (
            "validation",
            [entry.validation for entry in entries],
            {"color": ORANGE, "symbol": "line-ns-open", "size": 16},
        ),
        ("held-out", [entry.test for entry in entries], {"color": BLUE, "size": 13}),
    ]
    for name, values, marker in marks:
        if not np.isnan(values).all():
            scores = [sign * value for value in values]
            points = go.Scatter(x=scores, y=methods, mode="markers", name=name, marker=marker)
            fig.add_trace(points.update(hovertemplate="%{y}: %{x:.4g}"))
    fig.update_xaxes(title_text=f"{comparison.metric} ({unit})" if unit else comparison.metric)
    fig.update_yaxes(type="category", autorange="reversed")
    return styled(fig, height=170 + 26 * len(methods)).update_layout(
        hovermode="closest", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )


@view(Zipped, "plot")
def plot_zipped(zipped: Zipped) -> go.Figure:
    """Draw for each group how many units were made of both networks' units, and how many stand for A's or B's alone."""
    groups = list(zipped.units)
    fig = figure(height=170 + 30 * max(2, len(groups)))
    counts = [units.counts for units in zipped.units.values()]
    for i, (name, colour) in enumerate((("of both", GREEN), ("of A", BLUE), ("of B", ORANGE))):
        bar = go.Bar(x=[count[i] for count in counts], y=groups, name=name, orientation="h", marker={"color": colour})
        fig.add_trace(bar.update(hovertemplate=f"%{{y}}: %{{x}} {name}<extra></extra>"))
    fig.update_xaxes(title_text="units")
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    stored, used = zipped.parameters
    title = f"{used:.2f} times the parameters of one network" + (f" ({stored:.2f} stored)" if stored != used else "")
    return fig.update_layout(
        barmode="stack",
        hovermode="closest",
        legend={"traceorder": "normal"},
        title={"text": title, "font": {"size": 15}},
        margin={"t": 56},
        bargap=0.35,
    )
