"""The explorer of mixtures in Jupyter: a soup triangle for three models, a polygon and sliders for more."""

import math
from collections.abc import Mapping
from typing import Any

import traitlets

from lmc.landscape.simplices.simplex_result import Simplex
from lmc.views.widgets.explorer import Explorer
from lmc.views.widgets.simplex_page import MODULE, STYLE, answer, inline_html, state


class SimplexExplorer(Explorer):
    """A map of mixtures with a point that can be dragged, and a slider for the share of each model. While it moves, values
    are interpolated in the browser; when it is let go of, the kernel evaluates the mixture. Explorers of one result stay
    in step.

    Attributes:
        shares: what each model has in the mixture shown; follows the point, and moves it.
        measure, split: what is shown: "loss", "accuracy" or a metric, and on which data.
        exact: the last mixture that was evaluated at rest: split -> measure -> value (accuracy in percent), or empty.
    """

    _esm = MODULE
    _css = STYLE
    shared = ("shares", "measure", "split")
    shares = traitlets.List(traitlets.Float()).tag(sync=True)
    measure = traitlets.Unicode().tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)

    def __init__(self, mixtures: Simplex) -> None:
        self.mixtures = mixtures
        self.exact: dict[str, dict[str, float | None]] = {}
        super().__init__([mixtures], state(mixtures))

    @traitlets.validate("shares")
    def _mixture(self, proposal: Any) -> list[float]:
        shares, names = proposal["value"], self.mixtures.names
        fits = len(shares) == len(names) and all(math.isfinite(s) and s >= 0.0 for s in shares)
        if not fits or abs(sum(shares) - 1.0) > 1e-4:
            raise traitlets.TraitError(f"shares={shares}; expected {len(names)} numbers, at least 0, that sum to 1")
        return shares

    @traitlets.validate("measure", "split")
    def _known(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        known = list(self.mixtures.values if name == "split" else self.mixtures.values[self.mixtures.split])
        if value not in known:
            raise traitlets.TraitError(f"{name}={value!r}; expected one of {', '.join(known)}")
        return value

    def answer(self, place: Any) -> dict[str, Any]:
        told = answer(self.mixtures, place)
        self.exact = told.get("values", {})
        return told

    def page(self, state: Mapping[str, Any]) -> str:
        return inline_html(state)

    def __repr__(self) -> str:
        return f"SimplexExplorer({', '.join(self.mixtures.names)}; {len(self.mixtures.counts)} mixtures)"
