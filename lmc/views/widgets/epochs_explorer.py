"""The training-time explorer in Jupyter."""

from collections.abc import Mapping
from typing import Any

import traitlets

from lmc.align.study.epochs import Epochs
from lmc.views.widgets.epochs_page import MODULE, STYLE, inline_html, state
from lmc.views.widgets.explorer import Explorer
from lmc.views.widgets.pictures import answer


class EpochsExplorer(Explorer):
    """Two training runs: a slider over the epochs, the path between them at this epoch, and the barrier over all epochs.
    Where a slider is let go of, the kernel evaluates the network itself. Explorers of one result stay in step.

    Attributes:
        epoch, alpha: where the sliders stand; follow them, and move them.
        active: name of the paths that are shown.
    """

    _esm = MODULE
    _css = STYLE
    shared = ("epoch", "alpha", "active")
    epoch = traitlets.Int().tag(sync=True)
    alpha = traitlets.Float(0.5).tag(sync=True)
    active = traitlets.Unicode().tag(sync=True)

    def __init__(self, result: Epochs) -> None:
        self.result = result
        super().__init__([result], state(result))

    @traitlets.validate("epoch", "active")
    def _known(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        known = self.result.epochs if name == "epoch" else self.result.paths
        if value not in known:
            raise traitlets.TraitError(f"{name}={value!r}; expected one of {', '.join(map(str, known))}")
        return value

    def answer(self, place: Any) -> dict[str, Any]:
        name, epoch, alpha = place
        path = self.result[epoch][name]
        return answer(path.exact, [float(alpha)], path.split)

    def page(self, state: Mapping[str, Any]) -> str:
        return inline_html(state)

    def __repr__(self) -> str:
        return f"EpochsExplorer({', '.join(self.result.paths)}; {len(self.result.epochs)} epochs)"
