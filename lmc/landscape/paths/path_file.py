"""Paths as JSON files."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lmc.core.files import write_text
from lmc.errors import DataError
from lmc.landscape.evaluation.predictions import Predictions
from lmc.landscape.paths.path import Path

FORMAT = "lmc path 1"


def save(path: Path, file: str | FilePath) -> None:
    """Write all that `path` holds; numbers are written exactly, NaN as null."""
    write_text(file, json.dumps({"format": FORMAT, **content(path)}))


def load(file: str | FilePath) -> Path:
    """Read what `save` wrote; `DataError` for any other file."""
    return path_of(read(file, FORMAT, "path"), file)


def content(path: Path) -> dict[str, Any]:
    """What a path holds, as JSON takes it."""
    shown = path.predictions
    return {
        "alphas": path.alphas.tolist(),
        "values": {s: {m: _optional(v) for m, v in measures.items()} for s, measures in path.values.items()},
        "own": path.own,
        "recalibrated": path.recalibrated,
        "repaired": path.repaired,
        "predictions": None if shown is None else {name: _plain(value) for name, value in vars(shown).items()},
    }


def path_of(content: Any, file: str | FilePath) -> Path:
    """The path that `content` was made of; `DataError`, naming the file, for anything else."""
    try:
        shown = content["predictions"]
        return Path(
            np.array(content["alphas"], dtype=np.float64),
            {s: {m: np.array(v, dtype=np.float64) for m, v in ms.items()} for s, ms in content["values"].items()},
            {s: {m: (v[0], v[1]) for m, v in ms.items()} for s, ms in content["own"].items()},
            content["recalibrated"],
            None if shown is None else Predictions(**{name: _array(name, value) for name, value in shown.items()}),
            content.get("repaired"),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{file} holds no path: {error!r}") from error


def read(file: str | FilePath, expected: str, what: str) -> dict[str, Any]:
    """A JSON file of one format; `DataError` for any other file."""
    try:
        found = json.loads(FilePath(file).read_text(encoding="utf-8"))
        form = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no {what}: {error!r}") from error
    if form != expected:
        raise DataError(f"{file}: format {form!r}, expected {expected!r}")
    return found


def _optional(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _array(name: str, value: Any) -> Any:
    if value is None or name == "split":
        return value
    return np.array(value, dtype=np.uint8 if name == "images" else np.int64)
