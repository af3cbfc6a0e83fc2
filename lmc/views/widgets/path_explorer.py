"""The path explorer in Jupyter."""

from collections.abc import Mapping
from typing import Any

import traitlets

from lmc.landscape.paths.path import Path
from lmc.views.widgets.explorer import Explorer
from lmc.views.widgets.path_page import MODULE, STYLE, inline_html, state
from lmc.views.widgets.pictures import answer


class PathExplorer(Explorer):
    """A slider along one or several paths: loss and accuracy, the confusion of the network at this point, and the
    inputs that it gets wrong. Drawn in the browser from what the paths hold, at the nearest point that was evaluated;
    where the slider is let go of, the kernel evaluates the network itself. Explorers of one path stay in step.

    Attributes:
        alpha: where the slider stands; follows it, and moves it.
        active: name of the path whose predictions are shown.
    """

    _esm = MODULE
    _css = STYLE
    shared = ("alpha", "active")
    alpha = traitlets.Float(0.5).tag(sync=True)
    active = traitlets.Unicode().tag(sync=True)

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)
        super().__init__(list(paths.values()), state(paths))

    @traitlets.validate("active")
    def _known(self, proposal: Any) -> str:
        if proposal["value"] not in self.paths:
            raise traitlets.TraitError(f"active={proposal['value']!r}; expected one of {', '.join(self.paths)}")
        return proposal["value"]

    def answer(self, place: Any) -> dict[str, Any]:
        name, alpha = place
        path = self.paths[name]
        return answer(path.exact, [float(alpha)], path.split)

    def page(self, state: Mapping[str, Any]) -> str:
        return inline_html(state)

    def __repr__(self) -> str:
        points = len(next(iter(self.paths.values())).alphas)
        return f"PathExplorer({', '.join(self.paths)}; {points} points)"
