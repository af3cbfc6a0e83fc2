"""Opened checkpoints: named tensors on disk, read whole or in chunks, one at a time, and what was done to find them."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lmc.errors import DataError, InputError, WeightsError
from lmc.weights.state import DEQUANTISE, QUANTISED, StateDict, narrowed

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
RECIPE = "merge.json"  # beside merged checkpoints: how they were made, and the checksums of their files


class Stored(Protocol):
    """One tensor in a file: what is known without reading it, and how to read it."""

    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    def read(self, chunk: slice | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Extent:
    """A tensor in a safetensors file, from byte `start` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """The number of values."""
        return torch.Size(self.shape).numel()

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        first, shape = (0, self.shape) if chunk is None else (chunk.start, (chunk.stop - chunk.start,))
        tensor = torch.empty(shape, dtype=self.dtype)
        if tensor.numel() == 0:
            return tensor
        target = as_bytes(tensor)
        begin = self.start + first * self.dtype.itemsize
        if chunk is not None and hasattr(os, "RWF_NOWAIT"):
            count = _at_hand(self.file, begin, target)
            begin, target = begin + count, target[count:]
        if target:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(begin)
                while count := file.readinto(target):  # at most 2 GB at a time
                    target = target[count:]
        if target:
            raise DataError(f"{self.file}: cut short since it was opened")
        return tensor


AHEAD = 8  # chunks that the system is asked to fetch


def _at_hand(path: Path, begin: int, target: memoryview) -> int:
    """Read what the system has in memory, and say how many bytes these are; where some lack, it fetches further chunks too."""
    file = os.open(path, os.O_RDONLY)
    try:
        try:
            count = os.preadv(file, [target], begin, os.RWF_NOWAIT)
        except OSError:  # nothing is there, or the file system does not tell
            count = 0
        if count < target.nbytes:
            os.posix_fadvise(file, begin + count, AHEAD * target.nbytes, os.POSIX_FADV_WILLNEED)
        return count
    finally:
        os.close(file)


@dataclass(frozen=True)
class Mapped:
    """A tensor of a `.pt` file that is mapped into memory."""

    file: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return self.tensor.numel()

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        return self.tensor.detach().clone() if chunk is None else flat(self.tensor.detach(), chunk).clone()


@dataclass(frozen=True, eq=False)
class Remade:
    """A tensor that is made from a stored one as it is read: of its file, dtype and shape, unless a subclass says otherwise."""

    stored: Stored

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def size(self) -> int:
        """The number of values."""
        return torch.Size(self.shape).numel()

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cast(Remade):
    """A stored tensor that is read in the dtype `into`; `name` is for errors."""

    into: torch.dtype
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return self.into

    def read(self, chunk: slice | None = None) -> Tensor:
        return narrowed(self.stored.read(chunk), self.into, self.name)


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def flat(tensor: Tensor, chunk: slice) -> Tensor:
    """The values from `chunk.start` to `chunk.stop` of a flattened tensor, without copying the others."""
    if tensor.is_contiguous():
        return tensor.view(-1)[chunk]
    places = torch.arange(chunk.start, chunk.stop, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def as_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor that is not empty, contiguous and on the CPU; writing to them changes it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Checkpoint(Mapping[str, Tensor]):
    """Named tensors on disk; `checkpoint[name]` reads that one, on the CPU, into memory of its own.

    Goes wherever a state dict goes. Made by `open_checkpoint`.

    Attributes:
        path: the file or folder.
        stored: name -> where the tensor is, its shape and dtype.
        ties: further names of a stored tensor -> the name it is stored under.
        notes: what was unwrapped, stripped or left out on the way to these names, a sentence each.
        metadata: versions of modules, where the file has them, for `load_state_dict`.
    """

    def __init__(
        self,
        path: Path,
        stored: Mapping[str, Stored],
        ties: Mapping[str, str],
        notes: Sequence[str] = (),
        metadata: Any = None,
    ) -> None:
        self.path = path
        self.stored = dict(stored)
        self.ties = dict(ties)
        self.notes = tuple(notes)
        self.metadata = metadata

    def entry(self, name: str) -> Stored:
        """The place of the tensor `name`, under this or another name."""
        return self.stored[self.ties.get(name, name)]

    def read(self, name: str, chunk: slice | None = None) -> Tensor:
        """The tensor `name`, or of the flattened tensor the values from `chunk.start` to `chunk.stop`."""
        return self.entry(name).read(chunk)

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
        tied = f", {len(self.ties)} of them tied" if self.ties else ""
        lines = [
            f"Checkpoint({str(self.path)!r}: {len(self)} tensors{tied}; "
            f"{readable(self.size)} in {files} file{'s' if files > 1 else ''})"
        ]
        return "\n  ".join([*lines, *self.notes])

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return tuple(dict.fromkeys(entry.file for entry in self.stored.values()))

    @property
    def size(self) -> int:
        """Bytes of all stored tensors."""
        return sum(size_of(entry.dtype, entry.shape) for entry in self.stored.values())

    def outline(self) -> StateDict:
        """Tensors of the right names, shapes and dtypes that hold no values and take no memory; tied names share one.

        Raises:
            WeightsError: tensors of a quantised dtype of torch, which have no such form.
        """
        for name, entry in self.stored.items():
            if entry.dtype in QUANTISED:
                raise WeightsError(
                    f"{name} ({str(entry.dtype).removeprefix('torch.')}) belongs to a quantised weight, which are no numbers to "
                    f"add and scale; {DEQUANTISE}"
                )
        found = StateDict((name, torch.zeros((), dtype=e.dtype).expand(e.shape)) for name, e in self.stored.items())
        found.update({name: found[first] for name, first in self.ties.items()})
        return found

    def load(self) -> StateDict:
        """All tensors in memory; tied names share one tensor."""
        found = StateDict((name, entry.read()) for name, entry in self.stored.items())
        found.update({name: found[first] for name, first in self.ties.items()})
        found._metadata = self.metadata
        return found

    def under(self, names: Mapping[str, str], *notes: str) -> "Checkpoint":
        """The same tensors under other names, `{new: present}`; tensors that are not named are left out."""
        stored: dict[str, Stored] = {}
        ties: dict[str, str] = {}
        first: dict[str, str] = {}
        for new, present in names.items():
            origin = self.ties.get(present, present)
            if (home := first.setdefault(origin, new)) == new:
                stored[new] = self.stored[origin]
            else:
                ties[new] = home
        return Checkpoint(self.path, stored, ties, [*self.notes, *notes], self.metadata)

    def to(self, dtype: torch.dtype) -> "Checkpoint":
        """The same with floating-point tensors in another dtype, cast as they are read."""
        stored = {n: Cast(e, dtype, n) if e.dtype.is_floating_point else e for n, e in self.stored.items()}
        notes = [*self.notes, f"read as {str(dtype).removeprefix('torch.')}"]
        return Checkpoint(self.path, stored, self.ties, notes, self.metadata)

    def on(self, base: Mapping[str, Tensor]) -> "Checkpoint":
        """The full model: this one itself; of an adapter (`lmc.weights.adapter.Adapter`) what it makes of the base."""
        return self

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


SAMPLES, SAMPLE = 4096, 4096  # blocks of a large file, and bytes of each


def sampled_checksum(file: Path) -> str:
    """The SHA-256 of a file's size and content, of which 16 MB spread over it are read where it is larger.

    Of 1 GB that notices every change that is 250 kB long, in a hundredth of the time that all of it would take.
    """
    size = file.stat().st_size
    if size <= SAMPLES * SAMPLE:
        return checksum(file)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb", buffering=0) as opened:
        for i in range(SAMPLES):
            opened.seek(i * (size - SAMPLE) // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DataError: anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
