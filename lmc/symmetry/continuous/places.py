"""The places of the units of a group, and weights with a few units mixed at some of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmc.symmetry.groups.group import Group, Rows
from lmc.symmetry.groups.symmetries import Symmetries
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

    def units(self, values: Tensor, chosen: Sequence[int], batch: int = 0) -> Tensor:
        """(batch axes, k, everything else): what a tensor, or a batch of such, holds of the chosen units."""
        dims = tuple(d + batch for d in self.dims)
        front = values.movedim(dims, tuple(range(batch, batch + len(dims))))
        flat = front.flatten(batch, batch + len(dims) - 1)
        positions = torch.from_numpy(self.rows[list(chosen)].ravel()).to(values.device)
        return flat.index_select(batch, positions).reshape(*values.shape[:batch], len(chosen), -1)

    def mix_(self, tensor: Tensor, matrix: Tensor, chosen: Sequence[int] | None = None) -> None:
        """Replace the chosen units u (default: all) of a tensor by `matrix` (k, k) u, or multiply them by factors (k,)."""
        front = tensor.movedim(self.dims, tuple(range(len(self.dims))))
        rows = self.rows if chosen is None else self.rows[list(chosen)]
        places = np.unravel_index(rows.ravel(), front.shape[: len(self.dims)])
        where = tuple(torch.from_numpy(place).to(tensor.device) for place in places)
        picked = front[where]
        units, by = picked.reshape(len(rows), -1), matrix.to(tensor)
        front[where] = (units * by[:, None] if by.ndim == 1 else by @ units).reshape(picked.shape)


class Move(NamedTuple):
    """Units of a group that are mixed by a matrix (k, k) at one place, or multiplied by factors (k,)."""

    place: Occurrence
    matrix: Tensor
    chosen: Sequence[int] | None = None


def random_matrix(mixing: str, noise: Tensor) -> Tensor:
    """An invertible matrix (k, k) of a kind of mixing, near the identity, made of standard normal numbers."""
    k = len(noise)
    if mixing == "general linear":
        return torch.linalg.matrix_exp(0.3 * noise / k**0.5)
    turn = noise - noise.T
    if mixing == "orthogonal fixing 1":
        centred = torch.eye(k, dtype=noise.dtype) - 1.0 / k
        turn = centred @ turn @ centred
    return torch.linalg.matrix_exp(0.5 * turn / k**0.5)


def occurrences(spec: Symmetries, group: Group) -> Iterator[Occurrence]:
    """Each place of a group, tied tensors once. Of units that hold other groups, such as heads, no columns are told apart."""
    whole = any(parent == group.name for other in spec.groups.values() for parent, _ in other.within)
    for tensor, tables in group.tables.items():
        if tensor in spec.aliases:
            continue
        for table in tables:
            axes = f" axis {','.join(map(str, table.dims))}" if len(tables) > 1 else ""
            columns = table.rows.shape[1]
            if 1 < columns <= MOST_COLUMNS and not whole:
                for c in range(columns):
                    yield Occurrence(f"{tensor}{axes}[{c}]", tensor, table.dims, table.rows[:, c : c + 1])
            else:
                yield Occurrence(f"{tensor}{axes}", tensor, table.dims, table.rows)


def moved(spec: Symmetries, weights: Weights, moves: Sequence[Move]) -> Weights:
    """The weights after some moves, one after the other; tied tensors under all their names."""
    result = dict(weights)
    for place, matrix, chosen in moves:
        if result[place.tensor] is weights[place.tensor]:
            result[place.tensor] = weights[place.tensor].clone(memory_format=torch.contiguous_format)
        place.mix_(result[place.tensor], matrix, chosen)
    for alias, first in spec.aliases.items():
        if alias in result and result[first] is not weights[first]:
            result[alias] = result[first]
    return result
