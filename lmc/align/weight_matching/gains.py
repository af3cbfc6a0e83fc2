"""Gain matrices that keep up with moving neighbours, so that no product is made twice, and their best assignments."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lmc.align.weight_matching.assignment import assign, prices_of
from lmc.align.weight_matching.blocks import Shift, UnitBlock

# From this size on, an assignment takes longer than finding the prices that speed up the next one.
_PRICED = 128
_CHUNK = 1 << 18


class Gains:
    """For each block the matrix `gain[i, j]`: the inner product of what A's unit i and B's unit j own, B as moved so far.

    It is a sum over the places of a block. The product of a place is made when it is first asked for; when a neighbour
    moves, only the slices that changed enter, as `A_slices (B_after - B_before)_slices^T`.
    """

    def __init__(self, blocks: Sequence[UnitBlock], fixed: Mapping[str, Tensor]) -> None:
        self.blocks, self.fixed = blocks, fixed
        self._gain: dict[int, Tensor] = {}
        self._held: list[set[int]] = [set() for _ in blocks]
        self._prices: dict[int, Tensor] = {}

    def of(self, i: int, used: Collection[int], state: Mapping[str, Tensor]) -> Tensor:
        """The gain `(n, n)` of block i over its places `used`, which hold all those asked for before."""
        block, held = self.blocks[i], self._held[i]
        for k in used:
            if k not in held:
                place = block.places[k]
                self._add(i, place.features(self.fixed[place.tensor]), place.features(state[place.tensor]))
                held.add(k)
        if i not in self._gain:
            return torch.zeros(block.size, block.size)
        return self._gain[i]

    def assign(self, i: int, gain: Tensor) -> tuple[Tensor, float]:
        """The best permutation of block i and its improvement, searched from the prices of its last assignment."""
        index, improvement = assign(gain, self._prices.get(i))
        if len(index) >= _PRICED:
            self._prices[i] = prices_of(gain, index, self._prices.get(i))
        return index, improvement

    def reorder(self, i: int, index: Tensor) -> None:
        """UnitBlock i itself has moved: B's units come in the order `index`."""
        for columns in (self._gain, self._prices):
            if i in columns:
                columns[i] = columns[i].index_select(-1, index.to(columns[i].device))

    def forget(self, i: int) -> None:
        """Compute the gain of block i from scratch when it is next asked for."""
        self._gain.pop(i, None)
        self._prices.pop(i, None)
        self._held[i].clear()

    def update(self, i: int, name: str, shift: Shift | None, before: Tensor, after: Tensor) -> None:
        """A neighbour of block i has changed a tensor, along one axis if there is a `shift`."""
        places = [self.blocks[i].places[k] for k in self._held[i] if self.blocks[i].places[k].tensor == name]
        if shift is None or any(shift.axis in place.dims for place in places):
            if places:
                self.forget(i)
            return
        fixed = self.fixed[name]
        if len(shift.moved) < len(shift.index):
            fixed, before, after = (x.index_select(shift.axis, shift.moved) for x in (fixed, before, after))
        for place in places:
            self._add(i, place.features(fixed), place.features(after - before))

    def _add(self, i: int, mine: Tensor, theirs: Tensor) -> None:
        if i in self._gain:
            self._gain[i].addmm_(mine, theirs.T)
        else:
            self._gain[i] = mine @ theirs.T


def inner_product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """`sum <a, b>` over the tensors of `a`, in float64."""
    return sum(_dot(x.flatten(), b[name].flatten()) for name, x in a.items())


def _dot(x: Tensor, y: Tensor) -> float:
    """`<x, y>` in float64, widened chunk by chunk: chunks stay in the cache, whole layers would not."""
    if len(x) <= _CHUNK:
        return float(torch.dot(x.double(), y.double()))
    return sum(map(_dot, x.split(_CHUNK), y.split(_CHUNK)))
