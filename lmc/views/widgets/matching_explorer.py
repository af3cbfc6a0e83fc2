"""The matching explorer in Jupyter."""

from collections.abc import Mapping
from typing import Any

import traitlets

from lmc.align.study.inspect import Matching
from lmc.views.widgets.explorer import Explorer
from lmc.views.widgets.matching_page import MODULE, STYLE, inline_html, state


class MatchingExplorer(Explorer):
    """A slider that carries out a permutation: B's units move to their places beside A's, the matrix of similarities gets
    its diagonal, the barrier shrinks. Drawn in the browser from what the matching holds. Explorers of one result stay in
    step.

    Attributes:
        placed: share of B's units that are in their places; follows the slider, and moves it.
        group: the group of units that is shown.
    """

    _esm = MODULE
    _css = STYLE
    shared = ("placed", "group")
    placed = traitlets.Float(0.0, min=0.0, max=1.0).tag(sync=True)
    group = traitlets.Unicode().tag(sync=True)

    def __init__(self, matching: Matching, group: str) -> None:
        self.matching = matching
        super().__init__([matching], state(matching, group))

    @traitlets.validate("group")
    def _known(self, proposal: Any) -> str:
        if proposal["value"] not in self.matching.groups:
            known = ", ".join(self.matching.groups)
            raise traitlets.TraitError(f"group={proposal['value']!r}; expected one of {known}")
        return proposal["value"]

    def page(self, state: Mapping[str, Any]) -> str:
        return inline_html(state)

    def __repr__(self) -> str:
        return f"MatchingExplorer({', '.join(self.matching.groups)}; {len(self.matching.shares)} steps)"
