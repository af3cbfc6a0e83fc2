"""Legends of all figures, explorers and pages: names, units, and colours, which colour-blind readers tell apart.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), darkened where they must stand on white.
"""

from collections.abc import Mapping
from typing import TypeVar

from lmc.errors import InputError

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
    known = {"loss": unit, "accuracy": "%"}.get(measure)
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
