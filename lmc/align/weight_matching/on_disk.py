"""Weight matching of checkpoints on disk: networks of which not even one fits into memory.

Tensors are read when a block is visited, one of A and one of B at a time, B's in the order of the moves so far: the moves
are all that is remembered of them. So the gains of a block are made anew at each visit, and dropped after the assignment;
memory is that for a few copies of the largest tensor and of the largest matrix of gains (`planned_memory`), whatever the
models' size. Tensors whose first axis stays (embeddings, heads) are read in parts.

A journal keeps the answer of every visit: the same call finds it there instead of in the tensors, and goes on where an
earlier one was ended. Visits come in the same order as in memory, so the permutation is the same where gains do not tie.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lmc.align.weight_matching.algorithm import Descent, raised
from lmc.align.weight_matching.blocks import UnitBlock, build_blocks
from lmc.align.weight_matching.gains import CHUNK, Step, added, assign, comparable, dot, opening_prices
from lmc.errors import DataError, InputError
from lmc.symmetry.groups.action import act_on_disk, compose_moves
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import check_compatible, check_finite
from lmc.weights.agreement import fitting
from lmc.weights.checkpoint import Checkpoint, sampled_checksum
from lmc.weights.state import check_integers, inexact, wide

JOURNAL = "lmc weight matching 1"
PART = 1 << 22  # values of a tensor that is read in parts
_GAIN = 32  # bytes for each pair of units while they are assigned


class Stream(Mapping[str, Tensor]):
    """The tensors of a checkpoint that are matched on, each read when it is asked for.

    Attributes:
        checkpoint: where they are, with its units moved.
        shells: tensors without values, in the shape and dtype in which these are compared.
        read: bytes that were read so far.
    """

    def __init__(self, spec: PermutationSpec, checkpoint: Checkpoint, shells: Mapping[str, Tensor]) -> None:
        self.spec, self.origin, self.checkpoint, self.shells, self.read = spec, checkpoint, checkpoint, shells, 0

    def move(self, pi: Mapping[str, Tensor]) -> None:
        """Let the units be those of the checkpoint, moved by `pi`."""
        self.checkpoint = act_on_disk(self.spec, pi, self.origin)

    def __getitem__(self, name: str) -> Tensor:
        return self._seen(name, self.checkpoint.read(name))

    def __contains__(self, name: object) -> bool:
        return name in self.shells  # a mapping would read the tensor for this

    def __iter__(self) -> Iterator[str]:
        return iter(self.shells)

    def __len__(self) -> int:
        return len(self.shells)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor, along its first axis in parts if no unit moves along that one."""
        entry = self.checkpoint.entry(name)
        rows = _rows_at_once(self.spec, name, entry.shape)
        if rows is None:
            yield self[name]
            return
        row = math.prod(entry.shape[1:])
        for first in range(0, entry.shape[0], rows):
            stop = min(first + rows, entry.shape[0])
            part = entry.read(slice(first * row, stop * row)).view(stop - first, *entry.shape[1:])
            yield self._seen(name, part)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor flattened, in the chunks of which `dot` sums one by one."""
        entry = self.checkpoint.entry(name)
        if entry.dtype.is_complex:
            yield from self[name].flatten().split(CHUNK)
            return
        for start in range(0, entry.size, CHUNK):
            yield self._seen(name, entry.read(slice(start, min(start + CHUNK, entry.size))))

    def _seen(self, name: str, tensor: Tensor) -> Tensor:
        self.read += tensor.nbytes
        return comparable(tensor).to(self.shells[name].dtype)


def _shells(spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each tensor that is matched on, in the order of their names, one without values in the widest dtype of both."""
    found = {}
    for name in sorted(a.keys() - spec.buffers - spec.aliases.keys()):
        if inexact(a[name]):
            shape = (*a[name].shape, 2) if a[name].is_complex() else a[name].shape
            found[name] = torch.zeros((), dtype=wide(a[name].dtype, b[name].dtype).to_real()).expand(shape)
    return found


def _rows_at_once(spec: PermutationSpec, name: str, shape: tuple[int, ...]) -> int | None:
    """The number of slices along the first axis make a part; None where the tensor is small, or units move along that axis."""
    size = math.prod(shape)
    if size <= PART or len(shape) < 2 or any(0 in table.dims for _, table in spec.tables_by_tensor.get(name, ())):
        return None
    return max(1, PART // math.prod(shape[1:]))


def product(a: Stream, b: Stream) -> float:
    """`inner_product(a, b)`, bit for bit."""
    return sum(sum(map(dot, a.chunks(name), b.chunks(name))) for name in a)


class DescentOnDisk(Descent):
    """Coordinate descent over tensors that are not held.

    Attributes:
        passes: of the first pass and of each sweep the visits, the bytes read and the seconds.
    """

    fixed: Stream
    state: Stream

    def __init__(
        self,
        spec: PermutationSpec,
        blocks: Sequence[UnitBlock],
        fixed: Stream,
        state: Stream,
        pi: Mapping[str, Tensor],
        on_visit: Callable[[], object] | None,
        journal: "Journal",
    ) -> None:
        super().__init__(spec, blocks, fixed, {}, pi, on_visit)
        self.state, self.journal = state, journal
        self.state.move(self.pi)
        self.passes: list[dict[str, Any]] = []

    def grow_outwards(self) -> "DescentOnDisk":
        self._pass("outwards", super().grow_outwards)
        return self

    def sizes(self) -> dict[str, int]:
        return {name: shell.numel() for name, shell in self.fixed.shells.items()}

    def sweep(self, order: Sequence[int]) -> None:
        self._pass("sweep", lambda: super(DescentOnDisk, self).sweep(order))

    def _pass(self, kind: str, walk: Callable[[], object]) -> None:
        visits, read, started = self.visits, self.fixed.read + self.state.read, time.perf_counter()
        walk()
        seconds, read = time.perf_counter() - started, self.fixed.read + self.state.read - read
        self.passes.append({"pass": kind, "visits": self.visits - visits, "bytes_read": read, "seconds": seconds})

    def step(self, i: int, only: frozenset[str] | None) -> Step | None:
        found = self.journal.answer(self.blocks[i].name, lambda: _listed(self._step(i, only)))
        return {name: torch.tensor(index) for name, index in found.items()} or None

    def _step(self, i: int, only: frozenset[str] | None) -> Step | None:
        step = super().step(i, only)
        if step and self.blocks[i].quadratic and only is None and not self._helps(i, step):
            return None
        return step

    def assignment(self, i: int, used: Sequence[int]) -> tuple[Tensor, float, float]:
        block, gain = self.blocks[i], None
        for place in (block.places[k] for k in used):
            for mine, theirs in zip(self.fixed.parts(place.tensor), self.state.parts(place.tensor), strict=True):
                gain = added(gain, place.features(mine), place.features(theirs))
        if gain is None:
            return torch.arange(block.size), 0.0, 0.0
        size = float(gain.diagonal().abs().sum())
        return *assign(gain, opening_prices(gain)), size

    def move(self, i: int, step: Step, *, linear: bool) -> None:
        if self.blocks[i].quadratic:
            self.dirty.add(i)
        for name in self.blocks[i].tables:
            self.dirty |= self.sharing.get(name, set()) - {i}
        self.pi = compose_moves(self.spec, step, self.pi)
        self.state.move(self.pi)

    def _helps(self, i: int, step: Step) -> bool:
        """Whether a step by a linearised gain raises the sum, tensor by tensor."""
        before = after = 0.0
        for name in (name for name in self.blocks[i].tables if name in self.fixed):
            mine, theirs = self.fixed[name], self.state[name]
            before += dot(mine.flatten(), theirs.flatten())
            moved, _ = self.blocks[i].move(step, {name: theirs})[name]
            after += dot(mine.flatten(), moved.flatten())
        return raised(before, after)

    def value(self) -> float:
        return self.journal.answer("objective", self._value)

    def _value(self) -> float:
        value = product(self.fixed, self.state)
        if not math.isfinite(value):
            for who, stream in (("a", self.fixed), ("b", self.state)):
                for name in stream:
                    check_finite({name: stream.origin.read(name)}, who)
        return value

    def report(self) -> dict[str, Any]:
        return super().report() | {"passes": self.passes}


def _listed(step: Step | None) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in (step or {}).items()}


class Journal:
    """Answers that took long, a line each in a file that grows: what an earlier run of the same problem has found is read.

    Args:
        path: the file; None keeps none.
        problem: all that the answers depend on.

    Raises:
        InputError: the file belongs to another problem.
        DataError: it is no journal.
    """

    def __init__(self, path: Path | None, problem: Mapping[str, Any]) -> None:
        self.path, self.found = path, 0
        self._known: list[Any] = []
        self._file: BinaryIO | None = None
        if path is None:
            return
        first = {"format": JOURNAL, **json.loads(json.dumps(problem))}
        whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""  # a last line may have been cut short
        if whole:
            head, *answers = _lines(path, whole)
            if differing := [key for key in first if not isinstance(head, dict) or head.get(key) != first[key]]:
                raise InputError(
                    f"{path}: the journal of another weight matching, which differs in {', '.join(differing)}; finish it by "
                    "the call that began it, name another file, or remove it"
                )
            self._known = answers
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")
        self._file.truncate(len(whole) + 1 if whole else 0)
        if not whole:
            self._write(first)

    def answer(self, question: str, find: Callable[[], Any]) -> Any:
        """The answer to a question, which comes in the same order in every run."""
        if self.found < len(self._known):
            asked, answer = self._known[self.found]
            if asked != question:
                raise DataError(
                    f"{self.path}: line {self.found + 2} is about {asked}, expected {question}; remove the file"
                )
            self.found += 1
            return answer
        answer = find()
        self._write([question, answer])
        return answer

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, line: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _lines(path: Path, content: bytes) -> list[Any]:
    try:
        return [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise DataError(
            f"{path}: not a journal of weight matching ({error}); name another file, or remove it"
        ) from error


class OnDisk:
    """Two checkpoints to be matched.

    Attributes:
        blocks: what may move.
        memory: bytes that the search takes at most, about, besides what the program holds already.
        journal: what was found so far.

    Raises:
        MismatchError, WeightsError, SpecError: as `weight_matching`.
        InputError, DataError: as `Journal`.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        a: Checkpoint,
        b: Checkpoint,
        journal: Path | None,
        options: Mapping[str, Any],
    ) -> None:
        b, lacking = fitting(a, b, ("a", "b"))
        shells, others = ({n: t for n, t in one.outline().items() if n not in lacking} for one in (a, b))
        check_compatible(shells, others)
        check_integers(
            [shells, others], "ab", lambda name, i: torch.equal(a[name], b[name]), lambda name, i: (a, b)[i][name]
        )
        self.spec = spec
        compared = _shells(spec, shells, others)
        self.a, self.b = (Stream(spec, one, compared) for one in (a, b))
        self.blocks = build_blocks(spec, self.a.shells)
        self.memory = planned_memory(spec, self.blocks, self.a, self.b)
        self.journal = Journal(journal, {} if journal is None else {**_problem(spec, a, b), **options})

    def begin(self, pi: Mapping[str, Tensor], on_visit: Callable[[], object]) -> DescentOnDisk:
        """A descent that starts where B is moved by `pi`."""
        return DescentOnDisk(self.spec, self.blocks, self.a, self.b, pi, on_visit, self.journal)

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    def report(self) -> dict[str, Any]:
        """Its cost: bytes of memory as planned, bytes read from the disk, and answers found in the journal."""
        return {
            "memory": self.memory,
            "bytes_read": self.a.read + self.b.read,
            "found_in_journal": self.journal.found,
        }


def _problem(spec: PermutationSpec, a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """All that the answers depend on: what moves, and samples of what the files hold."""
    groups = hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode()).hexdigest()
    files = {who: {f.name: sampled_checksum(f) for f in one.files} for who, one in (("a", a), ("b", b))}
    return {"spec": groups, **files}


def planned_memory(spec: PermutationSpec, blocks: Sequence[UnitBlock], a: Stream, b: Stream) -> int:
    """Bytes for what a visit holds at a time, where it holds most.

    Of a place the part of A and of B that is read at once: as stored, B's as moved too, both widened, and both once more by
    units; of a block with others nested in it all places together. Then the matrix of gains, in float32 and float64, with
    the costs and what the assignment makes of them. The objective needs whole tensors as stored where they do not move
    by rows.
    """

    def at_once(name: str) -> int:
        shape = tuple(a.shells[name].shape)
        rows = _rows_at_once(spec, name, shape)
        return math.prod(shape) if rows is None else rows * math.prod(shape[1:])

    def stored(name: str) -> int:
        return max(stream.origin.entry(name).dtype.itemsize for stream in (a, b))

    most = max((3 * stored(name) * at_once(name) for name in a), default=0)
    for block in blocks:
        widened = {
            place.tensor: 4 * a.shells[place.tensor].element_size() * at_once(place.tensor) for place in block.places
        }
        reading = max(3 * stored(name) * at_once(name) for name in widened)
        if block.inner:
            within = max((inner.size for inner in block.inner), default=1)
            most = max(most, reading + sum(widened.values()) + _GAIN * (block.size * within) ** 2)
        else:
            most = max(most, reading + max(widened.values()) + _GAIN * block.size**2)
    return most + 4 * CHUNK * 8
