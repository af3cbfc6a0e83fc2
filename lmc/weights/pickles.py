"""Files of `torch.save`, without any code in them, and the state dict inside what training programs save."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.errors import DataError
from lmc.weights.checkpoint import Checkpoint, Mapped, Stored
from lmc.weights.state import tied_names

# Entries that hold weights, as common training programs call them.
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "params_ema", "state_dict_ema", "ema")
LIGHTNING = "pytorch-lightning_version"


def read_pickle(file: Path, key: str | None = None) -> Checkpoint:
    """The state dict in a file of `torch.save`, mapped into memory.

    Args:
        file: its path.
        key: the entry with the weights, with dots for entries of entries (default: found).

    Raises:
        DataError: the file is damaged, holds code, no weights, or several sets of weights.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file}: refused: it is damaged or holds more than tensors, and unpickling that could run code; "
            "save model.state_dict() only, or as safetensors"
        ) from error
    except Exception as error:  # damaged archives fail in many ways
        raise DataError(f"{file}: truncated or not a file of torch.save ({error})") from error
    lightning = isinstance(content, Mapping) and LIGHTNING in content
    found, notes = _entry(file, content, key) if key else _unwrapped(file, content)
    held = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
    if not held:
        name, value = next(iter(found.items()))
        raise DataError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor; save the state dict alone")
    if left := [f"{name!r} ({type(value).__name__})" for name, value in found.items() if name not in held]:
        notes.append(f"left out: {', '.join(left[:5])}{' and more' if len(left) > 5 else ''}, not tensors")
    ties = tied_names(held)
    stored: dict[str, Stored] = {name: Mapped(file, tensor) for name, tensor in held.items() if name not in ties}
    opened = Checkpoint(file, stored, ties, notes, getattr(found, "_metadata", None))
    return _without_attribute(opened) if lightning else opened


def _entry(file: Path, content: Any, key: str) -> tuple[Mapping[Any, Any], list[str]]:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            known = f"it has {', '.join(map(repr, content))}" if isinstance(content, Mapping) else "it is no mapping"
            raise DataError(f"{file}: key={key!r}: no entry {part!r}; {known}")
        content = content[part]
    return _mapping(file, content), [f"weights taken from the entry {key!r}"]


def _unwrapped(file: Path, content: Any) -> tuple[Mapping[Any, Any], list[str]]:
    """The mapping with tensors in it: the content itself, or the only entry that is one."""
    found, path = _mapping(file, content), []
    while not any(isinstance(value, Tensor) for value in found.values()):
        inside = {name: value for name, value in found.items() if isinstance(value, Mapping) and _has_tensors(value)}
        named = [name for name in HOLDERS if name in inside] or list(inside)
        if len(named) > 1:
            known = ", ".join(repr(name) for name in named)
            raise DataError(f"{file}: several entries hold weights, {known}: say which with key=")
        if not named:
            break
        path.append(str(named[0]))
        found = inside[named[0]]
    return found, [f"weights taken from the entry {'.'.join(path)!r}"] if path else []


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    """True where weights are in it; the state of an optimiser has tensors too, under numbers."""
    return any(
        isinstance(name, str) and (isinstance(value, Tensor) or (isinstance(value, Mapping) and _has_tensors(value)))
        for name, value in content.items()
    )


def _mapping(file: Path, content: Any) -> Mapping[Any, Any]:
    if isinstance(content, Mapping) and content:
        return content
    what = "an empty one" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise DataError(f"{file}: expected a state dict, found {what}")


def _without_attribute(opened: Checkpoint) -> Checkpoint:
    """Lightning saves its own module, which holds the network as an attribute."""
    heads = {name.partition(".")[0] for name in opened}
    if len(heads) != 1 or not all("." in name for name in opened):
        return opened
    prefix = heads.pop() + "."
    return opened.under({n.removeprefix(prefix): n for n in opened}, f"prefix {prefix!r} of Lightning stripped")
