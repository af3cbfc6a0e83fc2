"""The files of a merged checkpoint: their names, the tensors in each, and writing them chunk by chunk."""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from lmc.errors import InputError
from lmc.merge.engine.chunks import VALUES, Made
from lmc.weights.checkpoint import DTYPES, Checkpoint, as_bytes, checksum, size_of

QUEUE = 4  # chunks that wait to be written
APART = 1 << 23  # bytes at least between two notes of how far a file has come
NOTE = re.compile(r"^(\d+) ([0-9a-f]{64})\n", re.MULTILINE)
LABELS = {dtype: label for label, dtype in DTYPES.items()}
NAME = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model|open_clip_model)(?P<variant>\.[\w-]+?)??"
    r"(-\d{5}-of-\d{5}(?P<late>\.[\w-]+)?)?\.(safetensors|bin)$"
)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, and dtype and shape of each tensor in it, in the order of the model."""

    file: str
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(size_of(*tensor) for tensor in self.tensors.values())

    def header(self, ties: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
        """The first bytes of the file, and where each tensor begins: at a multiple of its item size.

        In the order of the model, or, where that is no such place for one of them, wide dtypes first.
        """
        places = self._places(self.tensors)
        if any(place % self.tensors[name][0].itemsize for name, place in places.items()):
            places = self._places(sorted(self.tensors, key=lambda name: -self.tensors[name][0].itemsize))
        kept = {second: first for second, first in ties.items() if first in self.tensors}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"} | kept}
        for name, (dtype, shape) in self.tensors.items():
            place = places[name], places[name] + size_of(dtype, shape)
            entries[name] = {"dtype": LABELS[dtype], "shape": shape, "data_offsets": place}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {name: start + place for name, place in places.items()}

    def _places(self, order: Iterable[str]) -> dict[str, int]:
        """Where each tensor begins behind the header, one after the other."""
        places, end = {}, 0
        for name in order:
            places[name] = end
            end += size_of(*self.tensors[name])
        return places


@dataclass(frozen=True)
class Naming:
    """Names of the files of a model: `model.safetensors`, or with a variant `model.fp16.safetensors`.

    Shards are numbered and have an index beside them, as transformers and diffusers read them.
    """

    stem: str = "model"
    variant: str = ""

    def file(self, number: int, count: int) -> str:
        """The file of shard `number` of `count`, from 1 on."""
        shard = "" if count == 1 else f"-{number:05}-of-{count:05}"
        return f"{self.stem}{self.variant}{shard}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index{self.variant}.json"


def naming(first: object) -> Naming:
    """The names of the first model's files, if it is on disk under usual names; pickles become safetensors."""
    if not isinstance(first, Checkpoint) or not first.files:
        return Naming()
    match = NAME.match(first.files[0].name)
    if not match or match["stem"] == "pytorch_model":
        return Naming()
    return Naming(match["stem"], match["variant"] or match["late"] or "")


def layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int, names: Naming) -> tuple[Shard, ...]:
    """As many tensors to a file as fit into `limit` bytes, in their order; a larger one has a file of its own."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in LABELS:
            raise InputError(f"{name}: {dtype} is not stored in safetensors files; choose another one with dtype=")
        size = size_of(dtype, shape)
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = dtype, shape
        filled += size
    return tuple(Shard(names.file(i, len(groups)), group) for i, group in enumerate(groups, start=1))


@dataclass(frozen=True)
class Begun:
    """A file that an interrupted run has begun.

    Attributes:
        file: its name.
        size: how many bytes of it stay.
        tensors: what is whole in them.
        digest: the SHA-256 of these bytes so far.
    """

    file: str
    size: int
    tensors: frozenset[str]
    digest: Any


def begun(folder: Path, shard: Shard, ties: Mapping[str, str]) -> Begun | None:
    """What of a file is there and as it was written, by the last note of how far it had come."""
    path, notes = folder / shard.file, _notes(folder / shard.file)
    if not path.is_file() or not notes.is_file():
        return None
    lines = NOTE.findall(notes.read_text(errors="replace"))
    size, expected = (int(lines[-1][0]), lines[-1][1]) if lines else (0, "")
    header, places = shard.header(ties)
    digest, left = hashlib.sha256(), size
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return None
        file.seek(0)
        while left and (part := file.read(min(left, APART))):
            digest.update(part)
            left -= len(part)
    if left or digest.hexdigest() != expected:
        return None
    found = frozenset(name for name, place in places.items() if place + size_of(*shard.tensors[name]) <= size)
    return Begun(shard.file, size, found, digest)


def _notes(path: Path) -> Path:
    """Beside a file that grows: how many bytes are whole tensors, and their SHA-256, a line each time."""
    return path.with_name(f".{path.name}.progress")


def write_shard(
    path: Path,
    shard: Shard,
    ties: Mapping[str, str],
    chunks: Iterator[Made],
    written: Callable[[int], object],
    start: Begun | None = None,
) -> str:
    """Write each chunk of each tensor to its place as it comes, and say how many bytes it had.

    A thread writes while the next chunks are made. On return all is on the disk.

    Args:
        start: what an interrupted run has left of the file; the chunks are those of the other tensors.

    Returns:
        The SHA-256 of the file.
    """
    header, places = shard.header(ties)
    how, notes = ("wb", "w") if start is None else ("r+b", "a")
    with (
        open(path, how) as opened,
        open(_notes(path), notes) as progress,
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
    ):
        file = _Growing(opened, progress)
        if start is None:
            pending = deque([pool.submit(file.write, 0, header)])
        else:
            pending = deque([pool.submit(file.go_on, start)])
        left = len(shard.tensors) - (0 if start is None else len(start.tensors))
        while left:
            name, chunk, tensor = next(chunks)
            begin, stop = (0, tensor.numel()) if chunk is None else (chunk.start, chunk.stop)
            values = as_bytes(tensor.cpu().contiguous()) if tensor.numel() else b""
            last = stop == torch.Size(shard.tensors[name][1]).numel()
            pending.append(pool.submit(file.write, places[name] + begin * tensor.element_size(), values, last))
            written(len(values))
            left -= last
            while len(pending) > (QUEUE if tensor.numel() <= VALUES else 0):
                pending.popleft().result()
        for write in pending:
            write.result()
        opened.flush()
        os.fsync(opened.fileno())
    return checksum(path) if file.digest is None else file.digest.hexdigest()


class _Growing:
    """A file with the SHA-256 of what was written, as long as that goes on from where it ended, and notes of both."""

    def __init__(self, file: BinaryIO, notes: TextIO) -> None:
        self.file, self.notes = file, notes
        self.digest: Any = hashlib.sha256()
        self.end = self.noted = 0

    def go_on(self, start: Begun) -> None:
        self.digest, self.end, self.noted = start.digest.copy(), start.size, start.size
        self.file.truncate(start.size)
        self.file.seek(start.size)

    def write(self, place: int, values: bytes | memoryview, last: bool = False) -> None:
        """Write to a place; `last`: with this, a tensor is whole."""
        if place != self.end:  # tensors of several widths are not stored in the order of the model
            self.digest = None
            self.file.seek(place)
        if self.digest is not None:
            self.digest.update(values)
        self.end = place + self.file.write(values)
        if last and self.digest is not None and self.end - self.noted >= APART:
            self.file.flush()
            self.notes.write(f"{self.end} {self.digest.hexdigest()}\n")
            self.notes.flush()
            self.noted = self.end


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text such as "5GB" (10^9) or "512 MiB" (2^20)."""
    text = str(size).replace(" ", "")
    for power, letter in enumerate("KMGT", start=1):
        for unit, step in ((f"{letter}iB", 1024), (f"{letter}B", 1000)):
            if text.lower().endswith(unit.lower()):
                return _positive(text[: -len(unit)], step**power, size)
    return _positive(text, 1, size)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype of torch, from itself or its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point and found in LABELS):
        known = ", ".join(str(d).removeprefix("torch.") for d in LABELS if d.is_floating_point)
        raise InputError(f"dtype={dtype!r}: expected one of {known}")
    return found


def _positive(text: str, unit: int, given: int | str) -> int:
    try:
        value = int(float(text) * unit)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise InputError(f"shard_size: expected a number of bytes or a size such as '5GB', got {given!r}")
    return value
