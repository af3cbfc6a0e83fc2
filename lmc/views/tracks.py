"""Curves on a plane, and what their points are called."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lmc.errors import InputError
from lmc.landscape.planes.plane_result import Plane

MOST_NAMED = 5  # points of a track


def tracked(plane: Plane, tracks: Mapping[str, Any] | None) -> Plane:
    """The plane with further tracks: points (K, 2) in the plane, or weights as for `Plane.with_tracks`.

    Raises:
        InputError: points that are no curve in the plane, or weights where the plane was read from a file.
    """
    for name, track in (tracks or {}).items():
        points = None if isinstance(track, Mapping) else _points(track)
        if points is None:
            plane = plane.with_tracks({name: track})
        elif points.ndim != 2 or points.shape[1] != 2 or len(points) < 2 or not np.isfinite(points).all():
            found = f"got {points.shape}"
            raise InputError(f"tracks[{name!r}]: expected weights or finite points (K, 2), K at least 2, {found}")
        else:
            labels = {other: texts for other, texts in plane.labels.items() if other != name}
            plane = replace(plane, tracks={**plane.tracks, name: points}, labels=labels)
    return plane


def named_points(plane: Plane, name: str) -> dict[int, str]:
    """Some points of a track and their names: the first, the last and a few between where they have labels."""
    count, labels = len(plane.tracks[name]), plane.labels.get(name)
    if not labels:
        return {}
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_NAMED)).round().astype(int)).tolist()
    return {i: f"{name} {labels[i]}" if i in (0, count - 1) else labels[i] for i in chosen}


def _points(track: Any) -> np.ndarray | None:
    """An array of numbers, or None for weights."""
    try:
        return np.asarray(track, dtype=np.float64)
    except (TypeError, ValueError):
        return None
