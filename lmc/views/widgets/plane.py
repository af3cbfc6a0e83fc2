"""The explorer of planes: a point to be dragged over a map and a surface."""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
import traitlets

from lmc.core.results import view
from lmc.landscape.planes.plane_result import Plane
from lmc.views.legend import PATTERNS, SCALE, dashes, named_points, track_colours, tracked
from lmc.views.widgets.explorer import Explorer, answer, encode, module, style, unlike
from lmc.views.widgets.poster import Poster, between, maps


class PlaneExplorer(Explorer):
    """A plane in weight space as a map and as a surface, with a point to be dragged. Drawn in the browser from the
    points of the grid; where the point is let go of, the kernel evaluates the network itself and shows what it
    predicts. Explorers of one plane stay in step.

    Attributes:
        point: (x, y), where the point stands; follows it, and moves it.
        split, measure: what is drawn.
    """

    _esm = module("plane_explorer.js")
    _css = style("plane_explorer.css")
    title = "A plane through the landscape"
    shared = ("point", "split", "measure")
    point = traitlets.List(traitlets.Float(), minlen=2, maxlen=2).tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)
    measure = traitlets.Unicode().tag(sync=True)

    def __init__(self, plane: Plane, tracks: Mapping[str, Any] | None = None, examples: str = "wrong") -> None:
        self.plane = plane
        self._other = unlike(examples, plane.places)
        super().__init__([plane], state(plane, tracks, examples))

    @traitlets.validate("split", "measure")
    def _known(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        known = self.plane.values if name == "split" else self.plane.values[self.plane.split]
        if value not in known:
            raise traitlets.TraitError(f"{name}={value!r}; expected one of {', '.join(known)}")
        return value

    def answer(self, place: Any) -> dict[str, Any]:
        split, x, y = place
        other = None if self._other is None else list(self.plane.places[self._other])
        return answer(self.plane.exact, [float(x), float(y)], split, other)

    def poster(self) -> Poster:
        x, y = self.plane.x, self.plane.y
        places = {
            name: ((px - x[0]) / (x[-1] - x[0]), (y[-1] - py) / (y[-1] - y[0]))
            for name, (px, py) in self.plane.places.items()
        }
        places_of = [np.interp(np.linspace(grid[0], grid[-1], 120), grid, np.arange(len(grid))) for grid in (y, x)]
        values = between(self.plane.values[self.split][self.measure], *places_of)[::-1]
        return maps(f"{self.split} {self.measure} over the plane", [values], places)

    def __repr__(self) -> str:
        return f"PlaneExplorer({len(self.plane.x)} x {len(self.plane.y)} points; {', '.join(self.plane.places)})"


@view(Plane, "explore")
def explore(plane: Plane, tracks: Mapping[str, Any] | None = None, *, examples: str = "wrong") -> PlaneExplorer:
    """Open a widget with a point to be dragged over the plane, as a map and as a surface.

    Args:
        tracks: further curves, name -> points (K, 2) in the plane or weights, as `{"run": checkpoints}`.
        examples: which inputs are shown where a kernel evaluates the network: "wrong" ones, or those whose class changed
            against one of the models, as "unlike A".

    Raises:
        InputError: tracks that are no curves in the plane, or weights where the plane was read from a file; other
            `examples`.
    """
    return PlaneExplorer(plane, tracks, examples)


@view(Plane, "save_html")
def save_html(
    plane: Plane,
    file: str | FilePath,
    tracks: Mapping[str, Any] | None = None,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> FilePath:
    """Write the explorer as one page that needs neither a kernel nor a network, and return where it is.

    Args:
        tracks: as for `explore`.
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the explorer.
    """
    return PlaneExplorer.write(file, state(plane, tracks), title, text, rows)


def state(plane: Plane, tracks: Mapping[str, Any] | None = None, examples: str = "wrong") -> dict[str, Any]:
    """The state of the explorer: all that it draws, and a point in the middle of the models.

    Raises:
        InputError: see `explore`.
    """
    plane = tracked(plane, tracks)
    tints, lines = track_colours(list(plane.tracks)), dashes(list(plane.tracks))
    measures = list(plane.values[plane.split])
    data = {
        "x": plane.x.tolist(),
        "y": plane.y.tolist(),
        "axes": list(plane.axes),
        "splits": [plane.split, *(split for split in plane.values if split != plane.split)],
        "measures": [{"name": name, "unit": _unit(plane, name), "reversed": name in plane.higher} for name in measures],
        "values": {s: {m: encode(_shown(m, grid)) for m, grid in ms.items()} for s, ms in plane.values.items()},
        "models": [{"name": name, "place": list(place)} for name, place in plane.places.items()],
        "tracks": [
            {
                "name": n,
                "colour": tints[n],
                "dash": PATTERNS[lines[n]],
                "points": track.tolist(),
                "labels": named_points(plane, n),
            }
            for n, track in plane.tracks.items()
        ],
        "scale": [list(stop) for stop in SCALE],
        "missing": int((~plane.done).sum()),
        "interpolated": np.flatnonzero(plane.interpolated).tolist() if plane.interpolated.any() else [],
        "gaps": plane.gaps,
    }
    other = unlike(examples, plane.places)
    if other is not None:
        data["unlike"] = {"name": other}
    centre = np.mean(list(plane.places.values()), axis=0)
    return {"data": data, "point": centre.tolist(), "split": plane.split, "measure": measures[0]}


def _unit(plane: Plane, measure: str) -> str:
    return {"loss": plane.unit, "accuracy": "%"}.get(measure, "")


def _shown(measure: str, grid: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Values as they are shown; infinite ones are gaps too."""
    shown = np.where(np.isfinite(grid), grid, np.nan) * (100.0 if measure == "accuracy" else 1.0)
    return shown.astype("<f4")
