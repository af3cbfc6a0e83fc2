"""The files of a merged checkpoint: their names, the tensors in each, and writing them chunk by chunk."""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from lmc.errors import DataError, InputError
from lmc.merge.engine.chunks import VALUES, Chunk, Made
from lmc.weights.checkpoint import DTYPES, Checkpoint, as_bytes, checksum, size_of

QUEUE = 4  # chunks that wait to be written
APART = 1 << 23  # bytes at least between two notes of how far a file has come
PART = 1 << 28  # bytes of a file, or one tensor, that a worker makes at a time
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

    def parts(self, ties: Mapping[str, str], done: Container[str]) -> list[tuple[tuple[str, ...], int]]:
        """The work of one worker at a time: names of tensors that lie side by side, and where in the file they end."""
        _, places = self.header(ties)
        found: list[tuple[tuple[str, ...], int]] = []
        filled = PART
        for name in sorted((name for name in self.tensors if name not in done), key=places.__getitem__):
            size = size_of(*self.tensors[name])
            before, filled = ((), 0) if filled + size > PART else (found.pop()[0], filled)
            found.append(((*before, name), places[name] + size))
            filled += size
        return found

    def _places(self, order: Iterable[str]) -> dict[str, int]:
        """The beginning of each tensor behind the header, one after the other."""
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
    """The part of a file that is there and as it was written, by the last note of how far it had come."""
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
    chunks: Iterable[Made],
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
    pending: deque[Future[None]] = deque()
    with ExitStack() as stack:
        file = _opened(stack, path, header, start)
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        for name, chunk, tensor in chunks:
            begin, values = _bytes(chunk, tensor)
            last = begin + len(values) == size_of(*shard.tensors[name])
            pending.append(pool.submit(file.write, places[name] + begin, values, last))
            written(len(values))
            while len(pending) > (QUEUE if tensor.numel() <= VALUES else 0):
                pending.popleft().result()
        for write in pending:
            write.result()
        return file.finish(path)


def fill(path: Path, shard: Shard, ties: Mapping[str, str], chunks: Iterable[Made]) -> None:
    """In a worker: write each chunk of each tensor to its place in a file that is there."""
    _, places = shard.header(ties)
    with open(path, "r+b") as file:
        for name, chunk, tensor in chunks:
            begin, values = _bytes(chunk, tensor)
            file.seek(places[name] + begin)
            file.write(values)


def write_apart(
    folder: Path,
    shards: Sequence[Shard],
    ties: Mapping[str, str],
    work: Callable[[Sequence[tuple[Shard, tuple[str, ...]]]], Iterator[tuple[int, Any]]],
    written: Callable[[int], object],
    started: Mapping[str, Begun],
) -> Iterator[tuple[str, str]]:
    """Have others write the parts of the files, `fill(...)` of a shard and names, and say each file that is complete.

    What is written is read again for its SHA-256, part after part of a file, while others are made; notes of how far each
    has come are those of `write_shard`.

    Args:
        work: does the tasks, and gives their numbers as they are done.
        started: of files what an interrupted run has left of them.

    Yields:
        The name and the SHA-256 of a file that is on the disk.
    """
    with ExitStack() as stack:
        tasks: list[tuple[Shard, tuple[str, ...]]] = []
        ends: dict[int, int] = {}
        ahead: dict[str, deque[int]] = {}  # of each file the tasks of which it waits for, in their order
        files: dict[str, _Growing] = {}
        for shard in shards:
            start = started.get(shard.file)
            files[shard.file] = _opened(stack, folder / shard.file, shard.header(ties)[0], start)
            waiting = ahead.setdefault(shard.file, deque())
            for names, end in shard.parts(ties, () if start is None else start.tensors):
                waiting.append(len(tasks))
                ends[len(tasks)] = end
                tasks.append((shard, names))
        done: set[int] = set()
        for i, _ in work(tasks):
            done.add(i)
            shard, names = tasks[i]
            written(sum(size_of(*shard.tensors[name]) for name in names))
            waiting = ahead[shard.file]
            while waiting and waiting[0] in done:
                files[shard.file].follow(ends[waiting.popleft()])
            if not waiting:
                yield shard.file, files[shard.file].finish(folder / shard.file)


def _bytes(chunk: Chunk, tensor: Tensor) -> tuple[int, bytes | memoryview]:
    """From which byte of its tensor on a chunk is stored, and the values."""
    values = as_bytes(tensor.cpu().contiguous()) if tensor.numel() else b""
    return 0 if chunk is None else chunk.start * tensor.element_size(), values


def _opened(stack: ExitStack, path: Path, header: bytes, start: Begun | None) -> "_Growing":
    """A file that grows from its header, or from what an interrupted run has left of it, on."""
    how, notes = ("w+b", "w") if start is None else ("r+b", "a")
    file = _Growing(stack.enter_context(open(path, how)), stack.enter_context(open(_notes(path), notes)))
    if start is None:
        file.write(0, header)
        file.file.flush()
    else:
        file.go_on(start)
    return file


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

    def follow(self, stop: int) -> None:
        """Take up what another has written, as far as byte `stop`, where a tensor ends."""
        while self.end < stop:
            part = os.pread(self.file.fileno(), min(stop - self.end, APART), self.end)
            if not part:
                raise DataError(
                    f"{self.file.name}: a worker has not written all of it, or on a disk that is not seen here"
                )
            self.digest.update(part)
            self.end += len(part)
        self._note()

    def finish(self, path: Path) -> str:
        """The SHA-256 of the file, when all of it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return checksum(path) if self.digest is None else self.digest.hexdigest()

    def write(self, place: int, values: bytes | memoryview, last: bool = False) -> None:
        """Write to a place; `last`: with this, a tensor is whole."""
        if place != self.end:  # tensors of several widths are not stored in the order of the model
            self.digest = None
            self.file.seek(place)
        if self.digest is not None:
            self.digest.update(values)
        self.end = place + self.file.write(values)
        if last:
            self._note()

    def _note(self) -> None:
        if self.digest is not None and self.end - self.noted >= APART:
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
