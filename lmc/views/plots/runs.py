"""Plots of runs: their telescoping account, barriers layer by layer, decisions that models do not share; and of many at once
what came of the cells of a sweep, and barriers between every two networks."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.core.results import view
from lmc.core.sweep import Sweep
from lmc.errors import InputError
from lmc.landscape.layerwise import LayerwiseBarriers
from lmc.landscape.multiplicity import Multiplicity
from lmc.landscape.pairs import PairwiseBarriers
from lmc.landscape.telescoping import Telescope
from lmc.training.intrinsic import IntrinsicDimension
from lmc.views.plots.style import BLACK, BLUE, GREY, ORANGE, SCALE, colours, dashes, figure, styled


@view(Telescope, "plot")
def plot_telescope(telescope: Telescope) -> go.Figure:
    """Draw the error of the first-order account after each step, and beside it how much of the change each layer makes."""
    titles = ["off by, on average", "moved by each layer, to first order"]
    fig = styled(make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12), height=400)
    steps = np.arange(1, len(telescope.errors))
    for name, errors, colour, dash in (
        ("linearised at the start", telescope.linear, GREY, "dash"),
        ("step by step", telescope.errors, BLACK, "solid"),
    ):
        line = go.Scatter(x=steps, y=np.maximum(errors[1:], 1e-16), name=name, line={"color": colour, "dash": dash})
        fig.add_trace(line.update(hovertemplate="%{y:.2e}"), row=1, col=1)
    tints, lines = colours(list(telescope.sizes)), dashes(list(telescope.sizes))
    for layer, colour in tints.items():
        line = go.Scatter(x=steps, y=np.cumsum(telescope.sizes[layer]), name=layer or "model")
        line.update(line={"color": colour, "dash": lines[layer]})
        fig.add_trace(line.update(hovertemplate="%{y:.3g}"), row=1, col=2)
    fig.update_yaxes(type="log", exponentformat="power", dtick=1, row=1, col=1).update_yaxes(
        rangemode="tozero", row=1, col=2
    )
    return fig.update_xaxes(title_text="step").update_layout(margin={"t": 50})


@view(LayerwiseBarriers, "plot")
def plot_layerwise(found: LayerwiseBarriers) -> go.Figure:
    """Draw the barrier of each layer inside a and inside b, and that of all layers as a line."""
    fig = figure()
    for name, values, colour in (("others of a", found.from_a, BLUE), ("others of b", found.from_b, ORANGE)):
        fig.add_trace(go.Bar(x=found.layers, y=values, name=name, marker_color=colour, hovertemplate="%{y:.3f}"))
    ends = [found.layers[0], found.layers[-1]]
    line = go.Scatter(x=ends, y=[found.full, found.full], mode="lines", name="all layers of both")
    fig.add_trace(line.update(line={"color": BLACK, "dash": "dash"}, hovertemplate="%{y:.3f}"))
    fig.update_xaxes(
        type="category", title_text=f"layers, joining: {found.cumulative}" if found.cumulative else "layer"
    )
    return fig.update_yaxes(title_text=f"barrier ({found.unit}, {found.split})")


@view(Multiplicity, "plot")
def plot_multiplicity(found: Multiplicity) -> go.Figure:
    """Draw the churn between every two models, and beside it how many examples have how high a capacity."""
    titles = ["decisions that differ (%)", "examples by capacity"]
    fig = styled(make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.27), height=400)
    heat = go.Heatmap(z=100 * found.churn, x=found.names, y=found.names, colorscale=SCALE, zmin=0.0, hoverongaps=False)
    heat.update(hovertemplate="%{y}, %{x}: %{z:.1f} %<extra></extra>", colorbar={"x": 0.37, "thickness": 12})
    fig.add_trace(heat, row=1, col=1)
    bars = go.Histogram(x=found.capacity, nbinsx=30, marker_color=BLUE, showlegend=False)
    fig.add_trace(bars.update(hovertemplate="%{x}: %{y} examples<extra></extra>"), row=1, col=2)
    fig.update_xaxes(type="category", showgrid=False, row=1, col=1)
    fig.update_yaxes(type="category", showgrid=False, autorange="reversed", row=1, col=1)
    fig.update_xaxes(title_text="models that an example tells apart", row=1, col=2)
    fig.update_yaxes(type="log", dtick=1, title_text="examples", row=1, col=2)
    return fig.update_layout(hovermode="closest", margin={"t": 50})


@view(IntrinsicDimension, "plot")
def plot_intrinsic(found: IntrinsicDimension) -> go.Figure:
    """Draw the accuracy over the dimension of the subspace, with the share of the baseline that counts as solved."""
    fig = figure()
    mean, spread = found.accuracies.mean(1), found.accuracies.std(1)
    line = go.Scatter(x=found.dimensions, y=mean, error_y={"array": spread}, mode="lines+markers", showlegend=False)
    fig.add_trace(line.update(line={"color": BLUE, "width": 3}, hovertemplate="%{y:.3f}"))
    fig.add_hline(
        y=found.share * found.baseline,
        line={"color": GREY, "dash": "dash"},
        annotation={"text": f"{found.share:.0%} of the baseline", "x": 0.01, "xanchor": "left", "yanchor": "bottom"},
    )
    if found.value is not None:
        fig.add_vline(x=found.value, line={"color": ORANGE, "dash": "dot"})
        # on an axis of logarithms a note, other than a line, is placed by the logarithm
        place = {"x": np.log10(found.value), "y": 1.0, "yref": "y domain", "xanchor": "left", "yanchor": "top"}
        fig.add_annotation(text=f"{found.value}", showarrow=False, **place)
    fig.update_xaxes(type="log", tickvals=found.dimensions, title_text="dimension of the subspace")
    return fig.update_yaxes(title_text="test accuracy")


@view(Sweep, "plot")
def plot_sweep(sweep: Sweep, y: str | None = None, *, x: str | None = None, by: str | None = None) -> go.Figure:
    """Draw a value over a parameter: a point for each cell, and the line through the means of those that share both.

    Args:
        y: a value (default: the first that is a number).
        x: a parameter of the grid (default: the first with several numbers other than "seed").
        by: a further parameter, whose values are told apart by colour (default: the next with several values, if any).

    Raises:
        InputError: a name that there is not, or no cell with a number.
    """
    cells = [cell for cell in sweep.cells if not cell.error]
    numbers = [name for cell in cells[:1] for name, value in cell.values.items() if isinstance(value, int | float)]
    y = y or next(iter(numbers), None)
    if y not in numbers:
        raise InputError(f"y={y!r}; the finished cells have the numbers {', '.join(numbers) or 'none'}")
    several = [name for name, values in sweep.grid.items() if len(values) > 1 and name != "seed"] or list(sweep.grid)
    numeric = [name for name in several if all(isinstance(value, int | float) for value in sweep.grid[name])]
    x = x or (numeric or several)[0]
    by = by or next((name for name in several if name != x), None)
    for name in filter(None, (x, by)):
        if name not in sweep.grid:
            raise InputError(f"{name!r} is no parameter; the grid has {', '.join(sweep.grid)}")
    kinds = sweep.grid[by] if by else [None]
    tints = colours([str(kind) for kind in kinds]) if by else {"None": BLUE}
    lines = dashes(list(tints))
    fig = figure()
    for kind in kinds:
        groups: dict[str, list[float]] = {}
        places = {str(place): place for place in sweep.grid[x]}
        for cell in cells:
            if by is None or cell.parameters[by] == kind:
                groups.setdefault(str(cell.parameters[x]), []).append(cell.values[y])
        at = [place for place in places if place in groups]
        style = {"color": tints[str(kind)]}
        name = f"{by} {kind}" if by else y
        points = [(places[place], value) for place in at for value in groups[place]]
        dots = go.Scatter(x=[p for p, _ in points], y=[v for _, v in points], mode="markers", legendgroup=name)
        fig.add_trace(
            dots.update(
                name=name, showlegend=False, marker={**style, "opacity": 0.45}, hovertemplate="%{y:.4g}<extra></extra>"
            )
        )
        means = [sum(groups[place]) / len(groups[place]) for place in at]
        line = go.Scatter(x=[places[place] for place in at], y=means, mode="lines", name=name, legendgroup=name)
        fig.add_trace(
            line.update(
                showlegend=by is not None,
                line={**style, "dash": lines[str(kind)], "width": 3},
                hovertemplate="mean %{y:.4g}<extra></extra>",
            )
        )
    fig.update_xaxes(title_text=x, type=None if x in numeric else "category")
    fig.update_yaxes(title_text=y)
    return fig.update_layout(hovermode="closest")


@view(PairwiseBarriers, "plot")
def plot_pairs(pairs: PairwiseBarriers, measure: str = "loss") -> go.Figure:
    """Draw the barriers of all pairs as a map, in an order that brings networks of one basin together.

    Args:
        measure: "loss" or "error" (percentage points).

    Raises:
        InputError: another measure.
    """
    if measure not in ("loss", "error"):
        raise InputError(f"measure={measure!r}; expected 'loss' or 'error'")
    order = list(pairs.order)
    values = (pairs.barriers if measure == "loss" else pairs.error_barriers)[order][:, order]
    unit = pairs.unit if measure == "loss" else "points"
    names = [pairs.names[i] for i in order]
    fig = figure(width=620, height=560)
    heat = go.Heatmap(z=values, x=names, y=names, colorscale=SCALE, zmin=0.0, hoverongaps=False)
    heat.update(colorbar={"title": {"text": unit}, "thickness": 14, "outlinewidth": 0})
    fig.add_trace(heat.update(hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>"))
    fig.update_xaxes(
        type="category", showgrid=False, constrain="domain", title_text=f"{measure} barrier, {pairs.split}"
    )
    fig.update_yaxes(type="category", showgrid=False, constrain="domain", autorange="reversed", scaleanchor="x")
    return fig.update_layout(hovermode="closest")
