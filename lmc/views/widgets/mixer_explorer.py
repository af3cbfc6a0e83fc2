"""The merge mixer in Jupyter."""

import math
from collections.abc import Mapping
from typing import Any

import traitlets

from lmc.merge.study.mixer import Mixer
from lmc.views.widgets.explorer import Explorer
from lmc.views.widgets.mixer_page import MODULE, STYLE, inline_html, state


class MixerExplorer(Explorer):
    """A slider for each model and group of layers, and the accuracy of the merged network on each task. The kernel merges
    and evaluates while the sliders move; without one, values of whole models are interpolated in a grid.

    Attributes:
        coefficients: (groups, models), where the sliders stand; follows them, and moves them.
    """

    _esm = MODULE
    _css = STYLE
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
        return {"values": [100.0 * value for value in self.mixer.scores(place).values()]}

    def page(self, state: Mapping[str, Any]) -> str:
        return inline_html(state)

    def __repr__(self) -> str:
        return f"MixerExplorer({', '.join(self.mixer.names)}; {', '.join(self.mixer.groups)})"
