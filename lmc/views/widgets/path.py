"""The explorer of paths: a slider from one network to another."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
import traitlets

from lmc.align.connecting.result import Connection
from lmc.core.results import view
from lmc.errors import InputError
from lmc.landscape.path import Path
from lmc.views.legend import PATTERNS, colours, dashes, labelled_paths, measure_title
from lmc.views.widgets.explorer import Explorer, answer, images_state, module, shown_state, style, unlike
from lmc.views.widgets.poster import Poster, curves

ENDS = {"A": 0.0, "B": 1.0}


class PathExplorer(Explorer):
    """A slider along one or several paths: loss and accuracy, the confusion of the network at this point, and the
    inputs that it gets wrong. Drawn in the browser from what the paths hold, at the nearest point that was evaluated;
    where the slider is let go of, the kernel evaluates the network itself. Explorers of one path stay in step.

    Attributes:
        alpha: where the slider stands; follows it, and moves it.
        active: name of the path whose predictions are shown.
    """

    _esm = module("path_explorer.js")
    _css = style()
    title = "The way between two networks"
    shared = ("alpha", "active")
    alpha = traitlets.Float(0.5).tag(sync=True)
    active = traitlets.Unicode().tag(sync=True)

    def __init__(self, paths: Mapping[str, Path], examples: str = "wrong") -> None:
        self.paths = dict(paths)
        self._other = unlike(examples, ENDS)
        super().__init__(list(paths.values()), state(paths, examples))

    @traitlets.validate("active")
    def _known(self, proposal: Any) -> str:
        if proposal["value"] not in self.paths:
            raise traitlets.TraitError(f"active={proposal['value']!r}; expected one of {', '.join(self.paths)}")
        return proposal["value"]

    def answer(self, place: Any) -> dict[str, Any]:
        name, alpha = place
        path = self.paths[name]
        other = None if self._other is None else [ENDS[self._other]]
        return answer(path.exact, [float(alpha)], path.split, other)

    def poster(self) -> Poster:
        tints = colours(list(self.paths))
        lines = {name: (path.alphas, path.losses[path.split], tints[name]) for name, path in self.paths.items()}
        return curves(f"{measure_title('loss', self._results[0].unit)} on the way from A to B", lines)

    def __repr__(self) -> str:
        points = len(next(iter(self.paths.values())).alphas)
        return f"PathExplorer({', '.join(self.paths)}; {points} points)"


@view(Path, "explore")
def explore(path: Path, label: str | None = None, *, examples: str = "wrong", **others: Path) -> PathExplorer:
    """Open a widget with a slider along the path: the network at this point, its confusions and its mistakes.

    Args:
        label: what the path is called (default: "aligned" beside a path called "naive", else "path").
        examples: which inputs are shown: "wrong" ones, or those whose class changed, "unlike A" or "unlike B": watch which
            examples change their mind while you drag.
        others: further paths, by name: `aligned.explore(naive=naive)`.

    Raises:
        InputError: paths over different points or different examples, or other `examples`.
    """
    return PathExplorer(labelled_paths(path, label, others), examples)


@view(Path, "save_html")
def save_html(
    path: Path,
    file: str | FilePath,
    label: str | None = None,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
    examples: str = "wrong",
    **others: Path,
) -> FilePath:
    """Write the explorer as one page that needs neither a kernel nor a network, and return where it is.

    Args:
        label, examples, others: as for `explore`.
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the explorer.
    """
    return PathExplorer.write(file, state(labelled_paths(path, label, others), examples), title, text, rows)


@view(Connection, "explore")
def explore_connection(connection: Connection) -> PathExplorer:
    """Open the widget with a slider along both ways between the networks: as they are, and connected."""
    return explore(connection.path, "connected", naive=connection.naive)


@view(Connection, "save_html")
def save_html_connection(
    connection: Connection,
    file: str | FilePath,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> FilePath:
    """Write the explorer of both ways as one page that needs neither a kernel nor a network, and return where it is.

    Args:
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the explorer.
    """
    return save_html(connection.path, file, "connected", title=title, text=text, rows=rows, naive=connection.naive)


def state(paths: Mapping[str, Path], examples: str = "wrong") -> dict[str, Any]:
    """The state of the explorer: all that it draws, where it stands, and which path it shows (the last).

    Raises:
        InputError: paths over different points or different examples, or other `examples`.
    """
    other = unlike(examples, ENDS)
    first = next(iter(paths.values()))
    for name, path in paths.items():
        if (path.alphas[0], path.alphas[-1]) != (first.alphas[0], first.alphas[-1]):
            raise InputError(
                f"{name}: points from {path.alphas[0]:g} to {path.alphas[-1]:g}, the others from {first.alphas[0]:g} "
                f"to {first.alphas[-1]:g}; paths shown together must cover the same stretch"
            )
    tints, lines = colours(list(paths)), dashes(list(paths))
    measures = ["loss", *(["accuracy"] if all(path.accuracies for path in paths.values()) else [])]
    data = {
        "paths": [path_state(name, path, measures, tints[name], lines[name]) for name, path in paths.items()],
        "panels": [panel_state(measure, paths) for measure in measures],
        "images": images_state([path.predictions for path in paths.values() if path.predictions is not None]),
    }
    if other is not None:
        data["unlike"] = {"name": other, "alpha": ENDS[other]}
    return {"data": data, "alpha": 0.5, "active": list(paths)[-1]}


def path_state(
    name: str, path: Path, measures: list[str], colour: str, dash: str, shown: bool = True
) -> dict[str, Any]:
    """One path as the charts draw it; `shown`: with what is predicted on it."""
    return {
        "name": name,
        "colour": colour,
        "dash": PATTERNS[dash],
        "alphas": [round(float(alpha), 6) for alpha in path.alphas],
        "split": path.split,
        "series": {
            split: {measure: _numbers(values[measure], measure) for measure in measures}
            for split, values in path.values.items()
        },
        "barriers": {measure: _barrier(path, measure) for measure in measures},
        "shown": shown_state(path.predictions) if shown and path.predictions is not None else None,
    }


def _numbers(values: npt.NDArray[np.float64], measure: str) -> list[float | None]:
    scale = 100.0 if measure == "accuracy" else 1.0
    return [round(scale * float(value), 5) if math.isfinite(value) else None for value in values]


def _barrier(path: Path, measure: str) -> dict[str, Any] | None:
    try:
        found = path.barrier_of("loss" if measure == "loss" else "error")
    except InputError:  # an end that is not a number
        return None
    base = (1.0 - found.alpha) * found.start + found.alpha * found.end
    ends, text = (base, base + found.value), f"barrier {found.value:.2f} {path.unit}".rstrip()
    if measure == "accuracy":
        ends, text = (100.0 - base, 100.0 - base - found.value), f"{found.value:.1f} points"
    return {"alpha": found.alpha, "base": ends[0], "top": ends[1], "text": text}


def panel_state(measure: str, paths: Mapping[str, Path]) -> dict[str, Any]:
    """Title, range and ticks of a chart; one range for all paths, so that they can be compared."""
    series = [_numbers(values[measure], measure) for path in paths.values() for values in path.values.values()]
    known = [value for numbers in series for value in numbers if value is not None]
    if measure == "loss":
        low = min([0.0, *known])
        high = max([low + 1e-3, *known])
        first = next(iter(paths.values()))
        others = [split for split in first.values if split != first.split]
        title = measure_title("loss", first.unit)
        title += f" – {first.split} thick, {', '.join(others)} dotted" if others else ""
    else:
        low, high, title = min([99.0, *known]), 100.0, "accuracy (%)"
    return {"measure": measure, "title": title, **axis_state(low, high)}


def axis_state(low: float, high: float) -> dict[str, Any]:
    """Range and ticks of an axis that holds low and high."""
    step = _step(high - low)
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    ticks = [round(low + i * step, 6) for i in range(round((high - low) / step) + 1)]
    return {"range": [low, high], "ticks": ticks}


def _step(span: float) -> float:
    """A round distance of ticks, 1, 2 or 5 times a power of ten, that makes at most five of them."""
    rough = span / 4.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1.0 - 1e-9))
