"""The action of group elements: on flat positions of a tensor, on weights in memory and on disk, and on each other when groups
are nested."""

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.groups.symmetries import Symmetries
from lmc.weights import Weights
from lmc.weights.checkpoint import Checkpoint, Remade, Stored, flat, size_of

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
class Moved(Remade):
    """A stored tensor that is read with its units moved.

    Attributes:
        stored: the tensor as it is stored.
        tables: its (group, table) pairs, outermost group first.
        indices: group -> (n,) unit of the stored tensor for each unit.
        latest: the tensor that a thread moved last: its chunks are asked for one after the other.
    """

    tables: TablesOfTensor
    indices: Indices
    latest: threading.local

    @property
    def by_rows(self) -> bool:
        """Whether slices along the first axis move by themselves, so that none needs the whole tensor."""
        return len(self.shape) > 1 and all(0 not in table.dims for _, table in self.tables)

    @property
    def held(self) -> int:
        """Bytes that reading chunks holds besides them: the tensor as moved, and for a moment as stored."""
        return 0 if self.by_rows else 2 * size_of(self.dtype, self.shape)

    def read(self, chunk: slice | None = None) -> Tensor:
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
        inner = entry  # an adapter, other rows or a cast to another dtype may be around it
        while isinstance(inner, Remade) and not isinstance(inner, Moved):
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
