"""Checkpoints on disk, read one tensor at a time: safetensors, sharded folders, and `.pt` without any code in it.

A safetensors file is an 8-byte length, a JSON header with the dtype, shape and place of every tensor, and their bytes.
A sharded folder holds several of them and `model.safetensors.index.json`, whose `weight_map` says which tensor is in
which. A second name of one stored tensor (embedding and output head) is kept as `safetensors.torch.save_model` does:
an entry `second name: stored name` in the header's `__metadata__`.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmc.errors import DataError, InputError
from lmc.weights.checkpoints.formats import DTYPES, Mapped, Span, Stored, size_of
from lmc.weights.state import StateDict

INDEX = ".safetensors.index.json"
RECIPE = "merge.json"  # beside merged checkpoints: how they were made, and the checksums of their files
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class Checkpoint(Mapping[str, Tensor]):
    """Named tensors on disk; `checkpoint[name]` reads that one, on the CPU, into memory of its own.

    Goes wherever a state dict goes. Made by `open_checkpoint`.

    Attributes:
        path: the file or folder.
        stored: name -> where the tensor is, its shape and dtype.
        ties: second name of a stored tensor -> the name it is stored under.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored], ties: Mapping[str, str]) -> None:
        self.path = path
        self.stored = dict(stored)
        self.ties = dict(ties)

    def entry(self, name: str) -> Stored:
        """Where the tensor `name` is, under this or another name."""
        return self.stored[self.ties.get(name, name)]

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """The tensor `name`, or of the flattened tensor the values from `part.start` to `part.stop`."""
        return self.entry(name).read(part)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.stored
        yield from self.ties

    def __len__(self) -> int:
        return len(self.stored) + len(self.ties)

    def __contains__(self, name: object) -> bool:
        return name in self.stored or name in self.ties

    def __repr__(self) -> str:
        files = len(self.files)
        return (
            f"Checkpoint({str(self.path)!r}: {len(self)} tensors, {len(self.ties)} of them second names; "
            f"{readable(self.size)} in {files} file{'s' if files > 1 else ''})"
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return tuple(dict.fromkeys(entry.file for entry in self.stored.values()))

    @property
    def size(self) -> int:
        """Bytes of all stored tensors."""
        return sum(size_of(entry.dtype, entry.shape) for entry in self.stored.values())

    def outline(self) -> StateDict:
        """Tensors of the right names, shapes and dtypes that hold no values and take no memory."""
        return StateDict({name: torch.zeros((), dtype=(e := self.entry(name)).dtype).expand(e.shape) for name in self})

    def load(self) -> StateDict:
        """All tensors in memory; second names share the tensor of the first."""
        state = {name: entry.read() for name, entry in self.stored.items()}
        return StateDict({name: state[self.ties.get(name, name)] for name in self})

    def verify(self) -> None:
        """Compare every file with the checksums that were stored when it was written.

        Raises:
            InputError: there are none: only merged checkpoints have them.
            DataError: a file differs; it is named.
        """
        recipe = self.path / RECIPE
        if not recipe.is_file():
            raise InputError(f"{self.path}: no {RECIPE} with checksums to compare with")
        recorded = read_json(recipe).get("files")
        if not isinstance(recorded, dict):
            raise DataError(f"{recipe}: malformed: 'files' should say the checksum of each file")
        for file in self.files:
            if recorded.get(file.name) != checksum(file):
                raise DataError(f"{file}: not as it was written (its SHA-256 differs from the one in {recipe.name})")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open weights on disk without reading them.

    Args:
        path: a `.safetensors` file; a folder with `model.safetensors.index.json` and the shards it names, or with one
            `.safetensors` file; or a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`) that holds a state dict, at
            the top or under "state_dict". Code in a pickle is never run.

    Raises:
        DataError: a file that is missing, cut short, malformed, or holds more than tensors; an index that does not fit
            its shards. The file is named.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX):
        return _open_sharded(path)
    if path.suffix == ".safetensors":
        return Checkpoint(path, *_read_header(path))
    if path.suffix in PICKLES:
        return _open_pickle(path)
    raise DataError(f"{path}: expected a .safetensors file, {', '.join(PICKLES)}, or a folder of shards")


def readable(size: int) -> str:
    """A number of bytes as text."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size} B"


def checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `DataError` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _open_folder(folder: Path) -> Checkpoint:
    indices = sorted(folder.glob("*" + INDEX))
    if not indices:
        files = sorted(folder.glob("*.safetensors")) or sorted(f for f in folder.iterdir() if f.suffix in PICKLES)
        if len(files) != 1:
            found = f"{len(files)} weight files" if files else "none"
            raise DataError(f"{folder}: expected model{INDEX} or one weight file, found {found}; name one")
        opened = open_checkpoint(files[0])
        return Checkpoint(folder, opened.stored, opened.ties)
    if len(indices) > 1:
        raise DataError(f"{folder}: {len(indices)} index files; name one: {', '.join(i.name for i in indices)}")
    return _open_sharded(indices[0])


def _open_sharded(index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DataError(f"{index}: malformed: 'weight_map' should map tensor names to shard files")
    shards: dict[str, dict[str, Span]] = {}
    ties: dict[str, str] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if shard in ("", ".", "..") or Path(shard).name != shard or "\\" in shard:
            raise DataError(f"{index}: shard {shard!r} is not a plain file name; shards lie beside the index")
        file = index.parent / shard
        if not file.is_file():
            raise DataError(f"{file}: missing, but {index.name} places {_some(weight_map, shard)} there")
        shards[shard], tied = _read_header(file)
        ties |= tied
        for name in shards[shard]:
            if weight_map.get(name) != shard:
                raise DataError(f"{file}: holds {name}, which {index.name} places in {weight_map.get(name)!r}")
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise DataError(f"{index}: places {name} in {shard}, which does not hold it")
    return Checkpoint(index.parent, {name: shards[shard][name] for name, shard in weight_map.items()}, ties)


def _read_header(file: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """Where each tensor is, and the ties, of one safetensors file; that the file fits its header is checked."""
    try:
        with safe_open(file, "pt"):  # checks that the tensors fill the file, without gaps and overlaps
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: truncated or not a valid safetensors file ({error})") from error
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", None) or {}
    spans: dict[str, Span] = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise DataError(f"{file}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        start = 8 + length + entry["data_offsets"][0]
        spans[name] = Span(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    ties = {second: first for second, first in metadata.items() if second not in spans and first in spans}
    return spans, ties


def _open_pickle(file: Path) -> Checkpoint:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file}: refused: it is damaged or holds more than tensors, and unpickling that could run code; "
            "save model.state_dict() only, or as safetensors"
        ) from error
    except Exception as error:  # damaged archives fail in many ways
        raise DataError(f"{file}: truncated or not a file of torch.save ({error})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        what = "an empty one" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise DataError(f"{file}: expected a state dict, found {what}")
    stored: dict[str, Mapped] = {}
    ties: dict[str, str] = {}
    places: dict[tuple[object, ...], str] = {}
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise DataError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor; save the state dict alone")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = places.setdefault(place, name) if tensor.numel() > 0 else name
        if first == name:
            stored[name] = Mapped(file, tensor)
        else:
            ties[name] = first
    return Checkpoint(file, stored, ties)


def _some(weight_map: Mapping[str, str], shard: str) -> str:
    names = [name for name, place in weight_map.items() if place == shard]
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
