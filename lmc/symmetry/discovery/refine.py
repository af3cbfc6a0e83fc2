"""Colour refinement: which units could be exchanged at all, and which must move together.

Units start with the colour of their sort (frozen units with a colour each, counted units with their multiplicity) and
are recoloured by the colours of their parents and children until nothing changes (one-dimensional Weisfeiler-Leman on
the recorded maps). Every symmetry permutes units within cells of one colour. Between cells of equal size a map is a
bijection: its units are *locked*. The connected components of locks are the *super-units*, which move as one; the other
maps lead from super-units to the parents they live in.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmc.symmetry.discovery.units import Ids, Units

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
            word = np.asarray(part).astype(np.uint64)
            out = (out ^ (word + np.uint64(0x9E3779B97F4A7C15 * (number + 1) & 0xFFFFFFFFFFFFFFFF))) * np.uint64(
                0xBF58476D1CE4E5B9
            )
            out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            out = out ^ (out >> np.uint64(31))
    return out


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
    number, distinct = np.unique(colour).size, -1
    while number > distinct:
        distinct = number
        up = summed(mix(colour[edges.parent], edges.label, 4), edges.child, units.total)
        down = summed(mix(colour[edges.child], edges.label, 5), edges.parent, units.total)
        colour = mix(colour, up, down)
        number = np.unique(colour).size
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

    pairs = coo_array((np.ones(a.size, np.int8), (a, b)), shape=(n, n))
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
