"""Opening weights on disk, whatever form they have: safetensors, sharded folders, and files of `torch.save`.

A safetensors file is an 8-byte length, a JSON header with the dtype, shape and place of every tensor, and their bytes.
A sharded folder holds several files and an index, such as `model.safetensors.index.json`, whose `weight_map` gives the
file of each tensor. A further name of one stored tensor (embedding and output head) is kept as
`safetensors.torch.save_model` does: an entry `further name: stored name` in the header's `__metadata__`. Files of
`torch.save` are read without any code in them; what training programs save has the state dict inside.
"""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmc.core.context import warn
from lmc.errors import DataError, InputError
from lmc.weights.adapter import CONFIG, Adapter
from lmc.weights.checkpoint import DTYPES, Checkpoint, Extent, Mapped, Stored, read_json
from lmc.weights.state import factor, natural, tied_names

# What wrappers of modules put before or between names.
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # also where a submodule was wrapped
WRAPPERS = ("module.", "_forward_module.", *INSIDE)
INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[\w-]+)?\.json$")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.[\w-]+)?\.\w+$")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What a training run keeps beside the weights.
OTHERS = re.compile(
    r"^(optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state|dl_state_dict|"
    r"custom_checkpoint|events\.)"
)
# Beginnings and endings of files that hold no weights we read, and the way out.
POINTER = b"version https://git-lfs"
PAGES = (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml")
TENSORFLOW = "weights of TensorFlow or Keras; save them from a model of PyTorch, with the library that they belong to"
ELSEWHERE = {
    **dict.fromkeys((".h5", ".hdf5", ".keras", ".pb", ".tflite", ".index"), TENSORFLOW),
    ".msgpack": "weights of Flax; save them from a model of PyTorch, with the library that they belong to",
    ".onnx": "a graph of ONNX; take the state dict of the module that it was exported from",
    **dict.fromkeys((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z"), "an archive; unpack it first"),
    ".npy": "a single array; keep arrays together by name, numpy.savez(file, **state)",
    ".pkl": "a pickle, which could run code; save the tensors with torch.save or safetensors",
    ".pickle": "a pickle, which could run code; save the tensors with torch.save or safetensors",
    ".pt2": "an exported program, which holds code; save its state dict",
}
USUAL = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model", "weights")
Open = Callable[[Path], Checkpoint]


def open_checkpoint(
    path: str | Path, *, key: str | None = None, prefix: str | None = None, dtype: torch.dtype | None = None
) -> Checkpoint:
    """Open weights on disk without reading them. Names come in a stable order: numbers by value in safetensors files
    and shards, as stored in others.

    Args:
        path: a safetensors file; an archive of `numpy.savez`; a file of `torch.save` that holds a state dict, at the top or in an entry such as
            "state_dict" or "model" (code in a pickle is never run); or a folder with one of them, or with shards and
            their index. Files of optimisers and schedulers beside them are passed over. The folder of an adapter (LoRA, as
            PEFT writes it) gives an `Adapter`.
        key: the entry of a `torch.save` file that holds the weights (default: the only one).
        prefix: what is stripped from every name; names without it are left out (default: that of wrappers such as
            DataParallel, `torch.compile` and Lightning, where all names have it; "" strips nothing).
        dtype: what floating-point tensors are cast to when read (default: as stored).

    Returns:
        The opened checkpoint; its `notes`, which it prints, list what was unwrapped, stripped or left out.

    Raises:
        DataError: a file that is missing, cut short, malformed, or holds more than tensors; an index that does not fit
            its shards. The file is named.
        InputError: a `prefix` that no name has; a `key` for a safetensors file, which has no entries.

    Example:
        >>> import lmc, tempfile
        >>> from safetensors.torch import save_file
        >>> file = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_file(lmc.models.mlp(64, [32], 10).state_dict(), file)
        >>> lmc.open_checkpoint(file)
        Checkpoint('.../model.safetensors': 4 tensors; 9.64 kB in 1 file)
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
    opened = opened if dtype is None else opened.to(dtype)
    folder = path if path.is_dir() else path.parent
    return Adapter(opened, folder) if (folder / CONFIG).is_file() and factor(opened) else opened


def _open_file(file: Path, key: str | None) -> Checkpoint:
    with open(file, "rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        raise DataError(f"{file}: a pointer of git-lfs, not the file that it stands for; fetch that with git lfs pull")
    if start.startswith(PAGES):
        raise DataError(f"{file}: a web page, as failed downloads leave it; download the file again")
    if start[:4] == b"GGUF":
        raise DataError(f"{file}: GGUF holds quantised codes under other names; merge the model it was made from")
    if file.suffix == ".safetensors" or start[8:9] == b"{":
        if key is not None:
            raise InputError(
                f"{file}: key={key!r}: a safetensors file holds tensors alone, and no entries of that name"
            )
        return Checkpoint(file, *_read_header(file))
    if file.suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02"):
        return _read_arrays(file) if _is_of_tensors(file) else read_pickle(file, key)
    if file.suffix in ELSEWHERE:
        raise DataError(f"{file}: {ELSEWHERE[file.suffix]}")
    raise DataError(
        f"{file}: expected a .safetensors file, a file of torch.save ({', '.join(PICKLES)}), or a folder of them"
    )


def _is_of_tensors(file: Path) -> bool:
    """Whether an archive is one of numpy's; `DataError` for one of code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any("/code/" in name for name in names) and any(name.endswith("constants.pkl") for name in names):
        raise DataError(
            f"{file}: a TorchScript archive, which holds code; save torch.jit.load({file.name!r}).state_dict()"
        )
    if any("/models/" in name or name.startswith("models/") for name in names):
        raise DataError(
            f"{file}: an exported program, which holds code; save torch.export.load({file.name!r}).state_dict"
        )
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_arrays(file: Path) -> Checkpoint:
    """The arrays of an archive that `numpy.savez` wrote."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: an archive of numpy with more than numbers in it ({error})") from error
    return Checkpoint(file, {name: Mapped(file, tensor) for name, tensor in found.items()}, {})


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


def open_folder(folder: Path, open_file: Open) -> Checkpoint:
    """The weights in a folder: shards with an index, or the one file of weights; safetensors before pickles."""
    files = sorted((f for f in folder.iterdir() if f.is_file() and not OTHERS.match(f.name)), key=lambda f: f.name)
    if (folder / "model_index.json").is_file() and not any(f.suffix in (".safetensors", *PICKLES) for f in files):
        parts = [f.name for f in sorted(folder.iterdir()) if f.is_dir()]
        raise DataError(f"{folder}: a pipeline of several models; name the folder of one: {', '.join(parts)}")
    if any(f.suffix == ".distcp" for f in files):
        raise DataError(
            f"{folder}: a distributed checkpoint; convert it first, "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    for ending in ("safetensors", "bin"):
        indices = [f for f in files if (match := INDEX.match(f.name)) and match[1] == ending]
        if len(indices) > 1:
            raise DataError(f"{folder}: {len(indices)} index files; name one: {', '.join(i.name for i in indices)}")
        if indices:
            return open_sharded(indices[0], open_file)
        known = [f for f in files if f.suffix == ".safetensors" or (ending == "bin" and f.suffix in PICKLES)]
        if known:
            return _open_one(folder, known, open_file)
    if other := next((f for f in files if f.suffix in ELSEWHERE), None):
        raise DataError(f"{folder}: expected weights, found none but {other.name}: {ELSEWHERE[other.suffix]}")
    raise DataError(f"{folder}: expected model.safetensors.index.json or one weight file, found none; name one")


def _open_one(folder: Path, files: list[Path], open_file: Open) -> Checkpoint:
    usual = [file for file in files if file.stem in USUAL]
    if len(files) > 1 and len(usual) != 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        lost = "the index of these shards is missing" if any(SHARD.match(f.name) for f in files) else "name one"
        raise DataError(
            f"{folder}: expected an index or one weight file, found {len(files)} weight files: {names}; {lost}"
        )
    file = files[0] if len(files) == 1 else usual[0]
    opened = open_file(file)
    others = [other.name for other in files if other != file]
    notes = [f"read from {file.name}, not from {', '.join(others)}"] if others else []
    return Checkpoint(folder, opened.stored, opened.ties, [*notes, *opened.notes], opened.metadata)


def open_sharded(index: Path, open_file: Open) -> Checkpoint:
    """The shards that an index names. A name that a shard holds and the index omits is taken as well.

    Raises:
        DataError: the index is malformed, names files elsewhere or missing, or places a name where it is not.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DataError(f"{index}: malformed: 'weight_map' should map tensor names to shard files")
    stored: dict[str, Stored] = {}
    ties: dict[str, str] = {}
    notes: list[str] = []
    opened: dict[str, Checkpoint] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise DataError(f"{index}: shard {shard!r} is not a plain file name; shards are beside the index")
        file = index.parent / shard
        if not file.is_file():
            raise DataError(f"{file}: missing, but {index.name} places {_some(weight_map, shard)} there")
        opened[shard] = open_file(file)
        for name in opened[shard]:
            if weight_map.get(name, shard) != shard:
                raise DataError(f"{file}: holds {name}, which {index.name} places in {weight_map.get(name)!r}")
        stored |= opened[shard].stored
        ties |= opened[shard].ties
        further = [name for name in opened[shard].stored if name not in weight_map]
        if further:
            more = f" and {len(further) - 1} more" if len(further) > 1 else ""
            notes.append(f"{shard} holds {further[0]}{more}, which {index.name} omits; read as well")
    for name, shard in weight_map.items():
        if name not in opened[shard]:
            raise DataError(f"{index}: places {name} in {shard}, which does not hold it")
    ordered = {name: stored[name] for name in sorted(stored, key=natural)}
    metadata = next((shard.metadata for shard in opened.values() if shard.metadata is not None), None)
    return Checkpoint(index.parent, ordered, ties, notes, metadata)


def one_of_shards(file: Path) -> str:
    """The number of shards that a file is one of, as text; empty for a file of its own."""
    match = SHARD.match(file.name)
    return match[3].lstrip("0") if match and int(match[3]) > 1 else ""


def _some(weight_map: dict[str, str], shard: str) -> str:
    names = [name for name, place in weight_map.items() if place == shard]
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


# Entries that hold weights, as common training programs call them.
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "params_ema", "state_dict_ema", "ema")
LIGHTNING = "pytorch-lightning_version"
# Classes of settings and of plain values that training programs save beside the weights. Nothing of them is imported.
RECORDS = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.\w*Path|datetime\.\w+|uuid\.UUID|decimal\.Decimal|"
    r"collections\.defaultdict|builtins\.(dict|list|set|tuple|int|float|str|bool|complex)|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)|"
    r"(omegaconf|yacs|easydict|addict|ml_collections|mmcv|mmengine|lightning|lightning_fabric|pytorch_lightning)\..+)"
)
REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
STANDS_IN = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")  # torch is new enough for classes by name


class Settings:
    """A stand-in for settings in a file: a mapping, which takes entries and attributes."""

    def __new__(cls, *_given: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class Value:
    """A stand-in for a value of numpy in a file: it takes what it is given and does nothing."""

    def __new__(cls, *_given: Any) -> "Value":
        return super().__new__(cls)

    def __init__(self, *_given: Any) -> None:
        """Pass over what it is made of."""

    def __setstate__(self, state: Any) -> None:
        """Pass over what it holds."""


def _standing_in(names: list[str]) -> AbstractContextManager[Any]:
    """While it is open, our own classes stand in for those of these names."""
    stubs: list[Any] = [(Value if name.startswith("numpy.") else Settings, name) for name in names]
    return torch.serialization.safe_globals(stubs) if names else nullcontext()


def read_pickle(file: Path, key: str | None = None) -> Checkpoint:
    """The state dict in a file of `torch.save`, mapped into memory.

    Args:
        file: its path.
        key: the entry with the weights, with dots for entries of entries (default: found).

    Raises:
        DataError: the file is damaged, holds code, no weights, or several sets of weights.
    """
    content, records = _load(file)
    lightning = isinstance(content, Mapping) and LIGHTNING in content
    found, notes = _entry(file, content, key) if key else _weights_in(file, content)
    held = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
    if not held:
        name, value = next(iter(found.items()))
        raise DataError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor; save the state dict alone")
    if left := [f"{name!r} ({type(value).__name__})" for name, value in found.items() if name not in held]:
        notes.append(f"left out: {', '.join(left[:5])}{' and more' if len(left) > 5 else ''}, not tensors")
    for name, tensor in held.items():
        if tensor.is_meta:
            raise DataError(f"{file}: {name} is on the meta device, and was saved without values")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise DataError(f"{file}: {name} is no dense tensor; save it as one, .to_dense()")
    if records:
        notes.append(f"passed over: {', '.join(records)}")
    ties = tied_names(held)
    stored: dict[str, Stored] = {name: Mapped(file, tensor) for name, tensor in held.items() if name not in ties}
    opened = Checkpoint(file, stored, ties, notes, getattr(found, "_metadata", None))
    return _without_attribute(opened) if lightning else opened


def _load(file: Path) -> tuple[Any, list[str]]:
    """The content of a file of `torch.save`, and which classes of settings were passed over."""
    records: list[str] = []
    while True:
        try:
            with _standing_in(records):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)), records
        except pickle.UnpicklingError as error:
            match = REFUSED.search(str(error))
            name = match[1] if match else ""
            name = f"builtins.{name}" if name and "." not in name else name  # torch names these without their module
            if STANDS_IN and RECORDS.fullmatch(name) and name not in records:
                records.append(name)
                continue
            what = f"it holds {name}" if name else "it is damaged or holds more than tensors"
            raise DataError(
                f"{file}: refused: {what}, and unpickling that could run code; save model.state_dict() only, or as safetensors"
            ) from error
        except Exception as error:  # damaged archives fail in many ways
            raise DataError(f"{file}: truncated or not a file of torch.save ({error})") from error


def _entry(file: Path, content: Any, key: str) -> tuple[Mapping[Any, Any], list[str]]:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            known = f"it has {', '.join(map(repr, content))}" if isinstance(content, Mapping) else "it is no mapping"
            raise DataError(f"{file}: key={key!r}: no entry {part!r}; {known}")
        content = content[part]
    return _mapping(file, content), [f"weights taken from the entry {key!r}"]


def _weights_in(file: Path, content: Any) -> tuple[Mapping[Any, Any], list[str]]:
    """The mapping with tensors in it: the content itself, or the only entry that is one; single numbers beside it (the loss
    of an epoch) are no weights."""
    found, path = _mapping(file, content), []
    while True:
        inside = {name: value for name, value in found.items() if isinstance(value, Mapping) and _has_tensors(value)}
        named = [name for name in HOLDERS if name in inside] or list(inside)
        here = [value for value in found.values() if isinstance(value, Tensor)]
        if here and not (named and all(tensor.ndim == 0 for tensor in here)):
            break
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
