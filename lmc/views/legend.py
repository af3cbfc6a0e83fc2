"""Legends of all figures, explorers and pages: names, units, colours, which colour-blind readers tell apart, and tracks over
planes.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), darkened where they must stand on white.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from lmc.errors import InputError
from lmc.landscape.planes.plane_result import Plane

Shown = TypeVar("Shown")
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#AA4499"
SKY = "#56B4E9"
GOLD = "#B58900"
BLACK = "#222222"
GREY = "#777777"
GRID = "#E4E4E4"
# The name of a thing decides its colour, in every figure and explorer; other names take the next free colour.
COLOURS = {"naive": ORANGE, "aligned": BLUE, "path": BLUE, "repaired": GREEN, "curve": PURPLE}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, GOLD, BLACK)
# So do dashes, for readers without colours. Dots are left to the split that no barrier is taken on.
DASHES = {"naive": "dash"}
DASH_CYCLE = ("solid", "dashdot", "longdash", "longdashdot")
PATTERNS = {
    "solid": "none",
    "dash": "9 5",
    "dashdot": "10 4 2.5 4",
    "longdash": "17 6",
    "longdashdot": "17 5 2.5 5",
}  # pixels
# From nothing to much; light is low, so that it prints and projects well.
SCALE = ((0.0, "#F7FBFF"), (0.25, "#C6DBEF"), (0.5, "#6BAED6"), (0.75, "#2171B5"), (1.0, "#08306B"))


def labelled(result: Shown, label: str, others: Mapping[str, Shown]) -> dict[str, Shown]:
    """The results by name, `result` last, on top.

    Raises:
        InputError: others of another kind, or that have the same name.
    """
    for name, other in others.items():
        if not isinstance(other, type(result)):
            raise InputError(f"{name}: expected a {type(result).__name__}, got {type(other).__name__}")
    if label in others:
        raise InputError(f"two results are called {label!r}; pass label=")
    return {**others, label: result}


def labelled_paths(path: Shown, label: str | None, others: Mapping[str, Shown]) -> dict[str, Shown]:
    """As `labelled`; without a label, a path is "aligned" beside a "naive" one, else "path"."""
    return labelled(
        path, label or ("aligned" if "naive" in others else "naive" if "aligned" in others else "path"), others
    )


def measure_title(measure: str, unit: str) -> str:
    """A measure with its unit: "loss (nats)", "accuracy (%)"; that of the loss is `unit`, and may be empty."""
    known = {"loss": unit, "barrier": unit, "accuracy": "%"}.get(measure)
    return f"{measure} ({known})" if known else measure


def track_colours(names: list[str]) -> dict[str, str]:
    """A colour for each curve on a map in `SCALE`: no blue, which does not stand out there."""
    chosen = {name: COLOURS[name] for name in names if COLOURS.get(name, BLUE) != BLUE}
    free = [colour for colour in (ORANGE, PURPLE, GREEN, GOLD, BLACK) if colour not in chosen.values()]
    return {name: chosen[name] if name in chosen else free.pop(0) if free else BLACK for name in names}


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


def dashes(names: list[str]) -> dict[str, str]:
    """A dash for each name: its own where it has one, else the next of the cycle, which begins again at its end."""
    cycle = itertools.cycle(DASH_CYCLE)
    return {name: DASHES[name] if name in DASHES else next(cycle) for name in names}


MOST_NAMED = 5  # points of a track


def tracked(plane: Plane, tracks: Mapping[str, Any] | None) -> Plane:
    """The plane with further tracks: points (K, 2) in the plane, or weights as for `Plane.with_tracks`.

    Raises:
        InputError: points that are no curve in the plane, weights where the plane was read from a file, or no mapping.
    """
    if not isinstance(tracks, Mapping | None):
        raise InputError(
            f'tracks: expected a mapping of names to tracks, such as {{"run": weights}}, got {type(tracks).__name__}'
        )
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
