"""The ledger of discovery: which units exist, and what every symmetry has to respect about them.

A *unit* is an integer, something that may be permuted: one index of one axis of one parameter, or something derived
from such indices (a head, seen as a block of rows). Units come in *sorts*, contiguous ranges created together; the
units of a frozen sort are fixed by every symmetry. A symmetry is a permutation g of all units that

- fixes every frozen unit,
- commutes with every recorded *map* child -> parent (a bijection locks two sorts, a many-to-one map makes blocks),
- preserves every recorded *count* unit -> multiplicity (what a slice picks, a pad repeats, a sum runs over).

Operator rules only ever add maps and counts; `lmc.symmetry.discovery.solve` finds the permutations at the end.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sort:
    """Units `start ... start + size - 1`, created together; `frozen` is the reason why they never move, or empty."""

    start: int
    size: int
    frozen: str = ""


@dataclass(frozen=True, eq=False)
class Map:
    """`g(parent[k])` must be the parent of `g(child[k])`: each child has one parent. `site`: the node it comes from."""

    child: Ids
    parent: Ids
    site: int


@dataclass(frozen=True, eq=False)
class Count:
    """`ids[k]` occurs `times[k]` times, all other units never: g keeps the multiplicity."""

    ids: Ids
    times: Ids
    site: int


@dataclass
class Units:
    """All units, maps and counts met so far. `site` is the graph node being interpreted, kept for explanations."""

    sorts: list[Sort] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    total: int = 0
    site: int = -1
    memo: dict[tuple[object, ...], Ids] = field(default_factory=dict)
    _frozen: dict[str, Ids] = field(default_factory=dict)
    _seen: set[tuple[object, ...]] = field(default_factory=set)
    _scratch: Ids = field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    _live: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1 << 16, np.bool_))
    _is_frozen: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1 << 16, np.bool_))
    _hash: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def fresh(self, size: int, frozen: str = "") -> Ids:
        """The ids of a new sort of `size` units."""
        start = self.total
        self.sorts.append(Sort(start, size, frozen))
        self.starts.append(start)
        self.total += size
        while self.total > self._scratch.size:
            self._scratch = np.concatenate([self._scratch, np.zeros_like(self._scratch)])
            self._live = np.concatenate([self._live, np.zeros_like(self._live)])
            self._is_frozen = np.concatenate([self._is_frozen, np.zeros_like(self._is_frozen)])
        self._is_frozen[start : self.total] = bool(frozen)
        return np.arange(start, self.total, dtype=np.int64)

    def frozen(self, reason: str, size: int) -> Ids:
        """`size` units that never move, one per index; the same reason gives the same units again."""
        known = self._frozen.get(reason)
        if known is None or known.size < size:
            known = self._frozen[reason] = self.fresh(size, frozen=reason)
        return known[:size]

    def is_frozen(self, ids: Ids) -> bool:
        """Whether all `ids` are frozen."""
        return bool(self._is_frozen[ids].all())

    def frozen_mask(self) -> npt.NDArray[np.bool_]:
        return self._is_frozen[: self.total]

    def live_mask(self) -> npt.NDArray[np.bool_]:
        return self._live[: self.total]

    def touch(self, ids: Ids) -> None:
        """These units reach a computation: a group that touches no such unit is a group of unused numbers."""
        self._live[ids] = True

    def sort_of(self, unit: int) -> Sort:
        return self.sorts[bisect_right(self.starts, unit) - 1]

    def reason(self, unit: int) -> str:
        """The reason for which a frozen unit is frozen."""
        return self.sort_of(unit).frozen

    def codes(self, ids: Ids) -> tuple[Ids, int]:
        """`ids` (flat) renumbered 0 ... k-1 by first occurrence, and k. Linear time: a scratch array, no sorting."""
        order = np.arange(ids.size)
        self._scratch[ids[::-1]] = order[::-1]
        first = self._scratch[ids]
        is_first = first == order
        number = np.cumsum(is_first) - 1
        return number[first], int(number[-1]) + 1 if ids.size else 0

    def determines(self, a: Ids, b: Ids) -> bool:
        """Whether b is a function of a (both flat, of one size)."""
        self._scratch[a] = b
        return bool((self._scratch[a] == b).all())

    def distinct(self, ids: Ids) -> int:
        """The number of different units in `ids` (flat)."""
        order = np.arange(ids.size)
        self._scratch[ids] = order
        return int((self._scratch[ids] == order).sum())

    def hashes(self) -> npt.NDArray[np.uint64]:
        """A fixed random 64-bit number per unit; sums of them identify multisets."""
        if self._hash.size < self.total:
            rng = np.random.default_rng(20210906)
            self._hash = rng.integers(0, 1 << 63, size=2 * self.total + 1024, dtype=np.uint64)
        return self._hash

    def map(self, child: Ids, parent: Ids) -> None:
        """Record child -> parent (flat, of one size; repeated pairs are welcome)."""
        key = ("map", child.size, hash(child.tobytes()), hash(parent.tobytes()))
        if key in self._seen or self.is_frozen(parent) and self.is_frozen(child):
            return
        self._seen.add(key)
        if self.is_frozen(child):  # a function of fixed things is fixed
            code, k = self.codes(parent)
            child, parent = parent, self.frozen(self.reason(int(child[0])), k)[code]
        order = np.arange(child.size)
        self._scratch[child] = order
        once = self._scratch[child] == order
        self.maps.append(Map(child[once], parent[once], self.site))

    def lock(self, a: Ids, b: Ids) -> None:
        """Record a bijection: a and b move together."""
        self.map(a, b)
        self.map(b, a)

    def count(self, ids: Ids) -> None:
        """Record the multiset of `ids` (any shape), unless it holds all units of the sorts it touches equally often."""
        ids = ids.ravel()
        key = ("count", ids.size, hash(ids.tobytes()))
        if key in self._seen or self.is_frozen(ids):
            return
        self._seen.add(key)
        code, k = self.codes(ids)
        times = np.bincount(code, minlength=k)
        different = np.zeros(k, np.int64)
        different[code] = ids
        which = np.searchsorted(np.array(self.starts), different, side="right") - 1
        for s in np.unique(which):
            mine = which == s
            sort = self.sorts[s]
            if not sort.frozen and (mine.sum() < sort.size or (times[mine] != times[mine][0]).any()):
                self.counts.append(Count(different[mine], times[mine], self.site))

    def pair(self, a: Ids, b: Ids) -> Ids:
        """One new unit per occurring pair (a, b) (same shape), with maps to both and their multiplicity counted."""
        flat_a, flat_b = a.ravel(), b.ravel()
        code, k = self.pair_codes(flat_a, flat_b)
        if self.is_frozen(flat_a) and self.is_frozen(flat_b):
            return self.frozen(self.reason(int(flat_a[0])), k)[code].reshape(a.shape)
        new = self.fresh(k)[code]
        self.map(new, flat_a)
        self.map(new, flat_b)
        self.count(new)
        return new.reshape(a.shape)

    def pair_codes(self, a: Ids, b: Ids) -> tuple[Ids, int]:
        """Number the pairs (a, b) (flat) by first occurrence."""
        code_a, _ = self.codes(a)
        code_b, size_b = self.codes(b)
        return first_codes(code_a * size_b + code_b)


def first_codes(keys: npt.NDArray[np.generic]) -> tuple[Ids, int]:
    """Any flat keys renumbered 0 ... k-1 by first occurrence."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int64)
    rank[np.argsort(first)] = np.arange(first.size)
    return rank[inverse.ravel()], first.size
