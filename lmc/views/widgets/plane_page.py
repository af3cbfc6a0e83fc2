"""What the plane explorer shows, as plain data, and the page that shows it without a kernel."""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt

from lmc.core.files import write_text
from lmc.errors import InputError
from lmc.landscape.planes.plane_result import Plane
from lmc.views.plots.style import SCALE, colours
from lmc.views.widgets.page import frame, module, page, style
from lmc.views.widgets.pictures import encode

MODULE, STYLE = module("plane_explorer.js"), style("plane_explorer.css")
TITLE = "A plane through the landscape"


def state(plane: Plane, paths: Mapping[str, npt.ArrayLike]) -> dict[str, Any]:
    """The state of the explorer: all that it draws, and a point in the middle of the models.

    Raises:
        InputError: paths that are no curves in the plane.
    """
    tracks = {**plane.tracks, **{name: _track(name, path) for name, path in paths.items()}}
    tints = colours(list(tracks))
    measures = list(plane.values[plane.split])
    data = {
        "x": plane.x.tolist(),
        "y": plane.y.tolist(),
        "axes": list(plane.axes),
        "splits": [plane.split, *(split for split in plane.values if split != plane.split)],
        "measures": [{"name": name, "unit": _unit(name), "reversed": name == "accuracy"} for name in measures],
        "values": {s: {m: encode(_shown(m, grid)) for m, grid in ms.items()} for s, ms in plane.values.items()},
        "models": [{"name": name, "place": list(place)} for name, place in plane.places.items()],
        "tracks": [{"name": n, "colour": tints[n], "points": track.tolist()} for n, track in tracks.items()],
        "scale": [list(stop) for stop in SCALE],
        "missing": int((~plane.done).sum()),
        "interpolated": np.flatnonzero(plane.interpolated).tolist() if plane.interpolated.any() else [],
        "gaps": plane.gaps,
    }
    centre = np.mean(list(plane.places.values()), axis=0)
    return {"data": data, "point": centre.tolist(), "split": plane.split, "measure": measures[0]}


def save_html(file: str | FilePath, plane: Plane, paths: Mapping[str, npt.ArrayLike]) -> None:
    """Write the explorer as one page."""
    write_text(file, page(MODULE, STYLE, state(plane, paths), title=TITLE))


def inline_html(content: Mapping[str, Any]) -> str:
    """The explorer in a frame, for a notebook that is read without a kernel; `content` is what `state` gives."""
    return frame(MODULE, STYLE, content, title=TITLE, height=640)


def _track(name: str, path: npt.ArrayLike) -> npt.NDArray[np.float64]:
    track = np.asarray(path, dtype=np.float64)
    if track.ndim != 2 or track.shape[1] != 2 or len(track) < 2 or not np.isfinite(track).all():
        raise InputError(f"paths[{name!r}]: expected finite points (K, 2) in the plane, K at least 2, got {track.shape}")
    return track


def _unit(measure: str) -> str:
    return {"loss": "nats", "accuracy": "%"}.get(measure, "")


def _shown(measure: str, grid: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Values as they are shown; infinite ones are gaps too."""
    shown = np.where(np.isfinite(grid), grid, np.nan) * (100.0 if measure == "accuracy" else 1.0)
    return shown.astype("<f4")
