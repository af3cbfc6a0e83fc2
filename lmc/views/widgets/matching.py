"""The explorer of matchings: a slider that carries out a permutation, unit by unit."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import traitlets

from lmc.align.study.inspect import MatchedGroup, Matching
from lmc.core.results import view
from lmc.views.legend import SCALE
from lmc.views.widgets.explorer import Explorer, encode, module, style
from lmc.views.widgets.poster import Poster, maps


class MatchingExplorer(Explorer):
    """A slider that carries out a permutation: B's units move to their places beside A's, the matrix of similarities gets
    its diagonal, the barrier shrinks. Drawn in the browser from what the matching holds. Explorers of one result stay in
    step.

    Attributes:
        placed: share of B's units that are in their places; follows the slider, and moves it.
        group: the group of units that is shown.
    """

    _esm = module("matching_explorer.js")
    _css = style("matching_explorer.css")
    title = "From naive to aligned, unit by unit"
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

    def poster(self) -> Poster:
        steps = self.matching.groups[self.group].similarity
        cell = np.ones((max(1, 200 // steps.shape[1]),) * 2)
        what = f"how alike units of A (rows) and B (columns) are in {self.group}, as trained and aligned"
        return maps(what, [np.asarray(np.kron(steps[i], cell), np.float64) for i in (0, -1)])

    def __repr__(self) -> str:
        return f"MatchingExplorer({', '.join(self.matching.groups)}; {len(self.matching.shares)} steps)"


@view(Matching, "explore")
def explore(matching: Matching, group: str | None = None) -> MatchingExplorer:
    """Open a widget whose slider carries out the permutation: units find their places, the barrier shrinks.

    Args:
        group: the group that is shown first.

    Raises:
        InputError: a group that is not among those of the matching.
    """
    return MatchingExplorer(matching, matching.known(group))


@view(Matching, "save_html")
def save_html(
    matching: Matching,
    file: str | FilePath,
    group: str | None = None,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> FilePath:
    """Write the explorer as one page that needs neither a kernel nor a network, and return where it is.

    Args:
        group: as for `explore`.
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the explorer.
    """
    return MatchingExplorer.write(file, state(matching, matching.known(group)), title, text, rows)


def state(matching: Matching, group: str) -> dict[str, Any]:
    """The state of the explorer: all that it draws, how many units are in place (none), and the group it shows."""
    paths = matching.paths
    data = {
        "shares": matching.shares.tolist(),
        "split": paths[0].split if paths else "",
        "unit": paths[0].unit if paths else "",
        "alphas": paths[0].alphas.tolist() if paths else [],
        "paths": [[_number(loss) for loss in path.losses[path.split]] for path in paths],
        "barriers": [_number(barrier) for barrier in matching.barriers],
        "groups": [_group(one) for one in matching.groups.values()],
        "scale": [list(stop) for stop in SCALE],
    }
    return {"data": data, "placed": 0.0, "group": group}


def _group(group: MatchedGroup) -> dict[str, Any]:
    # A colour for everything from "nothing in common" to what the most alike pairs reach.
    high = max(0.1, float(np.quantile(group.similarity[-1].diagonal(), 0.9)))
    return {
        "name": group.name,
        "size": group.size,
        "shown": group.similarity.shape[1],
        "index": group.index.tolist(),
        "order": group.order.tolist(),
        "similarity": encode(np.round(255 * (group.similarity / high).clip(0.0, 1.0)).astype(np.uint8)),
        "agreement": [round(float(value), 5) for value in group.agreement],
        "fields": None if group.fields is None else _fields(*group.fields),
    }


def _fields(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Each picture as strong as its largest weight, in steps of 1 / 127."""
    a, b = (
        np.round(127 * fields / np.maximum(np.abs(fields).max((1, 2), keepdims=True), 1e-12)).astype(np.int8)
        for fields in (ours, theirs)
    )
    count, height, width = a.shape
    return {"count": count, "height": height, "width": width, "a": encode(a), "b": encode(b)}


def _number(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None
