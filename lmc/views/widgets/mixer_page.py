"""What the merge mixer shows, as plain data, and the page that shows it without a kernel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmc.core.files import write_text
from lmc.merge.study.mixer import Mixer
from lmc.views.plots.style import CYCLE, GREY
from lmc.views.widgets.page import frame, module, page, style

MODULE, STYLE = module("mixer_explorer.js"), style("mixer_explorer.css")
TITLE = "A mixer for task vectors"


def state(mixer: Mixer) -> dict[str, Any]:
    """The state of the mixer: all that it draws, and its sliders, at an equal share of each task vector."""
    count = len(mixer.names)
    data = {
        "names": list(mixer.names),
        "colours": [CYCLE[i] if i < len(CYCLE) else GREY for i in range(count)],
        "tasks": list(mixer.tasks),
        "groups": list(mixer.groups),
        "levels": mixer.levels.tolist(),
        "grid": [round(100.0 * float(value), 3) for value in mixer.grid.reshape(-1)],
        "own": (100.0 * mixer.own).round(3).tolist(),
        "best": list(mixer.best),
    }
    return {"data": data, "coefficients": [[round(1.0 / count, 4)] * count for _ in mixer.groups]}


def save_html(file: str | Path, mixer: Mixer, *, title: str = TITLE, text: Sequence[str] = ()) -> None:
    """Write the mixer as one page under a title and paragraphs of `text`."""
    write_text(file, page(MODULE, STYLE, state(mixer), title=title, text=text))


def inline_html(content: Mapping[str, Any]) -> str:
    """The mixer in a frame, for a notebook that is read without a kernel; `content` is what `state` gives."""
    return frame(MODULE, STYLE, content, title=TITLE, height=560)
