"""MergedUnits of two networks that make up the units of one, and what that does to weights and activations (ZipIt, PLeaS).

With M the matrix that takes means over members and U the one that copies a unit to its members, both split into a part
for either network, a layer becomes `W* = M_A W_A U_A + M_B W_B U_B` (Stoica et al. 2024, arXiv:2305.03053, equation 4):
M along the axis on which units are computed, U along the one on which they are consumed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lmc.weights import Weights

A, B, BOTH = 0, 1, 2
Member = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class MergedUnits:
    """The units of one group in the merged network.

    Attributes:
        size: n, the units of the group in each of the two networks.
        members: for each of the m new units the units of A and those of B that it stands for.
    """

    size: int
    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def owner(self) -> Tensor:
        """(m,): 0 for units made of A's alone, 1 of B's alone, 2 of both."""
        return torch.tensor([BOTH if a and b else A if a else B for a, b in self.members])

    @cached_property
    def _members(self) -> Tensor:
        found = torch.zeros(2, len(self), self.size, dtype=torch.float64)
        for new, both in enumerate(self.members):
            for network, units in enumerate(both):
                found[network, new, list(units)] = 1.0
        return found

    def reading(self, network: int) -> Tensor:
        """(m, n): 1 where a unit of a network belongs to a new one, the transpose of U."""
        return self._members[network]

    def writing(self, network: int) -> Tensor:
        """(m, n): the share of a unit of a network in a new one, M."""
        return self._members[network] / self._members.sum((0, 2))[:, None]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Units made of both networks', of A's alone, and of B's alone."""
        both, a, b = (int((self.owner == owner).sum()) for owner in (BOTH, A, B))
        return both, a, b

    def __repr__(self) -> str:
        counts = self.counts
        return f"MergedUnits({len(self)} for {self.size} + {self.size}: {counts[0]} of both, {counts[1]} of A, {counts[2]} of B)"


def paired(size: int, separate: Sequence[int] = ()) -> MergedUnits:
    """Unit i of A with unit i of B, but for those that stay separate: A's in their places, B's at the end."""
    alone = set(separate)
    ours: list[Member] = [((i,), () if i in alone else (i,)) for i in range(size)]
    return MergedUnits(size, (*ours, *(((), (i,)) for i in sorted(alone))))


class Stretch(NamedTuple):
    """Positions `start` to `stop` of an axis: n units of a group one after the other, or (None) positions that stay."""

    start: int
    stop: int
    group: str | None


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: its pieces in order, and whether units are consumed along it, or computed."""

    axis: int
    pieces: tuple[Stretch, ...]
    reads: bool


Axes = Mapping[str, tuple[Axis, ...]]  # for each tensor the axes that have units


def zipped_axis(tensor: Tensor, axis: Axis, units: Mapping[str, MergedUnits], network: int) -> Tensor:
    """One network's part of a tensor with the new units along an axis; the parts of both are to be added.

    Where units are computed, positions of no merged group are one half of each network's.
    """
    front = tensor.movedim(axis.axis, 0)
    parts = []
    for start, stop, group in axis.pieces:
        part = front[start:stop]
        if group is not None and group in units:
            found = units[group]
            matrix = found.reading(network) if axis.reads else found.writing(network)
            part = (matrix.to(part) @ part.reshape(found.size, -1)).reshape(-1, *front.shape[1:])
        elif not axis.reads:
            part = 0.5 * part
        parts.append(part)
    return torch.cat(parts).movedim(0, axis.axis)


def zipped_weights(axes: Axes, units: Mapping[str, MergedUnits], a: Weights, b: Weights) -> Weights:
    """The weights of the merged network; sums are made in float32 at least. Integers come from A."""
    result = {}
    for name, tensor in a.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        moving = [axis for axis in axes.get(name, ()) if any(piece.group in units for piece in axis.pieces)]
        total = torch.zeros((), dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
        for network, weights in enumerate((a, b)):
            part = weights[name].to(total.dtype)
            for axis in moving:
                part = zipped_axis(part, axis, units, network)
            total = total + part
        computed = any(not axis.reads for axis in moving)
        result[name] = (total if computed else 0.5 * total).to(tensor.dtype).contiguous()
    return result


def owners(axis: Axis, units: Mapping[str, MergedUnits]) -> Tensor:
    """(L*,): whose the new positions of an axis are, 0 for A's alone, 1 for B's alone, 2 for both."""
    found = []
    for start, stop, group in axis.pieces:
        if group is not None and group in units:
            found.append(units[group].owner.repeat_interleave((stop - start) // units[group].size))
        else:
            found.append(torch.full((stop - start,), BOTH))
    return torch.cat(found)


def numbers(axes: Axes, units: Mapping[str, MergedUnits], weights: Weights, names: Sequence[str]) -> tuple[int, int]:
    """The number of entries of the merged tensors, and of those that may differ from zero.

    What is A's alone reads nothing that is B's alone, and the other way round.
    """
    stored = used = 0
    for name in names:
        lengths = list(weights[name].shape)
        moving = [axis for axis in axes.get(name, ()) if any(piece.group in units for piece in axis.pieces)]
        whose = {axis.reads: owners(axis, units) for axis in moving}
        for axis in moving:
            lengths[axis.axis] = len(whose[axis.reads])
        total = math.prod(lengths)
        stored += total
        used += total
        if len(whose) == 2:
            rest = total // (len(whose[True]) * len(whose[False]))
            used -= rest * sum(int((whose[False] == x).sum() * (whose[True] == 1 - x).sum()) for x in (A, B))
    return stored, used
