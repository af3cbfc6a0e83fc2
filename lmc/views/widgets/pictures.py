"""Predictions and pictures as plain data, for what explorers show of a network."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmc.errors import InputError
from lmc.landscape.evaluation.measured import Live, Predictions

TILES = 24  # pictures that an explorer shows at once


def answer(exact: Live | None, place: Sequence[float], split: str) -> dict[str, Any]:
    """What the kernel says of a place: the values of a split (accuracy in percent), and what is predicted on the last.

    Raises:
        InputError: a result that was read from a file. WeightsError, DataError: see `Live`.
    """
    if exact is None:
        raise InputError("made without networks at hand")
    values = exact(*place)[split].values
    known = {m: (100.0 if m == "accuracy" else 1.0) * v if math.isfinite(v) else None for m, v in values.items()}
    shown = exact.predictions(*place)
    if shown is None:
        return {"values": known, "shown": None, "images": None}
    wrong = np.flatnonzero(shown.predicted[0] != shown.targets)[:TILES]
    images = None if shown.images is None else shown.images[wrong]
    few = Predictions(
        shown.split, shown.confusion, shown.index[wrong], shown.targets[wrong], shown.predicted[:, wrong], images
    )
    return {"values": known, "shown": shown_state(few), "images": images_state([few])}


def shown_state(shown: Predictions) -> dict[str, Any]:
    """Predictions at one or several points, as the ES module unpacks them."""
    classes = shown.confusion.shape[1]
    known = shown.confusion.sum(axis=(1, 2))
    return {
        "classes": classes,
        "count": int(known.max()),
        "confusion": encode(shown.confusion.astype("<u4")),
        "index": shown.index.tolist(),
        "targets": encode(shown.targets.astype(np.uint8)),
        "predicted": encode(np.where(shown.predicted < 0, 255, shown.predicted).astype(np.uint8)),
    }


def images_state(shown: Sequence[Predictions]) -> dict[str, Any] | None:
    """The pictures of all paths, each example once."""
    pictures: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
    for each in shown:
        if each.images is None:
            continue
        for example, target, image in zip(each.index.tolist(), each.targets.tolist(), each.images, strict=True):
            known = pictures.setdefault(example, (target, image))
            if known[0] != target or known[1].shape != image.shape:
                raise InputError(f"example {example} differs between the paths; show paths over the same data together")
    if not pictures:
        return None
    index = sorted(pictures)
    pixels = np.stack([pictures[example][1] for example in index])
    return {
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "channels": 3 if pixels.ndim == 4 else 1,
        "index": index,
        "pixels": encode(pixels),
    }


def encode(array: npt.NDArray[Any]) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
