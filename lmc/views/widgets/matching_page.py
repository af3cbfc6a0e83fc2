"""What the matching explorer shows, as plain data, and the page that shows it without a kernel."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lmc.align.study.inspect import MatchedGroup, Matching
from lmc.core.files import write_text
from lmc.views.plots.style import SCALE
from lmc.views.widgets.page import frame, module, page, style

MODULE, STYLE = module("matching_explorer.js"), style("matching_explorer.css")
TITLE = "From naive to aligned, unit by unit"


def state(matching: Matching, group: str) -> dict[str, Any]:
    """The state of the explorer: all that it draws, how many units are in place (none), and the group it shows."""
    paths = matching.paths
    data = {
        "shares": matching.shares.tolist(),
        "split": paths[0].split if paths else "",
        "alphas": paths[0].alphas.tolist() if paths else [],
        "paths": [[_number(loss) for loss in path.losses[path.split]] for path in paths],
        "barriers": [_number(barrier) for barrier in matching.barriers],
        "groups": [_group(one) for one in matching.groups.values()],
        "scale": [list(stop) for stop in SCALE],
    }
    return {"data": data, "placed": 0.0, "group": group}


def save_html(
    file: str | FilePath,
    matching: Matching,
    group: str,
    *,
    title: str = TITLE,
    text: Sequence[str] = (),
    rows: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write the explorer as one page under a title, paragraphs of `text` and a table of `rows` (column -> cell)."""
    write_text(file, page(MODULE, STYLE, state(matching, group), title=title, text=text, rows=rows))


def inline_html(content: Mapping[str, Any]) -> str:
    """The explorer in a frame, for a notebook that is read without a kernel; `content` is what `state` gives."""
    pictures = any(group["fields"] for group in content["data"]["groups"])
    return frame(MODULE, STYLE, content, title=TITLE, height=980 if pictures else 720)


def _group(group: MatchedGroup) -> dict[str, Any]:
    # A colour for everything from "nothing in common" to what the most alike pairs reach.
    high = max(0.1, float(np.quantile(group.similarity[-1].diagonal(), 0.9)))
    return {
        "name": group.name,
        "size": group.size,
        "shown": group.similarity.shape[1],
        "index": group.index.tolist(),
        "order": group.order.tolist(),
        "similarity": _encode(np.round(255 * (group.similarity / high).clip(0.0, 1.0)).astype(np.uint8)),
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
    return {"count": count, "height": height, "width": width, "a": _encode(a), "b": _encode(b)}


def _number(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
