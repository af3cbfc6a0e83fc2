"""The explorer of task vectors: a slider for each model and group of layers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import traitlets

from lmc.core.results import view
from lmc.merge.study.mixer import Mixer
from lmc.views.legend import CYCLE, GREY
from lmc.views.widgets.explorer import Explorer, module, style
from lmc.views.widgets.poster import Poster, curves


class MixerExplorer(Explorer):
    """A slider for each model and group of layers, and the measure of the merged network on each task. The kernel merges
    and evaluates while the sliders move; without one, values of whole models are interpolated in a grid.

    Attributes:
        coefficients: (groups, models), where the sliders stand; follows them, and moves them.
    """

    _esm = module("mixer_explorer.js")
    _css = style("mixer_explorer.css")
    title = "A mixer for task vectors"
    shared = ("coefficients",)
    coefficients = traitlets.List(traitlets.List(traitlets.Float())).tag(sync=True)

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        super().__init__([mixer], state(mixer))

    @traitlets.validate("coefficients")
    def _fitting(self, proposal: Any) -> list[list[float]]:
        rows, shape = proposal["value"], (len(self.mixer.groups), len(self.mixer.names))
        if len(rows) != shape[0] or any(len(row) != shape[1] or not all(map(math.isfinite, row)) for row in rows):
            raise traitlets.TraitError(f"coefficients={rows}; expected {shape[0]} rows of {shape[1]} finite numbers")
        return rows

    def answer(self, place: Any) -> dict[str, Any]:
        return {"values": (scale(self.mixer) * list(self.mixer.scores(place).values())).tolist()}

    def poster(self) -> Poster:
        mixer, levels = self.mixer, range(len(self.mixer.levels))
        together = scale(mixer) * np.array([mixer.grid[(i,) * len(mixer.names)] for i in levels])
        tints = dict(zip(mixer.tasks, [*CYCLE, *[GREY] * len(mixer.tasks)], strict=False))
        lines = {task: (mixer.levels, together[:, t], tints[task]) for t, task in enumerate(mixer.tasks)}
        return curves(f"each task as all coefficients rise from {mixer.levels[0]:g} to {mixer.levels[-1]:g}", lines)

    def __repr__(self) -> str:
        return f"MixerExplorer({', '.join(self.mixer.names)}; {', '.join(self.mixer.groups)})"


@view(Mixer, "explore")
def explore(mixer: Mixer) -> MixerExplorer:
    """Open a widget with sliders for every model and group of layers, and the measure on each task while they move."""
    return MixerExplorer(mixer)


@view(Mixer, "save_html")
def save_html(
    mixer: Mixer,
    file: str | FilePath,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> FilePath:
    """Write the mixer as a page without a kernel, and return where it is: one slider per model, values interpolated.

    Args:
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the mixer.
    """
    return MixerExplorer.write(file, state(mixer), title, text, rows)


def scale(mixer: Mixer) -> np.ndarray:
    """(tasks,) what values are shown in: accuracies in percent."""
    return np.where(np.array(mixer.measures) == "accuracy", 100.0, 1.0)


def measure(mixer: Mixer, task: int) -> dict[str, Any]:
    """The name for values of a task, the length of a full bar, and the number of digits shown."""
    name, unit = mixer.measures[task], mixer.units[task]
    if name == "accuracy":
        return {"name": name, "unit": "%", "full": 100.0, "digits": 1, "higher": True}
    own = np.abs(mixer.own[:, task])
    full = float(own[np.isfinite(own)].max(initial=0.0)) or 1.0
    return {"name": name, "unit": unit, "full": full, "digits": 3, "higher": mixer.higher[task]}


def state(mixer: Mixer) -> dict[str, Any]:
    """The state of the mixer: all that it draws, and its sliders, at an equal share of each task vector."""
    count = len(mixer.names)
    data = {
        "names": list(mixer.names),
        "colours": [CYCLE[i] if i < len(CYCLE) else GREY for i in range(count)],
        "tasks": list(mixer.tasks),
        "groups": list(mixer.groups),
        "levels": mixer.levels.tolist(),
        "top": float(mixer.levels[-1]) if len(mixer.levels) > 1 else 1.5,  # of the sliders
        "grid": (scale(mixer) * mixer.grid).round(4).reshape(-1).tolist(),
        "own": (scale(mixer) * mixer.own).round(4).tolist(),
        "measures": [measure(mixer, task) for task in range(len(mixer.tasks))],
        "best": list(mixer.best),
    }
    return {"data": data, "coefficients": [[round(1.0 / count, 4)] * count for _ in mixer.groups]}
