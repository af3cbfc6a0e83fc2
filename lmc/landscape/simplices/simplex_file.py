"""Mixtures of several models as JSON files."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lmc.core.files import write_text
from lmc.errors import DataError
from lmc.landscape.simplices.lattice import lattice
from lmc.landscape.simplices.simplex_result import Mixture, Simplex, Triangle

FORMAT = "lmc mixtures 1"


def save(mixtures: Simplex, file: str | FilePath) -> None:
    """Write all but `exact`; numbers are written exactly, NaN as null."""
    content = {
        "format": FORMAT,
        "names": mixtures.names,
        "resolution": mixtures.resolution,
        "values": {s: {m: _plain(values) for m, values in found.items()} for s, found in mixtures.values.items()},
        "own": {s: {m: _plain(values) for m, values in found.items()} for s, found in mixtures.own.items()},
        "uniform": {
            "shares": mixtures.uniform.shares,
            "values": {s: dict(zip(v, _plain(v.values()), strict=True)) for s, v in mixtures.uniform.values.items()},
        },
        "done": mixtures.done.tolist(),
        "recalibrated": mixtures.recalibrated,
    }
    write_text(file, json.dumps(content))


def load(file: str | FilePath) -> Simplex:
    """Read what `save` wrote; `DataError` for any other file."""
    try:
        content = json.loads(FilePath(file).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{file}: format {content['format']!r}, expected {FORMAT!r}")
        names = tuple(content["names"])
        uniform = content["uniform"]
        return (Triangle if len(names) == 3 else Simplex)(
            names,
            lattice(len(names), content["resolution"]),
            {s: {m: _array(values) for m, values in found.items()} for s, found in content["values"].items()},
            {s: {m: tuple(_array(v).tolist()) for m, v in found.items()} for s, found in content["own"].items()},
            Mixture(
                uniform["shares"],
                {s: dict(zip(v, _array(list(v.values())).tolist(), strict=True)) for s, v in uniform["values"].items()},
            ),
            np.array(content["done"], dtype=bool),
            content["recalibrated"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} holds no mixtures: {error!r}") from error


def _plain(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _array(values: Any) -> Any:
    return np.array(values, dtype=np.float64)
