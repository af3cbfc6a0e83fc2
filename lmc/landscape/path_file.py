"""Paths as JSON files."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lmc.errors import DataError
from lmc.files import write_text
from lmc.landscape.path import Path
from lmc.landscape.predictions import Predictions

FORMAT = "lmc path 1"


def save(path: Path, file: str | FilePath) -> None:
    """Write all that `path` holds; numbers are written exactly, NaN as null."""
    shown = path.predictions
    content = {
        "format": FORMAT,
        "alphas": path.alphas.tolist(),
        "values": {s: {m: _optional(v) for m, v in measures.items()} for s, measures in path.values.items()},
        "own": path.own,
        "recalibrated": path.recalibrated,
        "repaired": path.repaired,
        "predictions": None if shown is None else {name: _plain(value) for name, value in vars(shown).items()},
    }
    write_text(file, json.dumps(content))


def load(file: str | FilePath) -> Path:
    """Read what `save` wrote; `DataError` for any other file."""
    try:
        content = json.loads(FilePath(file).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{file}: format {content['format']!r}, expected {FORMAT!r}")
        shown = content["predictions"]
        return Path(
            np.array(content["alphas"], dtype=np.float64),
            {s: {m: np.array(v, dtype=np.float64) for m, v in ms.items()} for s, ms in content["values"].items()},
            {s: {m: (v[0], v[1]) for m, v in ms.items()} for s, ms in content["own"].items()},
            content["recalibrated"],
            None if shown is None else Predictions(**{name: _array(name, value) for name, value in shown.items()}),
            content.get("repaired"),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} holds no path: {error!r}") from error


def _optional(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _array(name: str, value: Any) -> Any:
    if value is None or name == "split":
        return value
    return np.array(value, dtype=np.uint8 if name == "images" else np.int64)
