"""What the explorer of mixtures shows, as plain data, and the page that shows it without a kernel."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lmc.core.files import write_text
from lmc.landscape.simplices.simplex_result import Simplex
from lmc.views.plots.style import CYCLE, GREY, SCALE
from lmc.views.widgets.page import frame, module, page, style

MODULE, STYLE = module("simplex_explorer.js"), style("simplex_explorer.css")
TITLE = "Soups of several networks"


def state(mixtures: Simplex) -> dict[str, Any]:
    """The state of the explorer: all that it draws, where it stands (the uniform soup), and what it shows."""
    count = len(mixtures.names)
    measures = list(mixtures.values[mixtures.split])
    data = {
        "names": list(mixtures.names),
        "colours": [CYCLE[i] if i < len(CYCLE) else GREY for i in range(count)],
        "scale": [list(stop) for stop in SCALE],
        "resolution": mixtures.resolution,
        "counts": _encode(mixtures.counts.astype(np.uint8)),
        "measures": [_measure(name, mixtures) for name in measures],
        "series": {
            split: {name: _encode((_unit(name) * found[name]).astype("<f4")) for name in measures}
            for split, found in mixtures.values.items()
        },
        "own": {
            split: {name: [_number(_unit(name) * value) for value in found[name]] for name in measures}
            for split, found in mixtures.own.items()
        },
        "best": {split: _best(mixtures, split) for split in mixtures.values},
    }
    shares = [round(1.0 / count, 6)] * count
    return {"data": data, "shares": shares, "measure": "loss", "split": mixtures.split}


def answer(mixtures: Simplex, shares: Sequence[float]) -> dict[str, Any]:
    """split -> measure -> value of one mixture, evaluated, in the units that are shown."""
    if mixtures.exact is None:
        return {"error": "read from a file, without the models"}
    total = sum(shares)
    found = mixtures.exact([share / total for share in shares])
    return {
        "values": {s: {m: _number(_unit(m) * value) for m, value in measures.items()} for s, measures in found.items()}
    }


def save_html(
    file: str | FilePath,
    mixtures: Simplex,
    *,
    title: str = TITLE,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write the explorer as one page under a title, paragraphs of `text` and a table of `rows` (column -> cell)."""
    write_text(file, page(MODULE, STYLE, state(mixtures), title=title, text=text, rows=rows))


def inline_html(content: Mapping[str, Any]) -> str:
    """The explorer in a frame, for a notebook that is read without a kernel; `content` is what `state` gives."""
    return frame(MODULE, STYLE, content, title=TITLE, height=max(640, 280 + 82 * len(content["shares"])))


def _measure(name: str, mixtures: Simplex) -> dict[str, Any]:
    """How a measure is drawn; one range for all splits, so that they can be compared."""
    everything = [
        values[name] for found in (mixtures.values, mixtures.own) for values in found.values() if name in values
    ]
    numbers = _unit(name) * np.concatenate([np.asarray(values, dtype=np.float64) for values in everything])
    known = numbers[np.isfinite(numbers)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    accuracy = name == "accuracy"
    return {
        "name": name,
        "title": "loss (nats)" if name == "loss" else "accuracy (%)" if accuracy else name,
        "unit": " %" if accuracy else "",
        "digits": 1 if accuracy else 3,
        "log": name == "loss" and low > 0.0,
        "high_is_good": accuracy,
        "low": low,
        "high": high if high > low else low + 1e-3,
    }


def _best(mixtures: Simplex, split: str) -> list[float]:
    if np.isnan(mixtures.losses[split]).all():
        return [1.0 / len(mixtures.names)] * len(mixtures.names)
    return list(mixtures.best_on(split).shares.values())


def _unit(measure: str) -> float:
    return 100.0 if measure == "accuracy" else 1.0


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
