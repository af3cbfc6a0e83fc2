"""Models before they are merged, methods of merging and soups side by side, averages along a run, and networks zipped into
one."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.errors import InputError
from lmc.merge.disk.extract import Extraction
from lmc.merge.partial.growth import Zipped
from lmc.merge.study.compare import MergeComparison
from lmc.merge.study.inspect import Inspection, mean_cosine
from lmc.merge.study.robust_line import WiseLine
from lmc.merge.study.trajectory import TrajectoryAverages
from lmc.merge.with_data.compare_soups import Soups
from lmc.views.legend import measure_title
from lmc.views.plots.style import BLACK, BLUE, CYCLE, GREEN, GREY, ORANGE, SCALE, SKY, colours, dashes, figure, styled

MOST_NAMED, LONGEST = 10, 16  # names of layers under an axis, and their letters
# From opposite to alike, white in the middle.
DIVERGING = ((0.0, "#D55E00"), (0.5, "#FFFFFF"), (1.0, "#0072B2"))


@view(Inspection, "plot")
def plot_inspection(inspection: Inspection) -> go.Figure:
    """Draw cosines between models, barriers if they were measured, and by layer norms and agreement."""
    what = "task vectors" if inspection.based else "weights"
    titles = [
        f"cosine of {what}",
        *([measure_title("barrier", inspection.unit)] if inspection.barriers is not None else []),
    ]
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
    palette, lines = colours(list(inspection.names)), dashes(list(inspection.names))
    for i, name in enumerate(inspection.names):
        norms = np.array([layer.norms[i] for layer in inspection.layers]) / unit
        line = go.Scatter(x=layers, y=norms, name=name, mode="lines+markers")
        line.update(line={"color": palette[name], "dash": lines[name]})
        fig.add_trace(line, row=2, col=1)
    agreement = [layer.conflict if inspection.based else mean_cosine(layer.cosines) for layer in inspection.layers]
    fig.add_trace(go.Bar(x=layers, y=agreement, marker={"color": GREY}, showlegend=False), row=2, col=2)


@view(Extraction, "plot")
def plot_extraction(extraction: Extraction) -> go.Figure:
    """Draw what is lost of each weight, in the order of the model."""
    fig = figure()
    names = [_layer(name) for name in extraction.names]
    fig.add_trace(go.Bar(x=names, y=list(extraction.errors), marker={"color": GREY}, showlegend=False))
    step = max(1, -(-len(names) // MOST_NAMED))
    fig.update_xaxes(
        type="category", tickvals=names[::step], ticktext=[_short(n) for n in names[::step]], tickangle=-45
    )
    return fig.update_yaxes(title="relative error", range=[0, 1])


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


@view(Soups, "plot")
def plot_soups(soups: Soups) -> go.Figure:
    """Draw the share of each model in each soup, and beside it the loss of the soups and of the best model."""
    kinds = [soup for soup in soups.scores if soup in soups.weights]
    fig = styled(make_subplots(1, 2, horizontal_spacing=0.22), height=160 + 44 * max(len(soups.ingredients), 4))
    names = [row.name for row in soups.ingredients]
    shares = [[row.shares[soup] for soup in kinds] for row in soups.ingredients]
    heat = go.Heatmap(x=kinds, y=names, z=shares, colorscale=SCALE, zmin=0.0, text=shares, texttemplate="%{text:.2f}")
    heat.update(showscale=False, xgap=2, ygap=2, hovertemplate="%{y} in the %{x} soup: %{z:.3f}<extra></extra>")
    fig.add_trace(heat, row=1, col=1)
    fig.update_yaxes(autorange="reversed", showgrid=False, col=1)
    fig.update_xaxes(showgrid=False, ticktext=[soup.replace(" ", "<br>", 1) for soup in kinds], tickvals=kinds, col=1)
    order = list(soups.scores)
    for split, colour in (("test", BLUE), ("validation", ORANGE)):
        if split not in soups.scores[order[0]]:
            continue
        losses = [soups.scores[soup][split]["loss"] for soup in order]
        symbol = "circle" if split == "test" else "diamond-open"
        marker = {"size": 13, "color": colour, "symbol": symbol, "line": {"width": 2.5}}
        dots = go.Scatter(x=losses, y=order, mode="markers", name=split, marker=marker)
        fig.add_trace(dots.update(hovertemplate="%{y}: %{x:.4f}"), row=1, col=2)
    fig.update_yaxes(autorange="reversed", col=2).update_xaxes(title_text=measure_title("loss", soups.unit), col=2)
    return fig.update_layout(hovermode="closest")


@view(TrajectoryAverages, "plot")
def plot_trajectory(averages: TrajectoryAverages, split: str | None = None) -> go.Figure:
    """Draw loss (logarithmic) and, for classifications, accuracy of the checkpoints and of their averages over the run.

    Raises:
        InputError: a split that these averages lack.
    """
    split = averages.split if split is None else split
    if split not in averages.values["checkpoint"]:
        raise InputError(f"split={split!r}; these averages have {', '.join(averages.values['checkpoint'])}")
    panels = ["loss", *(["accuracy"] if "accuracy" in averages.values["checkpoint"][split] else [])]
    fig = styled(make_subplots(1, len(panels), horizontal_spacing=0.11), height=420)
    tints = {"checkpoint": GREY, **dict(zip(("SWA", "LAWA", "EMA"), CYCLE, strict=False))}
    lines = {"checkpoint": "dot", **dashes(["SWA", "LAWA", "EMA"])}
    for column, panel in enumerate(panels, start=1):
        for name, splits in averages.values.items():
            heights = splits[split][panel] * (100.0 if panel == "accuracy" else 1.0)
            line = {"color": tints[name], "width": 2 if name == "checkpoint" else 3}
            line["dash"] = lines[name]
            trace = go.Scatter(
                x=averages.steps, y=heights, mode="lines+markers", name=name, line=line, legendgroup=name
            )
            trace.update(showlegend=column == 1, hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>")
            fig.add_trace(trace, row=1, col=column)
        title = f"{split} {measure_title(panel, averages.unit)}"
        fig.update_yaxes(title_text=title, type="log" if panel == "loss" else "linear", col=column)
        fig.update_xaxes(title_text="checkpoint", col=column)
    return fig


@view(WiseLine, "plot")
def plot_wise_line(line: WiseLine) -> go.Figure:
    """Draw accuracy on the shifts over accuracy on the reference, a point for each alpha; the mean of the shifts thick."""
    fig = styled(go.Figure(), height=460)
    reference = 100.0 * line.accuracies[line.reference]
    shifts = [name for name in line.paths if name != line.reference]
    tints, lines = colours(shifts), dashes(shifts)
    text = [f"alpha {alpha:.2g}" for alpha in line.alphas]
    curves = [(name, line.accuracies[name], {"color": tints[name], "dash": lines[name], "width": 2}) for name in shifts]
    if len(shifts) > 1:
        curves.append(("mean of the shifts", line.shifted, {"color": BLACK, "width": 4}))
    for name, values, look in curves:
        trace = go.Scatter(x=reference, y=100.0 * values, mode="lines+markers", name=name, text=text)
        trace.update(line=look, marker={"size": 6 + look["width"]})
        fig.add_trace(trace.update(hovertemplate="%{text}: %{x:.1f} %, %{y:.1f} %"))
    for alpha, label in ((0.0, "base"), (1.0, "tuned")):
        at = int(abs(line.alphas - alpha).argmin())
        fig.add_annotation(
            x=reference[at], y=100.0 * line.shifted[at], text=f"<b>{label}</b>", showarrow=False, yshift=16
        )
    fig.update_xaxes(title_text=f"accuracy on {line.reference} (%)")
    return fig.update_yaxes(title_text="accuracy on the shifts (%)").update_layout(hovermode="closest")
