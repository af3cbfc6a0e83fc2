"""Groups of one family that live in the units of another group, numbered so that they correspond: when the units of the
outer group are exchanged, row i of one becomes row i of the other.

If s is a symmetry and h exchanges two units of the outer group, then h s h^-1 is a symmetry too. So the tables of the
first sibling, carried over by the exchange, serve for every other; what was found there only has to move the same
places. A family for which that does not hold is left out: fewer groups, but each of them right.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lmc.symmetry.checks import carried
from lmc.symmetry.group import Group, Table

Groups = dict[str, Group]
Shapes = dict[str, tuple[int, ...]]
Within = tuple[tuple[str, int], ...]


def conforming(groups: Groups, shapes: Shapes) -> Groups:
    """The groups, outer ones first, with siblings in corresponding order and without families that have none."""
    by_place = {(group.family, group.within): group for group in groups.values()}
    kept: Groups = {}
    for family in dict.fromkeys(group.family for group in sorted(groups.values(), key=lambda g: depth(groups, g))):
        members = sorted((g for g in groups.values() if g.family == family), key=lambda g: sum(u for _, u in g.within))
        found: Groups = {}
        for group in members:
            if all(parent in kept for parent, _ in group.within):
                aligned = align(group, found, kept, by_place, shapes)
                found |= {group.name: aligned} if aligned is not None else {}
        if len(found) == len(members):
            kept |= found
    return {name: kept[name] for name in groups if name in kept}


def depth(groups: Groups, group: Group) -> int:
    """How many groups lie around a group, one in the other."""
    return max((1 + depth(groups, groups[parent]) for parent, _ in group.within), default=0)


def align(
    group: Group, found: Groups, kept: Groups, by_place: Mapping[tuple[str, Within], Group], shapes: Shapes
) -> Group | None:
    """The group with the rows of its siblings in unit 0 of each group around it; none where these differ or lack."""
    result = group
    for name, unit in group.within:
        parent = kept[name]
        places = [tuple((p, u if p == name else v) for p, v in group.within) for u in range(parent.size)]
        if any((group.family, place) not in by_place for place in places):
            return None
        first = found.get(by_place[group.family, places[0]].name)
        if unit > 0:
            moved = None if first is None else carry(first, group, parent, unit, shapes)
            if moved is None or (result is not group and not same(moved, result)):
                return None
            result = moved
    return result


def carry(first: Group, group: Group, parent: Group, unit: int, shapes: Shapes) -> Group | None:
    """`group`, with the tables of `first` carried over by the exchange of units 0 and `unit` of `parent`."""
    if first.size != group.size or set(first.tables) != set(group.tables):
        return None
    tables: dict[str, tuple[Table, ...]] = {}
    for name, own in group.tables.items():
        given = first.tables[name]
        if [(t.dims, t.rows.shape) for t in own] != [(t.dims, t.rows.shape) for t in given]:
            return None
        rows = [carried(parent, unit, name, t, shapes[name]) for t in given]
        if any(not np.array_equal(np.sort(r, None), np.sort(t.rows, None)) for r, t in zip(rows, own, strict=True)):
            return None
        tables[name] = tuple(Table(t.dims, r) for t, r in zip(given, rows, strict=True))
    return replace(group, tables=tables)


def same(one: Group, other: Group) -> bool:
    return all(
        np.array_equal(a.rows, b.rows)
        for name in one.tables
        for a, b in zip(one.tables[name], other.tables[name], strict=True)
    )
