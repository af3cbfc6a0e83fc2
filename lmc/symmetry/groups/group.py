"""Groups of interchangeable units as index tables: the one shape that covers every permutation symmetry.

A group of `n` units touches some axes of some tensors. A `Table` says where: over the flattened axes `dims` of
one tensor, row `i` of `rows` lists the flat positions that belong to unit `i`. Permuting the group permutes rows:
a plain axis has rows `(n, 1)`, convolution -> flatten `(channels, pixels)`, heads `(heads, head_dim)`, fused gates
`(hidden, 4)`; a concatenation covers only a part of the axis; grouped convolutions and stacked experts need two axes.

Groups may live inside units of other groups: the value units of head 3 are a group `within` unit 3 of the heads. The
groups of one `family` (the value units of all heads) are carried onto each other when the heads move.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lmc.errors import SpecError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """The places of the units of a group in one tensor.

    Attributes:
        dims: the axes concerned, ascending.
        rows: `(n, m)` int64; `rows[i]` are the flat positions over `dims` (row-major) that belong to unit `i`.
            Column `c` of two rows corresponds: exchanging units i and j exchanges `rows[i, c]` with `rows[j, c]`.
    """

    dims: tuple[int, ...]
    rows: Rows

    @cached_property
    def in_order(self) -> bool:
        """Whether the positions, unit after unit, are 0, 1, 2 and so on."""
        return np.array_equal(self.rows.ravel(), np.arange(self.rows.size))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Table)
            and self.dims == other.dims
            and self.rows.shape == other.rows.shape
            and bool((self.rows == other.rows).all())
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Group:
    """`size` interchangeable units: any permutation of them, applied to all `tables` at once, keeps the function.

    Attributes:
        name: unique name, for a nested group `family[i]` (or `family[i,j]` two levels deep).
        size: number of units n.
        tables: for each tensor that the group touches, one or more tables (two when a tensor has the group on both axes).
        family: name shared by the groups that outer permutations carry onto each other; the name itself if alone.
        within: the (group name, unit) pairs whose units this group lives inside; empty for an outermost group.
    """

    name: str
    size: int
    tables: dict[str, tuple[Table, ...]]
    family: str = ""
    within: tuple[tuple[str, int], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.name)

    @property
    def log10_order(self) -> float:
        """log10 of the number of permutations of the units, log10(n!)."""
        return math.lgamma(self.size + 1) / math.log(10)


class Groups(dict[str, Group]):
    """Groups by name, printed short."""

    def __repr__(self) -> str:
        shown = [f"{name}: {group.size}" for name, group in itertools.islice(self.items(), 12)]
        more = f", ... ({len(self) - 12} more)" if len(self) > 12 else ""
        return f"Groups({len(self)}: {', '.join(shown)}{more})" if self else "Groups(none)"


Shape = tuple[int, ...]
Places = tuple[tuple[str, int], ...]


def check_groups(groups: Mapping[str, Group], shapes: Mapping[str, Shape]) -> None:
    """Raise `SpecError` unless tables fit the shapes and nested siblings correspond under their parents."""
    for group in groups.values():
        for tensor, tables in group.tables.items():
            if tensor not in shapes:
                raise SpecError(f"group {group.name!r} moves {tensor}, whose shape is not known")
            for table in tables:
                _check_table(group, tensor, table, shapes[tensor])
        for parent, unit in group.within:
            if not 0 <= unit < groups[parent].size:
                raise SpecError(
                    f"group {group.name!r} lives in unit {unit} of {parent!r}, which has {groups[parent].size}"
                )
    siblings: dict[tuple[str, str, Places], dict[int, Group]] = {}
    by_place = {(group.family, group.within): group for group in groups.values()}
    for group in groups.values():
        for parent, unit in group.within:
            others = tuple(place for place in group.within if place[0] != parent)
            siblings.setdefault((group.family, parent, others), {})[unit] = group
            for other in range(groups[parent].size):
                place = tuple((p, other) if p == parent else (p, u) for p, u in group.within)
                if (group.family, place) not in by_place:
                    raise SpecError(
                        f"family {group.family!r} has a group in unit {unit} of {parent!r}, none in {other}"
                    )
    for (_, name, _), members in siblings.items():
        parent = groups[name]
        first = members[0]
        for unit, member in members.items():
            _check_carried(parent, first, member, unit, shapes)


def outermost_first(groups: Mapping[str, Group]) -> list[Group]:
    """The groups ordered so that each comes after those it lives in."""
    depth: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in groups:
            raise SpecError(f"a group lives in {name!r}, which is not a group")
        if name not in depth:
            depth[name] = 1 + max((level(parent) for parent, _ in groups[name].within), default=-1)
        return depth[name]

    return sorted(groups.values(), key=lambda group: level(group.name))


def absence(name: str, aliases: Mapping[str, str], weights: Mapping[str, object]) -> str:
    """A reason for which weights may lack a tensor that a spec knows, and what to do: files keep tied tensors once, wrappers
    of modules put a prefix before every name. Empty if there is none."""
    first = aliases.get(name, name)
    tied = [other for other in (first, *(n for n, f in aliases.items() if f == first)) if other in weights]
    if tied:
        return f" but as {tied[0]}, to which it is tied: load them into the module, and pass the module"
    if any(other.endswith(f".{name}") or name.endswith(f".{other}") for other in weights):
        return (
            ": their names differ by the prefix of a wrapper (torch.compile, DataParallel); make the spec of the module "
            "inside, model._orig_mod or model.module, and take the weights from it too"
        )
    return ""


def _check_table(group: Group, tensor: str, table: Table, shape: Shape) -> None:
    where = f"group {group.name!r}, {tensor}{shape}, axes {table.dims}"
    if not table.dims or list(table.dims) != sorted(set(table.dims)) or table.dims[-1] >= len(shape):
        raise SpecError(f"{where}: no such axes")
    if table.rows.ndim != 2 or table.rows.shape[0] != group.size:
        raise SpecError(f"{where}: rows of shape {table.rows.shape}, expected ({group.size}, m)")
    length = int(np.prod([shape[d] for d in table.dims]))
    if table.rows.size and (table.rows.min() < 0 or table.rows.max() >= length):
        raise SpecError(f"{where}: rows reach outside the {length} positions")
    if np.bincount(table.rows.ravel(), minlength=1).max(initial=0) > 1:
        raise SpecError(f"{where}: a position belongs to two units")


def _check_carried(parent: Group, first: Group, member: Group, unit: int, shapes: Mapping[str, Shape]) -> None:
    """Exchanging units 0 and `unit` of the parent must carry the rows of `first` onto those of `member`, in order."""
    problem = f"groups {first.name!r} and {member.name!r} do not correspond when {parent.name!r} moves"
    if first.size != member.size or set(first.tables) != set(member.tables):
        raise SpecError(f"{problem}: sizes or tensors differ")
    for tensor, tables in first.tables.items():
        others = member.tables[tensor]
        if len(tables) != len(others):
            raise SpecError(f"{problem} in {tensor}: different numbers of tables")
        if unit == 0:
            continue
        for table, other in zip(tables, others, strict=True):
            if table.dims != other.dims or table.rows.shape != other.rows.shape:
                raise SpecError(f"{problem} in {tensor}: tables of different shapes")
            moved = carried(parent, unit, tensor, table, shapes[tensor])
            if not np.array_equal(moved, other.rows):
                raise SpecError(f"{problem} in {tensor}: rows or columns in another order")


def carried(parent: Group, unit: int, tensor: str, table: Table, shape: Shape) -> np.ndarray:
    """The rows of a table of `tensor` after units 0 and `unit` of `parent` changed places.

    The parent may act on fewer axes than the table spans: each position is taken apart into coordinates, those on the
    parent's axes go through its exchange, and all are put together again.
    """
    sizes = [shape[d] for d in table.dims]
    coordinates = list(np.unravel_index(table.rows, sizes))
    for held in parent.tables.get(tensor, ()):
        if not set(held.dims) <= set(table.dims):
            continue
        at = [table.dims.index(d) for d in held.dims]
        held_sizes = [shape[d] for d in held.dims]
        swap = np.arange(int(np.prod(held_sizes)))
        swap[held.rows[0]], swap[held.rows[unit]] = held.rows[unit], held.rows[0]
        flat = swap[np.ravel_multi_index([coordinates[i] for i in at], held_sizes)]
        for i, values in zip(at, np.unravel_index(flat, held_sizes), strict=True):
            coordinates[i] = values
    return np.ravel_multi_index(coordinates, sizes)
