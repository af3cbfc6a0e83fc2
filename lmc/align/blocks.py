"""A spec arranged for coordinate descent: blocks of groups that are solved together, and what each one sees.

A block is an outermost group with everything nested in its units. What lies in one unit of it is again such a problem,
the same for every unit, so nested groups are solved by nested assignment: the gain of putting B's unit j into A's
unit i is the optimum of the inner problem between the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmc.symmetry.group import Group, Table
from lmc.symmetry.spec import PermutationSpec

Tables = dict[str, tuple[Table, ...]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Place:
    """One table of a block: rows `(n, m)` over the axes `dims` of a tensor, `natural` if they are 0..n*m-1 in order."""

    tensor: str
    dims: tuple[int, ...]
    rows: Tensor
    natural: bool

    def features(self, tensor: Tensor) -> Tensor:
        """`(n, m * rest)`: what belongs to each unit, one row per unit."""
        return self.slices(tensor).flatten(1)

    def slices(self, tensor: Tensor) -> Tensor:
        """`(n, m, *rest)`: what belongs to each unit, the other axes kept apart."""
        n, m = self.rows.shape
        front = tensor.movedim(self.dims, tuple(range(len(self.dims))))
        rest = front.shape[len(self.dims) :]
        flat = front.reshape(-1, *rest)
        if not self.natural:
            flat = flat.index_select(0, self.rows.flatten())
        return flat.reshape(n, m, *rest)

    def with_slices(self, tensor: Tensor, slices: Tensor) -> Tensor:
        """The tensor in which what belongs to each unit is replaced; undoes `slices`."""
        front = tensor.movedim(self.dims, tuple(range(len(self.dims))))
        rest = front.shape[len(self.dims) :]
        flat = front.reshape(-1, *rest).clone()
        flat[self.rows.flatten()] = slices.reshape(-1, *rest)
        return flat.reshape(front.shape).movedim(tuple(range(len(self.dims))), self.dims).contiguous()

    def permute(self, tensor: Tensor, index: Tensor) -> Tensor:
        """The tensor with units taken in the order `index`."""
        index = index.to(tensor.device)
        if self.natural and len(self.dims) == 1 and self.rows.shape[1] == 1:
            return tensor.index_select(self.dims[0], index)
        sizes = [tensor.shape[d] for d in self.dims]
        order = torch.arange(int(np.prod(sizes)), device=tensor.device)
        order[self.rows] = self.rows[index]
        if len(self.dims) == 1:
            return tensor.index_select(self.dims[0], order)
        front = tensor.movedim(self.dims, tuple(range(len(self.dims))))
        moved = front.flatten(0, len(self.dims) - 1).index_select(0, order).reshape(front.shape)
        return moved.movedim(tuple(range(len(self.dims))), self.dims).contiguous()


@dataclass(frozen=True, eq=False)
class Block:
    """A group, where it lies, and the blocks nested in each of its units (given for unit 0, relative to it).

    Attributes:
        names: for nested blocks, `names[i]` are the names of all groups below unit i, in the same order for each i.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    inner: "tuple[Block, ...]"
    names: tuple[tuple[str, ...], ...]

    def move(self, step: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the block touches, moved by a step: its units first, then what is nested in each."""
        moved = {place.tensor: tensors[place.tensor] for place in self.places if place.tensor in tensors}
        for k, place in enumerate(self.places):
            if place.tensor not in moved:
                continue
            tensor = place.permute(moved[place.tensor], step[self.name]) if self.name in step else moved[place.tensor]
            if any(name in step for names in self.names for name in names):
                slices = place.slices(tensor).clone()
                for unit, names in enumerate(self.names):
                    inner_step = {t: step[n] for t, n in zip(self.names[0], names, strict=True) if n in step}
                    part = {sub_tensor(k): slices[unit]}
                    for block in self.inner:
                        part |= block.move(inner_step, part)
                    slices[unit] = part[sub_tensor(k)]
                tensor = place.with_slices(tensor, slices)
            moved[place.tensor] = tensor
        return moved

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(place.tensor for place in self.places)

    @property
    def quadratic(self) -> bool:
        """Whether a tensor has the group on two axes, so that its gain depends on itself."""
        return len(self.tensors) < len(self.places)


def sub_tensor(place_index: int) -> str:
    """The name of the part of a tensor that one place gives to a unit, in the problem inside that unit."""
    return f"place {place_index}"


def build_blocks(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> list[Block]:
    """The blocks of a spec, over the tensors that are to be matched; groups that touch none of them are left out."""
    children: dict[tuple[str, int], list[Group]] = {}
    roots = []
    for group in spec.groups.values():
        if len(group.within) == 1:
            children.setdefault(group.within[0], []).append(group)
        else:
            roots.append(group)
    device = next(iter(tensors.values())).device
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    blocks = []
    for group in roots:
        tables = {name: tables for name, tables in group.tables.items() if name in tensors}
        if tables:
            blocks.append(_build(group, tables, shapes, children, lambda g: g.tables, device))
    return blocks


def _build(group: Group, tables: Tables, shapes: Shapes, children, tables_of, device) -> Block:
    places, held = [], []
    for tensor, found in tables.items():
        for table in found:
            natural = bool((table.rows.ravel() == np.arange(table.rows.size)).all())
            natural = natural and table.rows.size == int(np.prod([shapes[tensor][d] for d in table.dims]))
            places.append(Place(tensor, table.dims, torch.from_numpy(table.rows).to(device), natural))
            held.append(table)
    inner_shapes = {
        sub_tensor(k): (place.rows.shape[1], *(s for d, s in enumerate(shapes[place.tensor]) if d not in place.dims))
        for k, place in enumerate(places)
    }

    def inner_tables(child: Group) -> Tables:
        return _relative(tables_of(child), places, held, shapes)

    inner = tuple(
        block
        for child in children.get((group.name, 0), ())
        if (block := _build(child, inner_tables(child), inner_shapes, children, inner_tables, device)).places
    )
    names = tuple(tuple(_below(group.name, unit, children)) for unit in range(group.size)) if inner else ()
    return Block(group.name, group.size, tuple(places), inner, names)


def _below(name: str, unit: int, children) -> list[str]:
    found = []
    for child in children.get((name, unit), ()):
        found.append(child.name)
        for i in range(child.size):
            found += _below(child.name, i, children)
    return found


def _relative(tables: Tables, places: Sequence[Place], held: Sequence[Table], shapes: Shapes) -> Tables:
    """Tables of a group nested in unit 0, in the coordinates of what the places give to that unit."""
    found: dict[str, tuple[Table, ...]] = {}
    for k, (place, parent) in enumerate(zip(places, held, strict=True)):
        column = {int(position): c for c, position in enumerate(parent.rows[0])}
        shape = shapes[place.tensor]
        left = [d for d in range(len(shape)) if d not in parent.dims]
        for table in tables.get(place.tensor, ()):
            if not set(parent.dims) <= set(table.dims):
                continue
            sizes = [shape[d] for d in table.dims]
            coordinates = dict(zip(table.dims, np.unravel_index(table.rows, sizes), strict=True))
            flat = np.ravel_multi_index([coordinates[d] for d in parent.dims], [shape[d] for d in parent.dims])
            if not all(int(position) in column for position in flat.ravel()):
                continue
            columns = np.vectorize(column.__getitem__, otypes=[np.int64])(flat)
            extra = [d for d in table.dims if d not in parent.dims]
            dims = (0, *(1 + left.index(d) for d in extra))
            rows = np.ravel_multi_index(
                [columns, *(coordinates[d] for d in extra)], [parent.rows.shape[1], *(shape[d] for d in extra)]
            )
            found[sub_tensor(k)] = (*found.get(sub_tensor(k), ()), Table(dims, rows))
    return found
