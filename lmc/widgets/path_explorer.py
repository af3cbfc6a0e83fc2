"""The path explorer in Jupyter."""

from collections.abc import Mapping
from typing import Any

import anywidget
import traitlets

from lmc.landscape.path import Path
from lmc.widgets.path_page import MODULE, STYLE, inline_html, state


class PathExplorer(anywidget.AnyWidget):
    """A slider along one or several paths: loss and accuracy, the confusion of the network at this point, and the
    inputs that it gets wrong (at the nearest point that was evaluated). Drawn in the browser from what the paths hold.

    Attributes:
        alpha: where the slider stands; follows it, and moves it.
        active: name of the path whose predictions are shown.
    """

    _esm = MODULE
    _css = STYLE
    data = traitlets.Dict().tag(sync=True)
    alpha = traitlets.Float(0.5).tag(sync=True)
    active = traitlets.Unicode().tag(sync=True)

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)
        super().__init__(**state(paths))

    @traitlets.validate("active")
    def _known(self, proposal: Any) -> str:
        if proposal["value"] not in self.paths:
            raise traitlets.TraitError(f"active={proposal['value']!r}; expected one of {', '.join(self.paths)}")
        return proposal["value"]

    def __repr__(self) -> str:
        points = len(next(iter(self.paths.values())).alphas)
        return f"PathExplorer({', '.join(self.paths)}; {points} points)"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view, and the same figure as a page of its own for where no kernel runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            data["text/html"] = inline_html({"data": self.data, "alpha": self.alpha, "active": self.active})
        return bundle
