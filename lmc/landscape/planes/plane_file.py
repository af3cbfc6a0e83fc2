"""Planes as JSON files."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lmc.core.files import write_text
from lmc.errors import DataError
from lmc.landscape.planes.plane_result import Plane

FORMAT = "lmc plane 1"


def save(plane: Plane, file: str | FilePath) -> None:
    """Write all that `plane` holds; numbers are written exactly, NaN as null."""
    content = {
        "format": FORMAT,
        "x": plane.x.tolist(),
        "y": plane.y.tolist(),
        "values": {
            split: {measure: [_optional(row) for row in grid] for measure, grid in measures.items()}
            for split, measures in plane.values.items()
        },
        "places": plane.places,
        "own": {s: {m: _optional(values) for m, values in measures.items()} for s, measures in plane.own.items()},
        "done": plane.done.tolist(),
        "axes": plane.axes,
        "recalibrated": plane.recalibrated,
        "tracks": {name: track.tolist() for name, track in plane.tracks.items()},
        "interpolated": plane.interpolated.tolist(),
        "error": plane.error,
        "explained": plane.explained,
    }
    write_text(file, json.dumps(content))


def load(file: str | FilePath) -> Plane:
    """Read what `save` wrote; `DataError` for any other file."""
    try:
        content = json.loads(FilePath(file).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{file}: format {content['format']!r}, expected {FORMAT!r}")
        return Plane(
            _array(content["x"]),
            _array(content["y"]),
            {s: {m: _array(grid) for m, grid in measures.items()} for s, measures in content["values"].items()},
            {name: (place[0], place[1]) for name, place in content["places"].items()},
            {s: {m: tuple(_array(v).tolist()) for m, v in measures.items()} for s, measures in content["own"].items()},
            np.array(content["done"], dtype=bool),
            (content["axes"][0], content["axes"][1]),
            content["recalibrated"],
            {name: _array(track) for name, track in content["tracks"].items()},
            np.array(content.get("interpolated", False), dtype=bool),
            content.get("error", {}),
            None if content.get("explained") is None else (content["explained"][0], content["explained"][1]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} holds no plane: {error!r}") from error


def _optional(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _array(values: Any) -> Any:
    return np.array(values, dtype=np.float64)
