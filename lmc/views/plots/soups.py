"""Soups and their ingredients, averages along a run, and the line of WiSE-FT."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.errors import InputError
from lmc.merge.study.trajectory import TrajectoryAverages
from lmc.merge.with_data.compare_soups import Soups
from lmc.merge.with_training.robust_line import WiseLine
from lmc.views.plots.style import BLACK, BLUE, CYCLE, GREY, ORANGE, SCALE, colours, styled


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
    fig.update_yaxes(autorange="reversed", col=2).update_xaxes(title_text="loss (nats)", col=2)
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
    for column, panel in enumerate(panels, start=1):
        for name, splits in averages.values.items():
            heights = splits[split][panel] * (100.0 if panel == "accuracy" else 1.0)
            line = {"color": tints[name], "width": 2 if name == "checkpoint" else 3}
            line["dash"] = "dot" if name == "checkpoint" else "solid"
            trace = go.Scatter(
                x=averages.steps, y=heights, mode="lines+markers", name=name, line=line, legendgroup=name
            )
            trace.update(showlegend=column == 1, hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>")
            fig.add_trace(trace, row=1, col=column)
        title = f"{split} loss (nats)" if panel == "loss" else f"{split} accuracy (%)"
        fig.update_yaxes(title_text=title, type="log" if panel == "loss" else "linear", col=column)
        fig.update_xaxes(title_text="checkpoint", col=column)
    return fig


@view(WiseLine, "plot")
def plot_wise_line(line: WiseLine) -> go.Figure:
    """Draw accuracy on the shifts over accuracy on the reference, a point for each alpha; the mean of the shifts thick."""
    fig = styled(go.Figure(), height=460)
    reference = 100.0 * line.accuracies[line.reference]
    shifts = [name for name in line.paths if name != line.reference]
    tints = colours(shifts)
    text = [f"alpha {alpha:.2g}" for alpha in line.alphas]
    curves = [(name, line.accuracies[name], tints[name], 2) for name in shifts]
    if len(shifts) > 1:
        curves.append(("mean of the shifts", line.shifted, BLACK, 4))
    for name, values, colour, width in curves:
        trace = go.Scatter(x=reference, y=100.0 * values, mode="lines+markers", name=name, text=text)
        trace.update(line={"color": colour, "width": width}, marker={"size": 6 + width})
        fig.add_trace(trace.update(hovertemplate="%{text}: %{x:.1f} %, %{y:.1f} %"))
    for alpha, label in ((0.0, "base"), (1.0, "tuned")):
        at = int(abs(line.alphas - alpha).argmin())
        fig.add_annotation(
            x=reference[at], y=100.0 * line.shifted[at], text=f"<b>{label}</b>", showarrow=False, yshift=16
        )
    fig.update_xaxes(title_text=f"accuracy on {line.reference} (%)")
    return fig.update_yaxes(title_text="accuracy on the shifts (%)").update_layout(hovermode="closest")
