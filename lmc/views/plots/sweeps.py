"""Many runs at once: what came of the cells of a sweep, and barriers between every two networks."""

import plotly.graph_objects as go

from lmc.core.results import view
from lmc.core.sweep import Sweep
from lmc.errors import InputError
from lmc.landscape.pairs import PairwiseBarriers
from lmc.views.plots.style import BLUE, SCALE, colours, dashes, figure


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
