"""Opening weights on disk, whatever form they have: safetensors, sharded folders, and files of `torch.save`.

A safetensors file is an 8-byte length, a JSON header with the dtype, shape and place of every tensor, and their bytes.
A sharded folder holds several files and an index, such as `model.safetensors.index.json`, whose `weight_map` gives the
file of each tensor. A further name of one stored tensor (embedding and output head) is kept as
`safetensors.torch.save_model` does: an entry `further name: stored name` in the header's `__metadata__`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmc.core.context import warn
from lmc.errors import DataError, InputError
from lmc.weights.checkpoints.checkpoint import Checkpoint
from lmc.weights.checkpoints.folders import INDEX, PICKLES, one_of_shards, open_folder, open_sharded
from lmc.weights.checkpoints.formats import DTYPES, Extent, Stored
from lmc.weights.checkpoints.pickles import read_pickle
from lmc.weights.order import natural

# What wrappers of modules put before or between names.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
INSIDE = WRAPPERS[1:]  # also in the middle of a name, where a submodule was wrapped


def open_checkpoint(
    path: str | Path, *, key: str | None = None, prefix: str | None = None, dtype: torch.dtype | None = None
) -> Checkpoint:
    """Open weights on disk without reading them. Names come in a stable order: numbers by value in safetensors files
    and shards, as stored in others.

    Args:
        path: a safetensors file; a file of `torch.save` that holds a state dict, at the top or in an entry such as
            "state_dict" or "model" (code in a pickle is never run); or a folder with one of them, or with shards and
            their index. Files of optimisers and schedulers beside them are passed over.
        key: the entry of a `torch.save` file that holds the weights (default: the only one).
        prefix: what is stripped from every name; names without it are left out (default: that of wrappers such as
            DataParallel, `torch.compile` and Lightning, where all names have it; "" strips nothing).
        dtype: what floating-point tensors are cast to when read (default: as stored).

    Returns:
        The opened checkpoint; its `notes`, which it prints, list what was unwrapped, stripped or left out.

    Raises:
        DataError: a file that is missing, cut short, malformed, or holds more than tensors; an index that does not fit
            its shards. The file is named.
        InputError: a `prefix` that no name has.
    """
    path = Path(path)

    def open_file(file: Path) -> Checkpoint:
        return _open_file(file, key)

    if path.is_dir():
        opened = open_folder(path, open_file)
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    elif INDEX.match(path.name):
        opened = open_sharded(path, open_file)
    else:
        if count := one_of_shards(path):
            warn(f"{path}: one of {count} shards; open the folder for the whole model")
        opened = open_file(path)
    opened = _unwrapped(opened) if prefix is None else _stripped(opened, prefix)
    return opened if dtype is None else opened.to(dtype)


def _open_file(file: Path, key: str | None) -> Checkpoint:
    with open(file, "rb") as opened:
        start = opened.read(9)
    if start[:4] == b"GGUF":
        raise DataError(f"{file}: GGUF holds quantised codes under other names; merge the model it was made from")
    if file.suffix == ".safetensors" or start[8:] == b"{":
        return Checkpoint(file, *_read_header(file))
    if file.suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02"):
        return read_pickle(file, key)
    raise DataError(
        f"{file}: expected a .safetensors file, a file of torch.save ({', '.join(PICKLES)}), or a folder of them"
    )


def _read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Places of the tensors and ties of one safetensors file; checks that the file fits its header."""
    try:
        with safe_open(file, "pt"):  # checks that the tensors fill the file, without gaps and overlaps
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: truncated or not a valid safetensors file ({error})") from error
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", None) or {}
    found: dict[str, Stored] = {}
    for name in sorted(header, key=natural):  # headers are written in the order of a hash table
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise DataError(f"{file}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        start = 8 + length + entry["data_offsets"][0]
        found[name] = Extent(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    ties = {second: first for second, first in metadata.items() if second not in found and first in found}
    return found, ties


def _unwrapped(opened: Checkpoint) -> Checkpoint:
    """Without what wrappers of modules add to names: before all of them, or in the middle of some."""
    names = {name: name for name in opened}
    if "n_averaged" in names and all(n.startswith("module.") for n in names if n != "n_averaged"):
        del names["n_averaged"]  # the counter of torch.optim.swa_utils.AveragedModel
    found: list[str] = []
    while prefix := next((p for p in WRAPPERS if names and all(n.startswith(p) for n in names)), ""):
        names = {new.removeprefix(prefix): name for new, name in names.items()}
        found.append(prefix)
    for word in INSIDE:
        if any(word in name for name in names):
            shorter = {new.replace(word, ""): name for new, name in names.items()}
            if len(shorter) == len(names):
                names = shorter
                found.append(word)
    if not found:
        return opened
    return opened.under(names, f"prefix {', '.join(map(repr, found))} of wrapped modules stripped")


def _stripped(opened: Checkpoint, prefix: str) -> Checkpoint:
    if not prefix:
        return opened
    names = {name.removeprefix(prefix): name for name in opened if name.startswith(prefix) and name != prefix}
    if not names:
        raise InputError(f"{opened.path}: no name begins with prefix={prefix!r}; names are like {next(iter(opened))!r}")
    rest = len(opened) - len(names)
    left = f", {rest} names without it left out" if rest else ""
    return opened.under(names, f"prefix {prefix!r} stripped{left}")
