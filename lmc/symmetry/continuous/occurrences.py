"""Occurrences of a group: the places where its units can be mixed, each by a matrix of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmc.symmetry.group import Group, Rows
from lmc.symmetry.symmetries import Symmetries
from lmc.weights import Weights

MOST_COLUMNS = 8  # of a table that are told apart: gates of a cell, copies of a unit; more are the pixels of one


@dataclass(frozen=True, eq=False)
class Occurrence:
    """The units of a group at one place of one tensor.

    Attributes:
        name: the tensor, with the axes where it has several tables, and the column where a unit has a few places.
        tensor: name of the tensor.
        dims: the axes concerned.
        rows: (n, m) flat positions over `dims` that belong to each unit.
    """

    name: str
    tensor: str
    dims: tuple[int, ...]
    rows: Rows

    def mixed(self, weights: Weights, matrix: Tensor) -> Tensor:
        """The tensor with its first units u replaced by `matrix` (k, k) u."""
        tensor = weights[self.tensor].clone()
        front = tensor.movedim(self.dims, tuple(range(len(self.dims))))  # a view
        flat = front.flatten(0, len(self.dims) - 1) if len(self.dims) > 1 else front
        positions = torch.from_numpy(self.rows[: len(matrix)]).to(tensor.device)
        units = flat[positions]
        flat[positions] = torch.einsum("ij,j...->i...", matrix.to(tensor), units)
        if len(self.dims) == 1:
            return tensor
        return flat.reshape(front.shape).movedim(tuple(range(len(self.dims))), self.dims).contiguous()


def occurrences(spec: Symmetries, group: Group) -> Iterator[Occurrence]:
    """Each place of a group, tied tensors once."""
    for tensor, tables in group.tables.items():
        if tensor in spec.aliases:
            continue
        for table in tables:
            axes = f" axis {','.join(map(str, table.dims))}" if len(tables) > 1 else ""
            columns = table.rows.shape[1]
            if 1 < columns <= MOST_COLUMNS:
                for c in range(columns):
                    yield Occurrence(f"{tensor}{axes}[{c}]", tensor, table.dims, table.rows[:, c : c + 1])
            else:
                yield Occurrence(f"{tensor}{axes}", tensor, table.dims, table.rows)


def changed(spec: Symmetries, weights: Weights, places: Mapping[Occurrence, Tensor]) -> Weights:
    """The weights with the units mixed at some occurrences, tied tensors under all their names."""
    result = dict(weights)
    for place, matrix in places.items():
        result[place.tensor] = place.mixed(result, matrix)
    for alias, first in spec.aliases.items():
        if result[first] is not weights[first]:
            result[alias] = result[first]
    return result
