"""The explorer of mixtures in Jupyter: a soup triangle for three models, a polygon and sliders for more."""

import math
from typing import Any

import anywidget
import traitlets

from lmc.landscape.simplex_result import Simplex
from lmc.widgets.in_step import keep_in_step
from lmc.widgets.simplex_page import MODULE, STYLE, answer, inline_html, state

TRAITS = ("shares", "measure", "split")


class SimplexExplorer(anywidget.AnyWidget):
    """A map of mixtures with a point that can be dragged, and a slider for the share of each model. While it moves, values
    are interpolated in the browser; when it is let go of, the kernel evaluates the mixture.

    Widgets of one result move together.

    Attributes:
        shares: what each model has in the mixture shown; follows the point, and moves it.
        measure, split: what is shown: "loss", "accuracy" or a metric, and on which data.
        exact: the last mixture that was evaluated at rest: split -> measure -> value (accuracy in percent), or empty.
    """

    _esm = MODULE
    _css = STYLE
    data = traitlets.Dict().tag(sync=True)
    shares = traitlets.List(traitlets.Float()).tag(sync=True)
    measure = traitlets.Unicode().tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)

    def __init__(self, mixtures: Simplex) -> None:
        self.mixtures = mixtures
        self.exact: dict[str, dict[str, float]] = {}
        super().__init__(**state(mixtures))
        keep_in_step(self, mixtures, TRAITS)
        self.on_msg(self._answer)

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

    def _answer(self, widget: Any, content: Any, buffers: Any) -> None:
        """Evaluate the mixture at which the browser came to rest."""
        found = answer(self.mixtures, content["place"])
        self.exact = found.get("values", {})
        self.send({**found, "ticket": content["ticket"]})

    def __repr__(self) -> str:
        return f"SimplexExplorer({', '.join(self.mixtures.names)}; {len(self.mixtures.counts)} mixtures)"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view, and the same figure as a page of its own for where no kernel runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            shown = {name: getattr(self, name) for name in TRAITS}
            data["text/html"] = inline_html({"data": self.data, **shown})
        return bundle
