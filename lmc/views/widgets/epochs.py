"""The explorer of two training runs: a slider over the epochs, and the path between the runs at each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import traitlets

from lmc.align.study.epochs import Epochs
from lmc.core.results import view
from lmc.views.legend import PATTERNS, SCALE, colours, dashes
from lmc.views.widgets.explorer import Explorer, answer, module, style
from lmc.views.widgets.path import axis_state, panel_state, path_state
from lmc.views.widgets.poster import Poster, curves


class EpochsExplorer(Explorer):
    """Two training runs: a slider over the epochs, the path between them at this epoch, and the barrier over all epochs.
    Where a slider is let go of, the kernel evaluates the network itself. Explorers of one result stay in step.

    Attributes:
        epoch, alpha: where the sliders stand; follow them, and move them.
        active: name of the paths that are shown.
    """

    _esm = module("epochs_explorer.js")
    _css = style("epochs_explorer.css")
    title = "Two runs, epoch by epoch"
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

    def poster(self) -> Poster:
        tints = colours(list(self.result.paths))
        lines = {name: (self.result.epochs, found, tints[name]) for name, found in self.result.barriers.items()}
        return curves("barrier over the epochs", lines)

    def __repr__(self) -> str:
        return f"EpochsExplorer({', '.join(self.result.paths)}; {len(self.result.epochs)} epochs)"


@view(Epochs, "explore")
def explore(result: Epochs) -> EpochsExplorer:
    """Open a widget with a slider over the epochs, linked to the path at this epoch."""
    return EpochsExplorer(result)


@view(Epochs, "save_html")
def save_html(
    result: Epochs,
    file: str | FilePath,
    *,
    title: str | None = None,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> FilePath:
    """Write the explorer as one page that needs neither a kernel nor a network, and return where it is.

    Args:
        title, text, rows: heading, paragraphs, and a table (column -> cell) above the explorer.
    """
    return EpochsExplorer.write(file, state(result), title, text, rows)


def state(result: Epochs) -> dict[str, Any]:
    """The state of the explorer: all that it draws, standing at the last epoch, halfway between the runs."""
    every = [path for paths in result.paths.values() for path in paths]
    measures = ["loss", *(["accuracy"] if all(path.accuracies for path in every) else [])]
    tints, lines = colours(list(result.paths)), dashes(list(result.paths))
    barriers = {name: [_number(value) for value in found] for name, found in result.barriers.items()}
    data = {
        "epochs": list(result.epochs),
        "unit": every[0].unit,
        "runs": [
            {
                "name": name,
                "colour": tints[name],
                "dash": PATTERNS[lines[name]],
                "paths": [path_state(name, path, measures, tints[name], lines[name], shown=False) for path in paths],
                "barriers": barriers[name],
            }
            for name, paths in result.paths.items()
        ],
        "panels": [panel_state(measure, {str(i): path for i, path in enumerate(every)}) for measure in measures],
        "barrier": {"title": f"barrier over the epochs ({every[0].unit}, {every[0].split})"}
        | axis_state(0.0, max(1e-3, *(value or 0.0 for found in barriers.values() for value in found))),
        "scale": [list(stop) for stop in SCALE],
    }
    return {"data": data, "epoch": result.epochs[-1], "alpha": 0.5, "active": next(iter(result.paths))}


def _number(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None
