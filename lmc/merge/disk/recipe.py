"""The record of a merge: method, options and inputs, by which merges are compared and repeated."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.core.files import __version__, write_text
from lmc.errors import InputError
from lmc.merge.disk.stacking import Stack
from lmc.merge.engine.method import MergeFunction
from lmc.symmetry.groups.action import order_of_units
from lmc.weights import ModelOrWeights, as_weights
from lmc.weights.adapter import Adapted
from lmc.weights.checkpoint import RECIPE, Checkpoint, as_bytes, read_json

MergeRecipe = dict[str, Any]


def make_recipe(
    method: MergeFunction,
    options: Mapping[str, Any],
    models: Sequence[ModelOrWeights],
    base: ModelOrWeights | None,
    shard_size: int,
    dtype: torch.dtype | None,
) -> MergeRecipe:
    """All that the result depends on, as JSON holds it."""
    recipe = {
        "method": method.__name__,
        "rule": source(method),
        "options": {key: _plain(value, key) for key, value in options.items()},
        "models": [_fingerprint(model) for model in models],
        "base": None if base is None else _fingerprint(base),
        "shard_size": shard_size,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "lmc": __version__,
        "torch": str(torch.__version__),
    }
    return json.loads(json.dumps(recipe))


def record(
    folder: Path, recipe: MergeRecipe, files: Mapping[str, str], inputs: Mapping[str, str] | None = None
) -> None:
    """Store the recipe, and the checksums of the files that are complete and, at the end, of those that were read."""
    read = {} if inputs is None else {"inputs": inputs}
    write_text(folder / RECIPE, json.dumps(recipe | read | {"files": files}, indent=2) + "\n")


def recorded(folder: Path) -> tuple[MergeRecipe | None, dict[str, str]]:
    """The recipe and checksums that `record` has stored in a folder; no recipe if there is none."""
    if not (folder / RECIPE).is_file():
        return None, {}
    recipe = read_json(folder / RECIPE)
    recipe.pop("inputs", None)
    return recipe, recipe.pop("files", {})


def source(method: MergeFunction) -> str:
    """The SHA-256 of the rule's source: a method changed between an interrupt and now is another method."""
    try:
        text = inspect.getsource(method.method.rule)
    except (OSError, TypeError):  # typed into a bare interpreter
        text = method.method.rule.__qualname__
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(model: ModelOrWeights) -> MergeRecipe:
    """Path, sizes and times of files, and the SHA-256 of the order of units that are moved as they are read; or the SHA-256
    of what is in memory."""
    if isinstance(model, Checkpoint) and not (isinstance(model, Adapted) and model.base is None):
        files = {file: file.stat() for file in model.files}
        named = {str(file.resolve()): [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()}
        if isinstance(model, Stack):
            return {"stack": [[str(path), start, stop] for path, start, stop in model.slices], "files": named}
        if isinstance(model, Adapted):
            return {"adapter": str(model.path.resolve()), "on": str(Path(str(model.base)).resolve()), "files": named}
        moved = order_of_units(model)
        return {
            "path": str(model.path.resolve()),
            "files": {file.name: [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()},
            **({"units moved": moved} if moved else {}),
        }
    digest = hashlib.sha256()
    for name, tensor in as_weights(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(as_bytes(tensor.cpu().contiguous()))
    return {"in memory": digest.hexdigest()}


def _plain(value: Any, key: str) -> Any:
    """An option as JSON: numbers, texts, lists, mappings; tensors as lists, methods by name and source."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, key) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_plain(v, key) for v in value]
    if hasattr(value, "method"):
        return {"method": value.__name__, "rule": source(value)}
    raise InputError(f"{key}: {type(value).__name__} cannot be stored in the recipe; use numbers, texts and lists")
