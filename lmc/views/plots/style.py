"""One look for all figures: colours that colour-blind readers tell apart, and a small plotly template.

The colours are those of Okabe and Ito (2008, "Color Universal Design"), darkened where they must stand on white.
"""

import plotly.graph_objects as go

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#AA4499"
SKY = "#56B4E9"
GOLD = "#B58900"
BLACK = "#222222"
GREY = "#777777"
GRID = "#E4E4E4"

# What a thing is called decides its colour, in every figure and widget; other names take the next free colour.
COLOURS = {"naive": ORANGE, "aligned": BLUE, "path": BLUE, "repaired": GREEN, "curve": PURPLE}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, GOLD, BLACK)
DASHES = {"test": "solid", "data": "solid", "train": "dot"}
# From nothing to much; light is low, so that it prints and projects well.
SCALE = ((0.0, "#F7FBFF"), (0.25, "#C6DBEF"), (0.5, "#6BAED6"), (0.75, "#2171B5"), (1.0, "#08306B"))

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_AXIS = {
    "showgrid": True,
    "gridcolor": GRID,
    "zeroline": False,
    "showline": True,
    "linecolor": GREY,
    "ticks": "outside",
    "tickcolor": GREY,
    "title": {"standoff": 8},
    "automargin": True,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 14, "color": BLACK},
        "colorway": CYCLE,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top"},
        "margin": {"l": 60, "r": 20, "t": 30, "b": 60},
        "hovermode": "x unified",
        "hoverlabel": {"font": {"size": 13}},
        "colorscale": {"sequential": SCALE},
        "title": {"x": 0, "xanchor": "left", "font": {"size": 17}},
    }
)


def colours(names: list[str]) -> dict[str, str]:
    """A colour for each name: its own where it has one, else the next of the cycle that is not taken."""
    chosen = {name: COLOURS[name] for name in names if name in COLOURS}
    if len(set(chosen.values())) < len(chosen):  # "path" beside "aligned"
        chosen.pop("path", None)
    free = [colour for colour in CYCLE if colour not in chosen.values()]
    for name in names:
        if name not in chosen:
            chosen[name] = free.pop(0) if free else GREY
    return chosen


def figure(width: int | None = None, height: int = 420) -> go.Figure:
    """An empty figure in this style."""
    return styled(go.Figure(), width, height)


def styled(fig: go.Figure, width: int | None = None, height: int = 420) -> go.Figure:
    """`fig`, with this style in place of plotly's own template (which adds 7 kB to every stored figure)."""
    return fig.update_layout(template=TEMPLATE, width=width, height=height)
