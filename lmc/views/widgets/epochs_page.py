"""What the training-time explorer shows, as plain data, and the page that shows it without a kernel."""

import math
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from lmc.align.study.epochs import Epochs
from lmc.core.files import write_text
from lmc.views.plots.style import SCALE, colours
from lmc.views.widgets.page import frame, module, page, style
from lmc.views.widgets.path_page import axis_state, panel_state, path_state

MODULE, STYLE = module("epochs_explorer.js"), style("epochs_explorer.css")
TITLE = "Two runs, epoch by epoch"


def state(result: Epochs) -> dict[str, Any]:
    """The state of the explorer: all that it draws, standing at the last epoch, halfway between the runs."""
    every = [path for paths in result.paths.values() for path in paths]
    measures = ["loss", *(["accuracy"] if all(path.accuracies for path in every) else [])]
    tints = colours(list(result.paths))
    barriers = {name: [_number(value) for value in found] for name, found in result.barriers.items()}
    data = {
        "epochs": list(result.epochs),
        "runs": [
            {
                "name": name,
                "colour": tints[name],
                "paths": [path_state(name, path, measures, tints[name], shown=False) for path in paths],
                "barriers": barriers[name],
            }
            for name, paths in result.paths.items()
        ],
        "panels": [panel_state(measure, {str(i): path for i, path in enumerate(every)}) for measure in measures],
        "barrier": {"title": f"barrier over the epochs (nats, {every[0].split})"}
        | axis_state(0.0, max(1e-3, *(value or 0.0 for found in barriers.values() for value in found))),
        "scale": [list(stop) for stop in SCALE],
    }
    return {"data": data, "epoch": result.epochs[-1], "alpha": 0.5, "active": next(iter(result.paths))}


def save_html(file: str | FilePath, result: Epochs) -> None:
    """Write the explorer as one page."""
    write_text(file, page(MODULE, STYLE, state(result), title=TITLE))


def inline_html(content: Mapping[str, Any]) -> str:
    """The explorer in a frame, for a notebook that is read without a kernel; `content` is what `state` gives."""
    return frame(MODULE, STYLE, content, title=TITLE, height=720)


def _number(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None
