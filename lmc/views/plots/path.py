"""Ways between two networks: straight lines, curves, and the lines of a star model."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmc.align.connecting.result import Connection
from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.curves.curve import Curve
from lmc.landscape.curves.geodesic import Geodesic
from lmc.landscape.curves.low_loss import LowLossPath
from lmc.landscape.path import Barrier, Path
from lmc.merge.with_training.star import Star, StarPaths
from lmc.views.legend import labelled_paths, measure_title
from lmc.views.plots.style import BLACK, BLUE, COLOURS, GREEN, GREY, ORANGE, colours, dashes, figure, styled
from lmc.weights.arithmetic import distance

_KINDS = {
    "regular": (ORANGE, "between two solutions"),
    "source": (BLUE, "centre to its sources"),
    "held out": (GREEN, "centre to held-out solutions"),
}


@view(Path, "plot")
def plot(path: Path, label: str | None = None, **others: Path) -> go.Figure:
    """Draw loss and (for classifications) accuracy over alpha: `aligned.plot(naive=naive)` draws both paths.

    Colours and dashes stand for paths. The split that barriers are taken on is thick, with its points, others are thin and
    dotted. An arrow stands for the barrier: from the straight line between the ends to the curve, where their difference is
    largest.

    Args:
        label: what the path is called (default: "aligned" beside a path called "naive", else "path").
        others: further paths, by name.

    Raises:
        InputError: two paths of one name.
    """
    paths = labelled_paths(path, label, others)
    shown = list(paths.values())
    panels = ["loss", *(["accuracy"] if all(path.accuracies for path in shown) else [])]
    fig = styled(make_subplots(1, len(panels), horizontal_spacing=0.11), height=430)
    tints, lines = colours(list(paths)), dashes(list(paths))
    for column, panel in enumerate(panels, start=1):
        for name, path in paths.items():
            _curves(fig, name, path, panel, {"color": tints[name], "dash": lines[name]}, column)
        _barriers(fig, paths, panel, tints, column)
        fig.update_xaxes(title_text="α, from A (0) to B (1)", col=column)
        fig.update_yaxes(
            title_text=measure_title(panel, path.unit), rangemode="tozero" if panel == "loss" else "normal", col=column
        )
    _split_legend(fig, shown)
    return fig


@view(Connection, "plot")
def plot_connection(connection: Connection) -> go.Figure:
    """Draw loss and accuracy on the way between the two networks, as they are and connected."""
    return plot(connection.path, "connected", naive=connection.naive)


def _found(path: Path, panel: str) -> Barrier | None:
    """The barrier of a panel; None where an end is not finite."""
    try:
        return path.barrier_of("loss" if panel == "loss" else "error")
    except InputError:
        return None


def _curves(fig: go.Figure, name: str, path: Path, panel: str, line: dict[str, str], column: int) -> None:
    found = _found(path, panel) if panel == "loss" else None
    for split, measures in path.values.items():
        heights = measures[panel] * (100.0 if panel == "accuracy" else 1.0)
        known = ~np.isnan(heights)
        main = split == path.split
        trace = go.Scatter(
            x=path.alphas[known],
            y=heights[known],
            mode="lines+markers" if main else "lines",
            name=name if found is None else f"{name}: barrier {found.value:.3f} {path.unit}".rstrip(),
            legendgroup=name,
            showlegend=main and column == 1,
            line={**line, "width": 3} if main else {**line, **_thin(path, split)},
            marker={"size": 5},
            hovertemplate=f"{name}, {split}: %{{y:.3g}}<extra></extra>",
        )
        fig.add_trace(trace, row=1, col=column)


def _barriers(fig: go.Figure, paths: dict[str, Path], panel: str, tints: dict[str, str], column: int) -> None:
    """Arrows from the baseline up to the loss (down to the accuracy) where barriers are attained, the shortest on top; and
    their heights, of which the shortest has the fewest places beside it and is the first to choose."""
    labels = _Labels(list(paths.values()), panel)
    found = {name: barrier for name, path in paths.items() if (barrier := _found(path, panel)) is not None}
    # What is too short to be seen stands in the legend.
    rising = sorted((name for name in found if found[name].value >= 0.05 * labels.span), key=lambda n: found[n].value)
    for name in reversed(rising):
        base, top = _ends(found[name], panel)
        fig.add_annotation(
            {"x": found[name].alpha, "y": top, "ax": found[name].alpha, "ay": base},
            **{"axref": "x" if column == 1 else f"x{column}", "ayref": "y" if column == 1 else f"y{column}"},
            **{"arrowhead": 2, "arrowsize": 1.2, "arrowwidth": 1.8, "arrowcolor": tints[name], "showarrow": True},
            text="",
            row=1,
            col=column,
        )
    for name in rising:
        value, unit = found[name].value, paths[name].unit
        text = f"{value:.2f} {unit}".rstrip() if panel == "loss" else f"{value:.1f} points"
        place = labels.place(found[name].alpha, _ends(found[name], panel), len(text))
        if place is not None:
            (x, y), font = place, {"color": tints[name]}
            fig.add_annotation(x=x, y=y, text=text, font=font, showarrow=False, row=1, col=column)


def _ends(found: Barrier, panel: str) -> tuple[float, float]:
    """The beginning of the arrow of a barrier, and its head."""
    base = (1.0 - found.alpha) * found.start + found.alpha * found.end
    return (100.0 - base, 100.0 - base - found.value) if panel == "accuracy" else (base, base + found.value)


class _Labels:
    """Places for labels of one panel on which no curve and no arrow runs and no other label stands.

    The size of the panel in pixels is not known before it is shown; labels are taken to be large on a small one.
    """

    WIDTH, HEIGHT = (
        240.0,
        230.0,
    )  # pixels from the first alpha to the last, and of the panel, in the narrowest stored figure
    LETTER, LINE = 7.2, 18.0  # pixels of a letter across, of a line of text down
    CLEAR = np.array([4.0, 0.0])  # pixels across and down between a text and anything else; a line has air of its own
    NEAR = 40.0  # pixels above or below an arrow; what is further off seems to belong to something else

    def __init__(self, paths: list[Path], panel: str) -> None:
        scale = 100.0 if panel == "accuracy" else 1.0
        curves = [(path.alphas, scale * measures[panel]) for path in paths for measures in path.values.values()]
        known = np.concatenate([heights[np.isfinite(heights)] for _, heights in curves])
        known = known if len(known) else np.zeros(1)
        self.low = min(0.0, float(known.min())) if panel == "loss" else float(known.min())
        self.span = float(known.max()) - self.low or 1.0
        self.left = min(float(alphas[0]) for alphas, _ in curves)
        self.across = max(float(alphas[-1]) for alphas, _ in curves) - self.left
        points = np.linspace(self.left, self.left + self.across, 400)
        drawn = [np.interp(points, a[np.isfinite(h)], h[np.isfinite(h)]) for a, h in curves if np.isfinite(h).any()]
        self.taken = [self._pixels(points, heights) for heights in drawn]
        for found in filter(None, (_found(path, panel) for path in paths)):
            self.taken.append(self._pixels(np.full(100, found.alpha), np.linspace(*_ends(found, panel), 100)))

    def _pixels(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack([(x - self.left) / self.across * self.WIDTH, (y - self.low) / self.span * self.HEIGHT], axis=1)

    def place(self, x: float, ends: tuple[float, float], letters: int) -> tuple[float, float] | None:
        """The middle of a free place beside the arrow at x, as near to its middle as may be; None if there is none."""
        (px, tail), (_, head) = self._pixels(np.full(2, x), np.array(ends))
        py = 0.5 * (tail + head)
        half = np.array([0.5 * self.LETTER * letters, 0.5 * self.LINE])
        occupied = np.concatenate(self.taken) if self.taken else np.empty((0, 2))
        for step in range(1 + 2 * int((0.5 * abs(head - tail) + self.NEAR) // 4.0)):
            down = py + (-1.0) ** step * 4.0 * ((step + 1) // 2)
            for away in (sign * far for far in range(8, 129, 3) for sign in (1.0, -1.0)):
                middle = np.array([px + away + np.sign(away) * half[0], down])
                inside = (middle >= half).all() and (middle <= np.array([self.WIDTH, self.HEIGHT]) - half).all()
                if inside and not (np.abs(occupied - middle) < half + self.CLEAR).all(1).any():
                    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 9) * h for h in half)), axis=-1)
                    self.taken.append(middle + grid.reshape(-1, 2))  # its own box, for labels to come
                    across = self.left + middle[0] / self.WIDTH * self.across
                    return float(across), float(self.low + middle[1] / self.HEIGHT * self.span)
        return None


def _thin(path: Path, split: str) -> dict[str, str | float]:
    """The line of a split that no barrier is taken on: dots, in as many ways as there are such splits."""
    others = [name for name in path.values if name != path.split]
    return {"width": 2, "dash": ("dot", "2px,9px", "6px,9px")[others.index(split) % 3]}


def _split_legend(fig: go.Figure, paths: list[Path]) -> None:
    first = paths[0]
    if len(first.values) < 2:
        return
    for split in sorted(first.values):
        main = split == first.split
        line = {"color": BLACK, **({"width": 3} if main else _thin(first, split))}
        key = go.Scatter(x=[None], y=[None], mode="lines+markers" if main else "lines", line=line, marker={"size": 5})
        fig.add_trace(key.update(name=split, hoverinfo="skip"), row=1, col=1)


@view(Curve, "plot")
def plot_curve(curve: Curve) -> go.Figure:
    """Draw the way of the curve beside the straight line, and its training loss over the epochs.

    Across is the direction from a to b, up the direction in which the bends leave it most, both in distances of weights.
    """
    fig = styled(make_subplots(1, 2, horizontal_spacing=0.14), height=400)
    corners = _corners(curve)
    way = np.array([curve.shares(t) for t in np.linspace(0.0, 1.0, 101)]) @ corners
    for name, points, dash in (("naive", corners[[0, -1]], "dot"), ("curve", way, "solid")):
        line = {"color": COLOURS[name], "width": 3, "dash": dash}
        trace = go.Scatter(x=points[:, 0], y=points[:, 1], mode="lines", name=name, line=line, hoverinfo="name")
        fig.add_trace(trace.update(name="straight line" if name == "naive" else name), row=1, col=1)
    names = ["a", *(f"bend {i}" if len(corners) > 3 else "bend" for i in range(1, len(corners) - 1)), "b"]
    marker = {"size": 11, "color": "white", "line": {"color": BLACK, "width": 2}}
    dots = go.Scatter(x=corners[:, 0], y=corners[:, 1], mode="markers+text", text=names, textposition="top center")
    fig.add_trace(dots.update(marker=marker, showlegend=False, hoverinfo="text", cliponaxis=False), row=1, col=1)
    fig.update_xaxes(title_text="distance from a towards b", col=1)
    fig.update_yaxes(title_text="distance from the line", scaleanchor="x", col=1)
    _training(fig, curve.losses, 2, curve.unit)
    return fig.update_layout(hovermode="closest", margin={"t": 40})


@view(LowLossPath, "plot")
def plot_low_loss(found: LowLossPath) -> go.Figure:
    """Draw the training loss of every point, and between them, over how far it is from b, coloured by the layer that joined
    last; the dashed line is the loss sought."""
    fig = figure()
    left = np.array([1.0, *found.remaining, 0.0])
    middle = go.Scatter(x=0.5 * (left[:-1] + left[1:]), y=found.between, mode="markers", name="between two points")
    middle.update(marker={"color": GREY, "size": 6, "symbol": "x-thin-open"}, hovertemplate="%{y:.3f}")
    names = list(dict.fromkeys(found.stages))
    tints = colours(names)
    for name in names:
        at = np.array(found.stages) == name
        line = go.Scatter(x=found.remaining[at], y=found.losses[at], mode="lines+markers", name=f"{name} joined")
        fig.add_trace(line.update(line={"color": tints[name]}, marker={"size": 5}, hovertemplate="%{y:.3f}"))
    fig.add_trace(middle)
    fig.add_hline(y=found.threshold, line={"color": GREY, "dash": "dash"})
    fig.update_xaxes(title_text="distance to b (share of that of a)", autorange="reversed")
    return fig.update_yaxes(title_text="training loss", rangemode="tozero")


@view(Geodesic, "plot")
def plot_geodesic(found: Geodesic) -> go.Figure:
    """Draw by how much predictions change from each network to the next, on the straight line and now, and the energy over
    the epochs."""
    fig = styled(make_subplots(1, 2, horizontal_spacing=0.14), height=400)
    steps = np.arange(1, len(found.straight) + 1)
    for name, values, line in (
        ("straight line", found.straight, {"color": COLOURS["naive"], "dash": "dot", "width": 3}),
        ("geodesic", found.divergences, {"color": COLOURS["curve"], "width": 3}),
    ):
        trace = go.Scatter(x=steps, y=np.sqrt(8.0 * values), mode="lines+markers", name=name, line=line)
        fig.add_trace(trace.update(hovertemplate="%{y:.3g}"), row=1, col=1)
    fig.update_xaxes(title_text="step from a to b", tickformat="d", nticks=8, col=1)
    fig.update_yaxes(title_text="change of predictions, √(8 JSD)", rangemode="tozero", col=1)
    _training(fig, found.losses, 2, "nats", "energy")
    return fig.update_layout(margin={"t": 40})


@view(Star, "plot")
def plot_star(star: Star) -> go.Figure:
    """Draw the training loss over the epochs, the mean over random points of the lines; `paths` evaluates the lines."""
    fig = styled(make_subplots(1, 1), height=360)
    _training(fig, star.losses, 1, star.unit)
    return fig


@view(StarPaths, "plot")
def plot_star_paths(paths: StarPaths) -> go.Figure:
    """Draw the loss over alpha for every line, coloured by its kind; the legend has the mean barrier of each kind."""
    fig = figure(height=430)
    dash = dashes(list(paths.kinds))
    for kind, lines in paths.kinds.items():
        colour, text = _KINDS[kind]
        for i, path in enumerate(lines):
            trace = go.Scatter(
                x=path.alphas,
                y=path.losses[path.split],
                mode="lines",
                name=f"{text}: barrier {paths.barriers[kind].mean():.3f} {path.unit}".rstrip(),
                legendgroup=kind,
                showlegend=i == 0,
                line={"color": colour, "dash": dash[kind], "width": 2.5},
                hovertemplate=f"{text} {i}: %{{y:.3g}}<extra></extra>",
            )
            fig.add_trace(trace)
    fig.update_xaxes(title_text="α, from the centre (0), or one solution, to another (1)")
    unit = next(iter(paths.kinds.values()))[0].unit
    return fig.update_yaxes(title_text=measure_title("loss", unit), rangemode="tozero")


def _corners(curve: Curve) -> np.ndarray:
    """(K, 2) the controls, seen in the plane of the line from a to b and of the direction in which they leave it most."""
    squares = np.array([[distance(u, v) ** 2 for v in curve.controls] for u in curve.controls])
    products = 0.5 * (squares[:1] + squares[:, :1] - squares)  # <u - a, v - a>, from |u - v|² alone
    along = products[-1] / max(np.sqrt(products[-1, -1]), 1e-30)
    sizes, directions = np.linalg.eigh(products - np.outer(along, along))
    up = directions[:, -1] * np.sqrt(max(sizes[-1], 0.0))
    return np.stack([along, up if up.sum() >= 0.0 else -up], axis=1)


def _training(fig: go.Figure, losses: np.ndarray, column: int, unit: str, what: str = "training loss") -> None:
    epochs = list(range(1, len(losses) + 1))
    line = go.Scatter(x=epochs, y=losses, mode="lines+markers", line={"color": BLUE, "width": 3}, showlegend=False)
    hover = f"epoch %{{x}}: %{{y:.4g}} {unit}".rstrip() + "<extra></extra>"
    fig.add_trace(line.update(hovertemplate=hover), row=1, col=column)
    fig.update_xaxes(title_text="epoch", rangemode="tozero", tickformat="d", nticks=8, col=column)
    fig.update_yaxes(title_text=f"{what} ({unit})" if unit else what, rangemode="tozero", col=column)
