"""One look for all figures: the colours of `lmc.views.legend`, and a small plotly template."""

import plotly.graph_objects as go

from lmc.views.legend import (
    BLACK,
    BLUE,
    COLOURS,
    CYCLE,
    GOLD,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PURPLE,
    SCALE,
    SKY,
    colours,
    dashes,
)  # fmt: skip

__all__ = [
    "BLACK", "BLUE", "COLOURS", "CYCLE", "FONT", "GOLD", "GREEN", "GREY", "GRID", "ORANGE", "PURPLE", "SCALE",
    "SKY", "TEMPLATE", "colours", "dashes", "figure", "styled",
]  # fmt: skip

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


def figure(width: int | None = None, height: int = 420) -> go.Figure:
    """An empty figure in this style."""
    return styled(go.Figure(), width, height)


def styled(fig: go.Figure, width: int | None = None, height: int = 420) -> go.Figure:
    """`fig`, with this style in place of plotly's own template (which adds 7 kB to every stored figure)."""
    return fig.update_layout(template=TEMPLATE, width=width, height=height)
