"""Paths over the epochs of two runs, as JSON files."""

import json
from pathlib import Path as FilePath

from lmc.align.study.epochs import Epochs
from lmc.core.files import write_text
from lmc.errors import DataError
from lmc.landscape.paths.path_file import content, path_of, read

FORMAT = "lmc epochs 1"


def save(result: Epochs, file: str | FilePath) -> None:
    """Write all that `result` holds, as `Path.save` does for each of its paths."""
    paths = {name: [content(path) for path in paths] for name, paths in result.paths.items()}
    write_text(file, json.dumps({"format": FORMAT, "epochs": result.epochs, "paths": paths}))


def load(file: str | FilePath) -> Epochs:
    """Read what `save` wrote; `DataError` for any other file."""
    found = read(file, FORMAT, "epochs")
    try:
        epochs = tuple(int(epoch) for epoch in found["epochs"])
        paths = {name: tuple(path_of(path, file) for path in paths) for name, paths in found["paths"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} holds no epochs: {error!r}") from error
    if not epochs or any(len(each) != len(epochs) for each in paths.values()):
        raise DataError(f"{file}: {len(epochs)} epochs, paths for {[len(each) for each in paths.values()]}")
    return Epochs(epochs, paths)
