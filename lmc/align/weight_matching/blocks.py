"""A spec arranged for coordinate descent: blocks of groups that are solved together, and what each one sees.

A block is an outermost group with everything nested in its units. Inside one unit of it there is again such a problem,
the same for every unit, so nested groups are solved by nested assignment: the gain of putting B's unit j into A's
unit i is the optimum of the inner problem between the two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmc.symmetry.groups.action import permute_tensor
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.spec import PermutationSpec

Step = Mapping[str, Tensor]
Tables = dict[str, tuple[Table, ...]]
Shapes = Mapping[str, tuple[int, ...]]
Children = Mapping[tuple[str, int], Sequence[Group]]


@dataclass(frozen=True, eq=False)
class Place:
    """One table of a block: rows `(n, m)` over the axes `dims` of a tensor, `natural` if they are 0..n*m-1 in order."""

    tensor: str
    dims: tuple[int, ...]
    rows: Tensor
    natural: bool

    def features(self, tensor: Tensor) -> Tensor:
        """`(n, m * rest)`: what belongs to each unit, one row per unit (a view where memory order allows it)."""
        return self._by_position(tensor).reshape(self.rows.shape[0], -1)

    def slices(self, tensor: Tensor) -> Tensor:
        """`(n, m, *rest)`: what belongs to each unit, the other axes kept apart."""
        rest = [size for d, size in enumerate(tensor.shape) if d not in self.dims]
        return self._by_position(tensor).reshape(*self.rows.shape, *rest)

    def _by_position(self, tensor: Tensor) -> Tensor:
        """The tensor with the axes `dims` first, and along them the positions in the order of `rows`."""
        front = tensor if self.dims == (0,) else tensor.movedim(self.dims, tuple(range(len(self.dims))))
        if self.natural:
            return front
        return front.reshape(-1, *front.shape[len(self.dims) :]).index_select(0, self.rows.flatten())


class Shift(NamedTuple):
    """Positions along an axis of a tensor: taken in the order `index`, of which `moved` change their content."""

    axis: int
    index: Tensor
    moved: Tensor


@dataclass(frozen=True, eq=False)
class UnitBlock:
    """A group, its places in tensors, and the blocks nested in each of its units (given for unit 0, relative to it).

    Attributes:
        places: the positions of the units of the group.
        tables: for each tensor the tables of the group and of all groups nested in it, outermost first.
        inner: the blocks of the problem inside unit 0, whose tensors are the slices that `places` give to it.
        names: `names[i]` are the names of all groups below unit i, in the same order for each i.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    tables: Mapping[str, Sequence[tuple[str, Table]]]
    inner: "tuple[UnitBlock, ...]"
    names: tuple[tuple[str, ...], ...]

    def move(self, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Shift | None]]:
        """For each of `tensors` that the block touches: itself after a step of some groups, and the axis it moved on.

        The `Shift` is None for a tensor that moves along several axes.
        """
        plain = _shift(step[self.name]) if self.name in step else None
        result: dict[str, tuple[Tensor, Shift | None]] = {}
        for name in (name for name in self.tables if name in tensors):
            before = tensors[name]
            shift = (
                plain._replace(axis=self.plain[name])
                if plain and name in self.plain
                else self._along(step, name, before)
            )
            if shift is None:
                result[name] = permute_tensor(before, self._moving(step, name), step), None
            else:
                shift = Shift(shift.axis, shift.index.to(before.device), shift.moved.to(before.device))
                result[name] = before.index_select(shift.axis, shift.index), shift
        return result

    def _along(self, step: Step, name: str, tensor: Tensor) -> Shift | None:
        """The move of the positions of one axis, if all tables of that tensor are along one axis."""
        tables = self._moving(step, name)
        axes = {table.dims for _, table in tables}
        if len(axes) != 1 or len(dims := axes.pop()) != 1:
            return None
        along = [(group, Table((0,), table.rows)) for group, table in tables]
        return _shift(permute_tensor(torch.arange(tensor.shape[dims[0]]), along, step))._replace(axis=dims[0])

    def _moving(self, step: Step, name: str) -> list[tuple[str, Table]]:
        return [(group, table) for group, table in self.tables[name] if group in step]

    @cached_property
    def plain(self) -> dict[str, int]:
        """The axis of each tensor that has one position per unit along it and nothing nested."""
        return {
            place.tensor: place.dims[0]
            for place in self.places
            if place.natural
            and len(place.dims) == 1
            and place.rows.shape[1] == 1
            and len(self.tables[place.tensor]) == 1
        }

    @cached_property
    def quadratic(self) -> bool:
        """Whether a tensor has the group on two axes, so that its gain depends on itself."""
        return len({place.tensor for place in self.places}) < len(self.places)

    @cached_property
    def separable(self) -> bool:
        """Whether the blocks inside a unit are plain assignments that do not see each other."""
        seen = [name for block in self.inner for name in block.tables]
        return len(seen) == len(set(seen)) and not any(block.inner or block.quadratic for block in self.inner)


def _shift(index: Tensor) -> Shift:
    return Shift(0, index, (index != torch.arange(len(index))).nonzero().flatten())


def sub_tensor(place_index: int) -> str:
    """The name of the part of a tensor that one place gives to a unit, in the problem inside that unit."""
    return f"place {place_index}"


def build_blocks(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> list[UnitBlock]:
    """The blocks of a spec, over the tensors that are to be matched; groups that touch none of them are left out."""
    children: dict[tuple[str, int], list[Group]] = {}
    roots = []
    for group in spec.groups.values():
        if len(group.within) == 1:
            children.setdefault(group.within[0], []).append(group)
        else:
            roots.append(group)
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def tables_of(group: Group) -> Tables:
        return {name: tables for name, tables in group.tables.items() if name in tensors}

    blocks = (_build(group, tables_of, shapes, children, device) for group in roots)
    return [block for block in blocks if block.places]


def _build(
    group: Group, tables_of: Callable[[Group], Tables], shapes: Shapes, children: Children, device: torch.device
) -> UnitBlock:
    """The block of a group; `tables_of` gives the tables of it and its descendants in tensors of these `shapes`."""
    held = [(tensor, table) for tensor, tables in tables_of(group).items() for table in tables]
    places = [_place(tensor, table, shapes[tensor], device) for tensor, table in held]
    nested = any((group.name, unit) in children for unit in range(group.size))
    below = [_below(group.name, unit, children) if nested else [] for unit in range(group.size)]
    tables: dict[str, list[tuple[str, Table]]] = {}
    for one in (group, *(g for groups in below for g in groups)):
        for tensor, found in tables_of(one).items():
            tables.setdefault(tensor, []).extend((one.name, table) for table in found)
    inner_shapes = {
        sub_tensor(k): (table.rows.shape[1], *(s for d, s in enumerate(shapes[tensor]) if d not in table.dims))
        for k, (tensor, table) in enumerate(held)
    }
    inner = (
        _build(child, lambda g: _relative(tables_of(g), held, shapes), inner_shapes, children, device)
        for child in children.get((group.name, 0), ())
    )
    return UnitBlock(
        group.name,
        group.size,
        tuple(places),
        tables,
        tuple(block for block in inner if block.places),
        tuple(tuple(g.name for g in groups) for groups in below),
    )


def _place(tensor: str, table: Table, shape: tuple[int, ...], device: torch.device) -> Place:
    natural = table.in_order and table.rows.size == math.prod(shape[d] for d in table.dims)
    return Place(tensor, table.dims, torch.from_numpy(table.rows).to(device), natural)


def _below(name: str, unit: int, children: Children) -> list[Group]:
    """All groups that live in a unit, at any depth, outermost first within each branch."""
    found = []
    for child in children.get((name, unit), ()):
        found.append(child)
        for i in range(child.size):
            found += _below(child.name, i, children)
    return found


def _relative(tables: Tables, held: Sequence[tuple[str, Table]], shapes: Shapes) -> Tables:
    """Tables of a group nested in unit 0, in the coordinates of what the places `held` give to that unit."""
    found: dict[str, tuple[Table, ...]] = {}
    for k, (tensor, parent) in enumerate(held):
        # Unit 0 of the parent owns the positions `parent.rows[0]` over the axes `parent.dims`; its slice of the tensor has
        # them in one first axis, in that order, and the other axes after it.
        column = {int(position): c for c, position in enumerate(parent.rows[0])}
        shape = shapes[tensor]
        left = [d for d in range(len(shape)) if d not in parent.dims]
        for table in tables.get(tensor, ()):
            if not set(parent.dims) <= set(table.dims):
                continue
            # The child's positions, one coordinate for each of its axes; those along the parent's axes together give the
            # parent's position, of which the child belongs to unit 0 if all are in `column`.
            sizes = [shape[d] for d in table.dims]
            coordinates = dict(zip(table.dims, np.unravel_index(table.rows, sizes), strict=True))
            flat = np.ravel_multi_index([coordinates[d] for d in parent.dims], [shape[d] for d in parent.dims])
            if not all(int(position) in column for position in flat.ravel()):
                continue
            # In the slice: axis 0 by column, then the axes that the child has beyond its parent's.
            columns = np.vectorize(column.__getitem__, otypes=[np.int64])(flat)
            extra = [d for d in table.dims if d not in parent.dims]
            dims = (0, *(1 + left.index(d) for d in extra))
            rows = np.ravel_multi_index(
                [columns, *(coordinates[d] for d in extra)], [parent.rows.shape[1], *(shape[d] for d in extra)]
            )
            found[sub_tensor(k)] = (*found.get(sub_tensor(k), ()), Table(dims, rows))
    return found
