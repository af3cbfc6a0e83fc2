"""The permutation symmetries of one architecture as data: the groups, their places in its tensors, and the proof; and the
action of group elements on flat positions of a tensor, and on each other when groups are nested."""

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import SpecError
from lmc.symmetry.groups.group import Group, Groups, Shape, Table, absence, check_groups, outermost_first
from lmc.symmetry.groups.kinds import ContinuousSymmetries, Kind
from lmc.weights import ModelOrWeights, Weights, as_weights
from lmc.weights.checkpoint import Checkpoint, Stored, flat, size_of

if TYPE_CHECKING:
    import pandas as pd


VISIBLE = 1e3


@dataclass(frozen=True)
class Evidence:
    """The observations of one family of groups.

    Attributes:
        error: largest change of the outputs when the family moved with all the others, relative to their largest value.
        powers: group -> change of the outputs when it moves and one of the tensors that it touches is left behind; of
            specs with many groups the rate of change, when one of the tensors begins to move alone.
    """

    error: float
    powers: Mapping[str, float]

    @property
    def power(self) -> float:
        """The smallest power of the groups."""
        return min(self.powers.values(), default=0.0)


@dataclass(frozen=True)
class Certificate(Result):
    """The result of a certification: the precision of the agreement, and the change when a group is broken on purpose.

    A group whose breakage is invisible is not proven by equal outputs: its name is in `unverified`.

    Attributes:
        max_error: largest difference of outputs, relative to their largest absolute value.
        tolerance: what it was held against.
        trials: number of permutations tried, each on other weights.
        groups: number of groups that they moved.
        moved: share of the weight entries that changed places (a certificate in which nothing moves proves nothing).
        inputs: shapes of the example inputs used.
        dtype: the precision of the arithmetic.
        families: family of groups -> error, and power of each group.
        outputs: names of the outputs compared, if the model returns several.
    """

    max_error: float
    tolerance: float
    trials: int
    groups: int
    moved: float
    inputs: tuple[tuple[tuple[int, ...], ...], ...]
    dtype: str = "float64"
    families: Mapping[str, Evidence] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The even power of ten that `max_error` stays under, from 1e-14 on: equal on machines that round differently."""
        return 10.0 ** max(-14, 2 * math.ceil(math.log10(self.max_error) / 2)) if self.max_error else 1e-14

    @property
    def power(self) -> float:
        """The smallest power of the groups that could be verified."""
        return min((p for e in self.families.values() for p in e.powers.values() if self._seen(p)), default=0.0)

    @property
    def unverified(self) -> tuple[str, ...]:
        """The groups for which an error would not have been seen: their power is not far above the tolerance. Where that
        are all the groups of a family, its name stands for them."""
        found: list[str] = []
        for family, evidence in self.families.items():
            hidden = [name for name, power in evidence.powers.items() if not self._seen(power)]
            found += [family] if hidden and len(hidden) == len(evidence.powers) else hidden
        return tuple(found)

    def _seen(self, power: float) -> bool:
        return power > VISIBLE * self.tolerance

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group: its family, error, power, and whether an error would have been seen."""
        rows = [
            (name, family, evidence.error, power, self._seen(power))
            for family, evidence in self.families.items()
            for name, power in evidence.powers.items()
        ]
        return require("pandas").DataFrame(rows, columns=["group", "family", "error", "power", "verified"])

    def __str__(self) -> str:
        tried = "one permutation" if self.trials == 1 else f"{self.trials} random permutations"
        text = (
            f"certified: {tried} of {self.groups} groups, {self.moved:.0%} of the weights moved, "
            f"outputs equal to {self.max_error:.1e} ({self.dtype})"
        )
        if self.power:
            text += f", changed by {self.power:.1e} or more when one group is broken"
        if self.unverified:
            text += f"; not verified, as breaking them changes nothing here: {', '.join(self.unverified)}"
        return text


@dataclass(frozen=True, eq=False)
class Symmetries:
    """The data of a `PermutationSpec`, and what follows from them; see there."""

    groups: dict[str, Group]
    shapes: dict[str, Shape]
    buffers: frozenset[str] = frozenset()
    frozen: dict[tuple[str, int], str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    certificate: Certificate | None = None
    outputs: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    continuous: ContinuousSymmetries | None = None

    def __post_init__(self) -> None:
        groups = Groups({group.name: group for group in outermost_first(self.groups) if group.size > 1})
        check_groups(groups, self.shapes)
        object.__setattr__(self, "groups", groups)

    def beyond(self, family: str) -> str:
        """What the units of a family admit beyond permutations, in words; empty if that is nothing, or is not known."""
        return self.kind(family).beyond

    def kind(self, family: str) -> Kind:
        """What the units of a family admit beyond permutations, as far as it is known."""
        return Kind() if self.continuous is None else self.continuous.kinds.get(family, Kind())

    def check(self, weights: ModelOrWeights) -> None:
        """Raise `SpecError` naming the first tensor that the spec knows and the weights lack, or of another shape."""
        weights = weights.outline() if isinstance(weights, Checkpoint) else as_weights(weights)
        for name in self.tables_by_tensor:
            if name not in weights:
                why = absence(name, self.aliases, weights)
                raise SpecError(f"the spec moves {name} {self.shapes[name]}, which the weights do not have{why}")
        for name, tensor in weights.items():
            if name in self.shapes and tuple(tensor.shape) != self.shapes[name]:
                raise SpecError(f"{name}: the spec was made for shape {self.shapes[name]}, got {tuple(tensor.shape)}")

    @cached_property
    def tables_by_tensor(self) -> dict[str, list[tuple[str, Table]]]:
        """For each tensor that moves its (group name, table) pairs, outermost group first."""
        found: dict[str, list[tuple[str, Table]]] = {}
        for group in self.groups.values():
            for tensor, tables in group.tables.items():
                found.setdefault(tensor, []).extend((group.name, table) for table in tables)
        return found

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """The names of the groups of each family: one, or as many as there are places to live in."""
        found: dict[str, list[str]] = {}
        for group in self.groups.values():
            found.setdefault(group.family, []).append(group.name)
        return found

    @cached_property
    def by_place(self) -> dict[tuple[str, tuple[tuple[str, int], ...]], str]:
        """The group of a family that lives in given units."""
        return {(group.family, group.within): group.name for group in self.groups.values()}

    @property
    def log10_order(self) -> float:
        """log10 of the number of symmetries, the product of n! over the groups."""
        return sum(group.log10_order for group in self.groups.values())

    @cached_property
    def coverage(self) -> float:
        """Share of the parameters (buffers not counted) that are on an axis that moves."""
        moving = sum(self.moving_share(name) * size for name, size in self.parameters.items())
        return moving / max(1, sum(self.parameters.values()))

    @property
    def parameters(self) -> dict[str, int]:
        """The number of entries of each parameter: buffers left out, tied tensors under their first name only."""
        return {
            name: int(np.prod(shape, dtype=np.int64))
            for name, shape in self.shapes.items()
            if name not in self.buffers and name not in self.aliases
        }

    def moving_share(self, tensor: str, moving: Mapping[str, np.ndarray] | None = None) -> float:
        """Share of one tensor's entries that are on a moving position of some axis.

        Args:
            moving: for each group a mask of the units that move (default: all).
        """
        shape = self.shapes[tensor]
        # Disjoint sets of axes, each with the positions over it that move; the shares that stay multiply over the sets.
        blocks: dict[tuple[int, ...], np.ndarray] = {}
        for name, table in self.tables_by_tensor.get(tensor, ()):
            moves = np.zeros([shape[d] for d in table.dims], dtype=bool)
            moves.reshape(-1)[table.rows if moving is None else table.rows[moving[name]]] = True
            met = [dims for dims in blocks if set(dims) & set(table.dims)]
            joint = tuple(sorted(set(table.dims).union(*met)))
            for dims, mask in [(table.dims, moves), *((dims, blocks.pop(dims)) for dims in met)]:
                spread = mask.reshape([shape[d] if d in dims else 1 for d in joint])
                blocks[joint] = blocks[joint] | spread if joint in blocks else spread
        return 1.0 - float(np.prod([1.0 - mask.mean() for mask in blocks.values() if mask.size]))

    def differences(self, other: "Symmetries") -> list[str]:
        """One line per group that only one of two specs has, whatever the groups are called; empty if they describe the
        same symmetries."""
        mine, theirs = _signatures(self), _signatures(other)
        lines = [f"{name}: only in the first" for key, name in mine.items() if key not in theirs]
        lines += [f"{name}: only in the second" for key, name in theirs.items() if key not in mine]
        shared = [name for name in self.shapes if name in other.shapes]
        return lines + [
            f"{name}: shape {self.shapes[name]} and {other.shapes[name]}"
            for name in shared
            if self.shapes[name] != other.shapes[name]
        ]

    def contains(self, other: "Symmetries") -> bool:
        """Whether every symmetry of `other` is one of this spec.

        Exchanges of two neighbouring units generate the groups of `other`. One is a symmetry of this spec if the positions
        that it moves are moved together by one exchange of one of its groups.
        """
        exchanges = {key for group in self.groups.values() for key in _exchanges(group, all_pairs=True)}
        return all(key in exchanges for group in other.groups.values() for key in _exchanges(group, all_pairs=False))


def _signatures(spec: Symmetries) -> dict[frozenset, str]:
    """A group up to its name and the order of its units: the places of each unit."""
    return {frozenset(_unit_places(group)): group.name for group in spec.groups.values()}


def _unit_places(group: Group) -> list[frozenset]:
    places: list[set] = [set() for _ in range(group.size)]
    for tensor, tables in group.tables.items():
        for table in tables:
            for unit, row in enumerate(table.rows):
                places[unit].add((tensor, table.dims, tuple(sorted(row.tolist()))))
    return [frozenset(place) for place in places]


def _exchanges(group: Group, all_pairs: bool):
    for i in range(group.size):
        for j in range(i + 1, group.size if all_pairs else min(i + 2, group.size)):
            yield frozenset(
                (tensor, table.dims, _swapped(table, i, j))
                for tensor, tables in group.tables.items()
                for table in tables
            )


def _swapped(table: Table, i: int, j: int) -> frozenset[tuple[int, int]]:
    return frozenset(
        (min(a, b), max(a, b)) for a, b in zip(table.rows[i].tolist(), table.rows[j].tolist(), strict=True)
    )


TablesOfTensor = Sequence[tuple[str, Table]]
Indices = Mapping[str, Tensor]


def identity_indices(spec: Symmetries) -> dict[str, Tensor]:
    """For each group the order that moves nothing."""
    return {name: torch.arange(group.size) for name, group in spec.groups.items()}


def random_indices(spec: Symmetries, seed: int) -> dict[str, Tensor]:
    """For each group a uniformly random order."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(group.size, generator=generator) for name, group in spec.groups.items()}


def act(spec: Symmetries, indices: Indices, weights: Weights) -> Weights:
    """The weights with their units moved; tensors that do not move are copied."""
    tables = spec.tables_by_tensor
    return {name: permute_tensor(tensor, tables.get(name, ()), indices) for name, tensor in weights.items()}


def permute_tensor(tensor: Tensor, tables: TablesOfTensor, indices: Indices) -> Tensor:
    """Permute one tensor by all its groups.

    Consecutive tables over the same axes are merged into one index, so each run of them costs one gather.

    Args:
        tables: (group, table) pairs, outermost group first: units are carried to their place, then permuted inside.
        indices: group -> (n,) unit of the old tensor for each unit of the new.
    """
    # For each set of axes met, which old flat position each new one takes. Sets of axes that share none commute, so several
    # may be pending; one that overlaps must be carried out before the next.
    pending: dict[tuple[int, ...], np.ndarray] = {}
    for name, table in tables:
        clash = [dims for dims in pending if dims != table.dims and set(dims) & set(table.dims)]
        for dims in clash:
            tensor = gather_positions(tensor, dims, pending.pop(dims))
        index = pending.get(table.dims)
        if index is None:
            index = np.arange(int(np.prod([tensor.shape[d] for d in table.dims])))
        # Position rows[i, c] takes what position rows[p[i], c] would have taken: this move after those before it.
        moved = index.copy()
        moved[table.rows] = index[table.rows[indices[name].numpy()]]
        pending[table.dims] = moved
    for dims, index in pending.items():
        tensor = gather_positions(tensor, dims, index)
    return tensor if pending else tensor.clone()


def gather_positions(tensor: Tensor, dims: Sequence[int], index: np.ndarray) -> Tensor:
    """`tensor` with the flattened positions over `dims` taken in the order `index`; shape unchanged."""
    where = torch.from_numpy(index).to(tensor.device)
    if len(dims) == 1:
        return tensor.index_select(dims[0], where)
    front = tensor.movedim(tuple(dims), tuple(range(len(dims))))
    moved = front.flatten(0, len(dims) - 1).index_select(0, where).reshape(front.shape)
    return moved.movedim(tuple(range(len(dims))), tuple(dims)).contiguous()


@dataclass(frozen=True, eq=False)
class Moved:
    """A stored tensor that is read with its units moved.

    Attributes:
        stored: the tensor as it is stored.
        tables: its (group, table) pairs, outermost group first.
        indices: group -> (n,) unit of the stored tensor for each unit.
        latest: the tensor that a thread moved last: its chunks are asked for one after the other.
    """

    stored: Stored
    tables: TablesOfTensor
    indices: Indices
    latest: threading.local

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
        return self.stored.size

    @property
    def by_rows(self) -> bool:
        """Whether slices along the first axis move by themselves, so that none needs the whole tensor."""
        return len(self.shape) > 1 and all(0 not in table.dims for _, table in self.tables)

    @property
    def held(self) -> int:
        """Bytes that reading chunks holds besides them: the tensor as moved, and for a moment as stored."""
        return 0 if self.by_rows else 2 * size_of(self.dtype, self.shape)

    def read(self, chunk: slice | None = None) -> Tensor:
        """The tensor, or this chunk of it flattened, in memory of its own."""
        if chunk is None:
            return permute_tensor(self.stored.read(), self.tables, self.indices)
        if self.by_rows:
            row = max(1, math.prod(self.shape[1:]))
            first, stop = chunk.start // row, -(-chunk.stop // row)
            rows = self.stored.read(slice(first * row, stop * row)).view(stop - first, *self.shape[1:])
            moved = permute_tensor(rows, self.tables, self.indices)
            return moved.view(-1)[chunk.start - first * row : chunk.stop - first * row]
        if getattr(self.latest, "entry", None) is not self:
            self.latest.tensor = None  # before the next one is read
            self.latest.tensor = self.read()
            self.latest.entry = self
        return flat(self.latest.tensor, chunk).clone()


def act_on_disk(spec: Symmetries, indices: Indices, weights: Checkpoint) -> Checkpoint:
    """The weights with their units moved, each tensor when it is read; groups that are not named stay."""
    latest = threading.local()
    tables = {
        name: [(group, table) for group, table in spec.tables_by_tensor.get(name, ()) if group in indices]
        for name in weights
    }
    apart = {name for name, first in weights.ties.items() if tables[name] != tables[first]}
    stored: dict[str, Stored] = {
        name: Moved(weights.entry(name), tables[name], indices, latest) if tables[name] else weights.entry(name)
        for name in (*weights.stored, *apart)
    }
    ties = {name: first for name, first in weights.ties.items() if name not in apart}
    return Checkpoint(weights.path, stored, ties, weights.notes, weights.metadata)


def moved_entries(weights: Checkpoint) -> dict[str, Moved]:
    """The tensors of a checkpoint that are moved when they are read."""
    found: dict[str, Moved] = {}
    for name, entry in weights.stored.items():
        inner: Any = entry  # a cast to another dtype may be around it
        while not isinstance(inner, Moved) and hasattr(inner, "stored"):
            inner = inner.stored
        if isinstance(inner, Moved):
            found[name] = inner
    return found


def order_of_units(weights: Checkpoint) -> str:
    """The SHA-256 of the moves that tensors of a checkpoint make when they are read; empty where none does."""
    moved = moved_entries(weights)
    digest = hashlib.sha256()
    for name, entry in moved.items():
        for group, table in entry.tables:
            digest.update(f"{name} {group} {table.dims} {table.rows.shape}".encode())
            digest.update(table.rows.tobytes())
            digest.update(entry.indices[group].numpy().tobytes())
    return digest.hexdigest() if moved else ""


def sources(spec: Symmetries, indices: Indices) -> dict[str, str]:
    """For each group the group of its family whose units arrive in it when outer groups move.

    A group inside unit i of a parent receives the units of the sibling inside unit `p[i]` of the parent's source. So in
    the wreath product S_n wr S_m an element is (p; q_1, ..., q_m), and what q_i orders came from block p[i].
    """
    found: dict[str, str] = {}

    def source(group: Group) -> str:
        if group.name not in found:
            within = tuple((source(spec.groups[parent]), int(indices[parent][unit])) for parent, unit in group.within)
            found[group.name] = spec.by_place[group.family, within]
        return found[group.name]

    for group in spec.groups.values():
        source(group)
    return found


def compose_moves(spec: Symmetries, step: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`step` after `first`, where groups that are not named stay; only groups that may move are named in the result.

    As `first` acts before `step` has moved outer groups, a group of the result composes with the order that `first` gave to
    its source, not to itself.
    """
    found: dict[str, str] = {}

    def source(name: str) -> str:
        if name not in found:
            group = spec.groups[name]
            within = tuple(
                (source(parent), int(step[parent][unit]) if parent in step else unit) for parent, unit in group.within
            )
            found[name] = spec.by_place[group.family, within]
        return found[name]

    families = dict.fromkeys(spec.groups[name].family for name in (*step, *first))
    result = {}
    for name in (name for family in families for name in spec.families[family]):
        before, after = first.get(source(name)), step.get(name)
        if before is not None or after is not None:
            result[name] = before if after is None else after if before is None else before[after]
    return result
