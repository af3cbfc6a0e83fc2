"""From facts to groups: propose, from coarse to fine, that the members of a fibre are interchangeable, and check.

A *fibre* is a set of super-units of one class that live in the same parents: all heads of a layer, the value units of
one head. For each fibre of at least two, everything that depends on its members is arranged in a table, a row per
member; the proposal is that all permutations of the rows are symmetries. It is checked against every recorded map, so a
wrong proposal can cost a symmetry but never let a wrong one through.

Colour refinement: which units could be exchanged at all, and which must move together.

Units start with the colour of their sort (frozen units with a colour each, counted units with their multiplicity) and
are recoloured by the colours of their parents and children until nothing changes (one-dimensional Weisfeiler-Leman on
the recorded maps). Every symmetry permutes units within cells of one colour. Between cells of equal size a map is a
bijection: its units are *locked*. The connected components of locks are the *super-units*, which move as one; the other
maps lead from super-units to the parents they live in.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from lmc.symmetry.rules.units import Ids, Units, first_codes

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Edges:
    """All recorded maps as one list: `child[k]` has `parent[k]` under map number `label[k]`."""

    child: Ids
    parent: Ids
    label: Ids

    def take(self, index: Ids) -> "Edges":
        return Edges(self.child[index], self.parent[index], self.label[index])


@dataclass(frozen=True, eq=False)
class Structure:
    """Units sorted into cells and super-units.

    Attributes:
        edges: the maps among units that can move, and from them to units that cannot.
        cell: the cell of each unit. `active`: whether it has at least two units.
        owner: the super-unit of each unit, -1 for fixed units. `place`: which unit of its super-unit it is, a number
            that says the same in all super-units of one class.
        kind: the class of each super-unit (super-units of one class have units in the same cells).
        climbs: for each edge, whether it leads from one super-unit to a different, coarser one.
    """

    edges: Edges
    cell: Ids
    active: npt.NDArray[np.bool_]
    owner: Ids
    place: Ids
    kind: Ids
    climbs: npt.NDArray[np.bool_]


def mix(*parts: npt.NDArray[np.generic] | int) -> Hashes:
    """A 64-bit hash of several numbers, elementwise (splitmix64 finaliser after each)."""
    out: Hashes = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for number, part in enumerate(parts):
            step = np.uint64(0x9E3779B97F4A7C15 * (number + 1) & 0xFFFFFFFFFFFFFFFF)
            out = out ^ (np.asarray(part).astype(np.uint64) + step)
            out *= np.uint64(0xBF58476D1CE4E5B9)  # in place: of millions of numbers, new memory takes longer than this
            out ^= out >> np.uint64(27)
            out *= np.uint64(0x94D049BB133111EB)
            out ^= out >> np.uint64(31)
    return out


def count_of(keys: npt.NDArray[np.generic]) -> int:
    """The count of different numbers, by sorting: `np.unique` would put millions into a hash table one by one."""
    ordered = np.sort(keys)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + bool(ordered.size)


def summed(values: Hashes, index: Ids, size: int) -> Hashes:
    """The sum (modulo 2^64) of `values` for each `index`."""
    out = np.zeros(size, np.uint64)
    np.add.at(out, index, values)
    return out


def all_edges(units: Units) -> Edges:
    if not units.maps:
        return Edges(*(np.zeros(0, np.int64) for _ in range(3)))
    return Edges(
        np.concatenate([m.child for m in units.maps]),
        np.concatenate([m.parent for m in units.maps]),
        np.repeat(np.arange(len(units.maps)), [m.child.size for m in units.maps]),
    )


def initial_colours(units: Units) -> Hashes:
    """Sorts apart, frozen units apart, multiplicities apart."""
    colour = mix(np.repeat(np.arange(len(units.sorts)), [s.size for s in units.sorts]), 1)
    frozen = units.frozen_mask()
    colour[frozen] = mix(np.flatnonzero(frozen), 2)
    for number, count in enumerate(units.counts):
        colour[count.ids] += mix(count.times, number, 3)
    return colour


def refine(units: Units, edges: Edges) -> Ids:
    """The cell number of every unit: the coarsest equitable colouring."""
    colour = initial_colours(units)
    number, distinct = count_of(colour), -1
    while number > distinct:
        distinct = number
        up = summed(mix(colour[edges.parent], edges.label, 4), edges.child, units.total)
        down = summed(mix(colour[edges.child], edges.label, 5), edges.parent, units.total)
        colour = mix(colour, up, down)
        number = count_of(colour)
    return np.unique(colour, return_inverse=True)[1].ravel()


def structure(units: Units) -> Structure:
    """Refine, then glue locked units into super-units."""
    edges = all_edges(units)
    cell = refine(units, edges)
    size = np.bincount(cell)[cell]
    active = size > 1
    edges = edges.take(np.flatnonzero(active[edges.child]))
    both = active[edges.parent]
    locked = both & (size[edges.child] == size[edges.parent])
    owner, count = components(edges.child[locked], edges.parent[locked], units.total, active)
    cells = int(cell.max()) + 1
    cell_kind = connected(cell[edges.child[locked]], cell[edges.parent[locked]], cells)
    kind = np.zeros(count, np.int64)
    kind[owner[active]] = cell_kind[cell[active]]
    place = np.zeros(units.total, np.int64)
    members = np.flatnonzero(active)
    place[members] = mix(cell[members], rank_within(owner[members], cell[members], members)).view(np.int64)
    climbs = both & ~locked
    return Structure(edges, cell, active, owner, place, kind, climbs)


def connected(a: Ids, b: Ids, n: int) -> Ids:
    """For each of n things, the number of its connected component under the pairs (a, b)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = a.astype(np.int32), b.astype(np.int32)  # all that csgraph takes; older scipy would keep the 64 bits
    pairs = coo_array((np.ones(a.size, np.int8), ends), shape=(n, n))
    return connected_components(pairs, directed=False)[1].astype(np.int64)


def components(a: Ids, b: Ids, n: int, active: npt.NDArray[np.bool_]) -> tuple[Ids, int]:
    """Connected components of the active units under the pairs (a, b), numbered by smallest unit; -1 elsewhere."""
    labels = connected(a, b, n)
    first = np.full(int(labels.max()) + 1 if n else 0, n)
    members = np.flatnonzero(active)
    np.minimum.at(first, labels[members], members)
    number = np.full(first.size, -1)
    used = np.flatnonzero(first < n)
    number[used[np.argsort(first[used])]] = np.arange(used.size)
    return np.where(active, number[labels], -1), used.size


def rank_within(*keys: Ids) -> Ids:
    """The rank of each item among those with equal keys; the last key is the order."""
    order = np.lexsort(keys[::-1])
    same = np.ones(order.size, np.bool_)
    for key in keys[:-1]:
        same[1:] &= key[order][1:] == key[order][:-1]
    if order.size:
        same[0] = False
    start = np.maximum.accumulate(np.where(same, 0, np.arange(order.size)))
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size) - start
    return rank


ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Fibre:
    """A free set of units: any permutation of the rows of `units` (n, m) is a symmetry.

    `roots[i]` is the super-unit of row i; `parents` are the super-units that the whole fibre lives in.
    """

    kind: int
    units: Ids
    roots: Ids
    parents: Ids


@dataclass(frozen=True, eq=False)
class Solution:
    """All fibres found, coarse to fine, and the sets of units that were proposed and refused."""

    structure: Structure
    fibres: list[Fibre]
    refused: list[Ids]


@dataclass(frozen=True, eq=False)
class Links:
    """Edges in compressed rows: those of key k are `items[start[k]:start[k + 1]]`."""

    items: Ids
    start: Ids

    def of(self, keys: Ids) -> Ids:
        """All edges of the given keys."""
        counts = self.start[keys + 1] - self.start[keys]
        offsets = np.repeat(self.start[keys] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        return self.items[offsets + np.arange(int(counts.sum()))]


def links(keys: Ids, size: int) -> Links:
    return Links(np.argsort(keys, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=size))]))


def solve(units: Units, is_parameter: npt.NDArray[np.bool_]) -> Solution:
    """Find the free fibres.

    Args:
        units: the ledger, complete (common quotients of parents are added to it, see `add_quotients`).
        is_parameter: for each unit, whether it is an index of a parameter; these order the members of fibres.
    """
    if not units.total:
        units.fresh(1, frozen="the only unit")  # nothing but scalars: nothing moves, and no array is empty
        is_parameter = np.zeros(1, np.bool_)
    found = structure(units)
    seen: set[tuple[int, ...]] = set()
    for _ in range(ROUNDS):
        if not add_quotients(units, found, seen):
            break
        found = structure(units)
    search = Search(units, found, np.concatenate([is_parameter, np.zeros(units.total - is_parameter.size, np.bool_)]))
    fibres: list[Fibre] = []
    kinds, sizes = np.unique(found.kind, return_counts=True)
    for kind in kinds[np.argsort(sizes, kind="stable")]:
        fibres += search.fibres_of(int(kind))
    return Solution(found, fibres, search.refused)


def add_quotients(units: Units, found: Structure, seen: set[tuple[int, ...]]) -> bool:
    """Units that live in two parents relate these to each other. The connected components of that relation are
    preserved by every symmetry, so recording them loses nothing, and gives the coarse-to-fine search the missing
    coarse level: key heads, when query units live in query heads and in key units."""
    climbs = np.flatnonzero(found.climbs)
    child, parent = found.owner[found.edges.child[climbs]], found.owner[found.edges.parent[climbs]]
    kinds = int(found.kind.max(initial=0)) + 1
    # the climbs sorted by the classes that they join, so that each pair of classes is one stretch of them
    key = found.kind[child] * kinds + found.kind[parent]
    order = np.argsort(key, kind="stable")
    joined, starts = np.unique(key[order], return_index=True)
    stretches = np.split(order, starts[1:])
    parents_of: dict[int, dict[int, Ids]] = {}
    for code, stretch in zip(joined.tolist(), stretches, strict=False):
        parents_of.setdefault(code // kinds, {})[code % kinds] = stretch
    any_unit = np.zeros(found.kind.size, np.int64)
    any_unit[found.owner[found.active][::-1]] = np.flatnonzero(found.active)[::-1]
    added = False
    for above in parents_of.values():
        for (p, to_p), (q, to_q) in combinations(above.items(), 2):
            if q not in parents_of.get(p, ()) and p not in parents_of.get(q, ()):
                sides = (child[to_p], parent[to_p]), (child[to_q], parent[to_q])
                added |= relate(units, seen, any_unit, *sides)
    return added


def relate(
    units: Units, seen: set[tuple[int, ...]], any_unit: Ids, to_p: tuple[Ids, Ids], to_q: tuple[Ids, Ids]
) -> bool:
    """Record the common quotient of two classes of parents, given (children, parents) of each."""
    children, child = np.unique(np.concatenate([to_p[0], to_q[0]]), return_inverse=True)
    members, parent = np.unique(np.concatenate([to_p[1], to_q[1]]), return_inverse=True)
    label = connected(child.ravel() + members.size, parent.ravel(), members.size + children.size)[: members.size]
    code, size = first_codes(label)
    key = (hash(any_unit[members].tobytes()), hash(code.tobytes()))
    if size < 2 or key in seen:
        return False
    seen.add(key)
    quotient = units.fresh(size)[code]
    in_p = np.isin(members, to_p[1])
    for side in (in_p, ~in_p):
        units.map(any_unit[members[side]], quotient[side])
    return True


class Search:
    """The coarse-to-fine search over one structure."""

    def __init__(self, units: Units, found: Structure, is_parameter: npt.NDArray[np.bool_]):
        self.found = found
        self.refused: list[Ids] = []
        self.members = links(np.where(found.active, found.owner, found.kind.size), found.kind.size + 1)
        self.by_child = links(found.edges.child, units.total)
        self.by_parent = links(found.edges.parent, units.total)
        up = np.flatnonzero(found.climbs)
        self.up_child, self.up_parent = found.owner[found.edges.child[up]], found.owner[found.edges.parent[up]]
        self.up_hash = mix(found.edges.label[up], found.place[found.edges.child[up]])
        self.up_edges = up
        self.up_of = links(self.up_child, found.kind.size)
        self.down_of = links(self.up_parent, found.kind.size)
        self.of_kind = links(found.kind, int(found.kind.max(initial=0)) + 1)
        self.sizes = np.bincount(found.kind)
        self.order = self.reading_order(is_parameter)

    def reading_order(self, is_parameter: npt.NDArray[np.bool_]) -> Ids:
        """For each super-unit the first parameter index that depends on it: members are numbered as people read."""
        found = self.found
        units = np.flatnonzero(found.active & is_parameter)
        order = np.full(found.kind.size, np.iinfo(np.int64).max // 2)
        np.minimum.at(order, found.owner[units], units)
        for _ in range(ROUNDS):
            np.minimum.at(order, self.up_parent, order[self.up_child])
        rank = np.empty_like(order)
        rank[np.argsort(order, kind="stable")] = np.arange(order.size)
        return rank

    def fibres_of(self, kind: int) -> list[Fibre]:
        """The free fibres of one class of super-units."""
        found = self.found
        roots = self.of_kind.of(np.array([kind]))
        ups = self.up_of.of(roots)
        parent_units = found.edges.parent[self.up_edges[ups]]
        key = np.zeros(found.kind.size, np.uint64)
        np.add.at(key, self.up_child[ups], mix(self.up_hash[ups], parent_units, 6))
        fibre = np.unique(key[roots], return_inverse=True)[1].ravel()
        keep = np.bincount(fibre)[fibre] > 1
        roots, fibre = roots[keep], fibre[keep]
        if not roots.size:
            return []
        return self.check(kind, roots, np.unique(fibre, return_inverse=True)[1].ravel())

    def check(self, kind: int, roots: Ids, fibre: Ids) -> list[Fibre]:
        """Arrange everything that depends on the roots in rows, and keep the fibres whose rows may be permuted."""
        found = self.found
        row = np.full(found.kind.size, -1)
        column = np.zeros(found.kind.size, np.uint64)
        row[roots] = np.arange(roots.size)
        bad = np.zeros(int(fibre.max()) + 1, np.bool_)
        owned = self.descend(roots, row, column, fibre, bad)
        units = self.members.of(owned)
        unit_row = row[found.owner[units]]
        unit_column = mix(column[found.owner[units]], found.place[units])
        self.check_edges(units, unit_row, unit_column, fibre, bad)
        result = []
        by_fibre = np.lexsort([unit_column, self.order[roots][unit_row], fibre[unit_row]])
        sorted_roots = roots[np.lexsort([self.order[roots], fibre])]
        ends = np.cumsum(np.bincount(fibre[unit_row], minlength=bad.size))
        root_ends = np.cumsum(np.bincount(fibre))
        for f, end in enumerate(ends):
            mine = by_fibre[(ends[f - 1] if f else 0) : end]
            members = sorted_roots[(root_ends[f - 1] if f else 0) : root_ends[f]]
            if not bad[f] and mine.size % members.size == 0:
                columns = unit_column[mine].reshape(members.size, -1)
                if (columns == columns[0]).all() and (columns[0][1:] != columns[0][:-1]).all():
                    parents = np.unique(self.up_parent[self.up_of.of(members[:1])])
                    result.append(Fibre(kind, units[mine].reshape(members.size, -1), members, parents))
                    continue
            self.refused.append(units[mine])
        return sorted(result, key=lambda fibre: int(fibre.roots[0]))

    def descend(
        self, roots: Ids, row: Ids, column: npt.NDArray[np.uint64], fibre: Ids, bad: npt.NDArray[np.bool_]
    ) -> Ids:
        """Give every super-unit that depends on a root its row, and a column key that says what it is to the row."""
        owned = [roots]
        waiting = set(np.unique(self.found.kind[self.up_child[self.down_of.of(roots)]]).tolist())
        while waiting:
            kind = min(waiting, key=lambda k: (self.sizes[k], k))
            waiting.remove(kind)
            ups = self.up_of.of(self.of_kind.of(np.array([kind])))
            child, parent = self.up_child[ups], self.up_parent[ups]
            from_row = row[parent]
            inside = from_row >= 0
            row[child[inside]] = from_row[inside]
            conflict = inside & (row[child] != from_row)
            bad[fibre[from_row[conflict]]] = True
            bad[fibre[row[child[conflict]]]] = True
            mine = np.unique(child[inside])
            parent_unit = self.found.edges.parent[self.up_edges[ups]]
            own = inside & ~conflict
            what = np.where(own, mix(column[parent], self.found.place[parent_unit], 7), mix(parent_unit, 8))
            keys = summed(mix(self.up_hash[ups], what), child, column.size)[mine]
            column[mine] = mix(keys, kind, rank_within(row[mine], keys.view(np.int64), self.order[mine]))
            owned.append(mine)
            waiting |= set(np.unique(self.found.kind[self.up_child[self.down_of.of(mine)]]).tolist())
        return np.concatenate(owned)

    def check_edges(
        self, units: Ids, unit_row: Ids, unit_column: npt.NDArray[np.uint64], fibre: Ids, bad: npt.NDArray[np.bool_]
    ) -> None:
        """Mark the fibres for which some map is not respected: a child in column c of row i must have its parent in
        one column of the same row i, or one and the same parent for all rows; and what is not in the table must not
        depend on it."""
        edges, total = self.found.edges, self.found.cell.size
        row_of, column_of = np.full(total, -1), np.zeros(total, np.uint64)
        row_of[units], column_of[units] = unit_row, unit_column
        e = self.by_child.of(units)
        child, parent, label = edges.child[e], edges.parent[e], edges.label[e]
        same_row = row_of[parent] == row_of[child]
        other = (row_of[parent] >= 0) & ~same_row
        same_fibre = other & (fibre[row_of[parent]] == fibre[row_of[child]])
        bad[fibre[row_of[child[same_fibre]]]] = True
        bad[fibre[row_of[parent[other]]]] = True
        value = np.where(same_row, mix(column_of[parent], 9), mix(parent, 10))
        key = mix(fibre[row_of[child]], column_of[child], label)
        order = np.lexsort([value, key])
        clash = (key[order][1:] == key[order][:-1]) & (value[order][1:] != value[order][:-1])
        bad[fibre[row_of[child[order[1:][clash]]]]] = True
        into = self.by_parent.of(units)
        outside = row_of[edges.child[into]] < 0
        bad[fibre[row_of[edges.parent[into[outside]]]]] = True
