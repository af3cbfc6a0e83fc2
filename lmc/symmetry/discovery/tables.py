"""From units to the index tables of groups, numbered alike in all groups of a family.

Groups of one family that live in the units of another group correspond: when the units of the outer group are exchanged,
row i of one becomes row i of the other. If s is a symmetry and h exchanges two units of the outer group, then h s h^-1 is
a symmetry too. So the tables of the first sibling, carried over by the exchange, serve for every other; what was found
there only has to move the same places. A family for which that does not hold is left out: fewer groups, but each of them
right.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lmc.symmetry.discovery.solve import mix
from lmc.symmetry.groups.group import Group, Table, carried
from lmc.symmetry.rules.tags import Tag, clusters, spread, support
from lmc.symmetry.rules.units import Ids


class Places:
    """The positions of every unit of a parameter axis."""

    def __init__(self, tags: Mapping[str, Tag], total: int):
        self.coords = [(name, tag.shape, c) for name, tag in tags.items() for c in tag.coords]
        self.coords.sort(key=lambda entry: int(entry[2].flat[0]))
        self.starts = np.array([int(c.flat[0]) for *_, c in self.coords], np.int64)
        self.ends = np.array([int(c.flat[-1]) + 1 for *_, c in self.coords], np.int64)
        self.of: dict[str, list[int]] = {}
        for k, (name, *_) in enumerate(self.coords):
            self.of.setdefault(name, []).append(k)
        self.row = np.full(total, -1)
        self.column = np.zeros(total, np.int64)

    def tables(self, units: Ids) -> dict[str, tuple[Table, ...]] | None:
        """The tables of a fibre whose row i holds `units[i]`; None if no table of rows can express it (a position that
        belongs to two rows at once)."""
        which = np.searchsorted(self.starts, units[0], side="right") - 1
        inside = (which >= 0) & (units[0] < self.ends[which]) if self.ends.size else np.zeros(which.size, np.bool_)
        touched: dict[str, list[int]] = {}
        for k in np.unique(which[inside]).tolist():
            touched.setdefault(self.coords[k][0], []).append(k)
        result: dict[str, tuple[Table, ...]] = {}
        for name, numbers in touched.items():
            tables: list[Table] = []
            for cluster in clusters([self.coords[k][2] for k in numbers]):
                chosen = [k for k in numbers if any(self.coords[k][2] is c for c in cluster)]
                found = self.on_cluster(chosen, units, [inside & (which == k) for k in chosen])
                if found is None:
                    return None
                tables += found
            result[name] = tuple(sorted(tables, key=lambda t: t.dims))
        return result

    def on_cluster(self, chosen: list[int], units: Ids, columns: list[np.ndarray]) -> list[Table] | None:
        """The tables on axes that depend on each other: one on all of them where every position belongs to one row;
        else (a square weight, whose axes both carry the group) one after the other."""
        _, shape, coord = self.coords[chosen[0]]
        if len(chosen) == 1 and len(support(coord)) == 1:
            return [plain(units[:, columns[0]] - self.starts[chosen[0]], support(coord))]
        together = self.joint(chosen, shape, units[:, np.logical_or.reduce(columns)])
        if together is not None or len(chosen) == 1:
            return None if together is None else [together]
        single = [self.joint([k], shape, units[:, mine]) for k, mine in zip(chosen, columns, strict=True)]
        return None if any(t is None for t in single) else [t for t in single if t is not None]

    def joint(self, chosen: list[int], shape: tuple[int, ...], units: Ids) -> Table | None:
        """A table over several dims: a position belongs to the row that owns its units, and corresponds to the position
        with the same columns, and the same units on other axes, in another row."""
        n, m = units.shape
        self.row[units], self.column[units] = np.arange(n)[:, None], np.arange(m)
        dims = tuple(sorted({d for k in chosen for d in support(self.coords[k][2])}))
        flat = [spread(self.coords[k][2], dims, shape).ravel() for k in chosen]
        rows = np.stack([self.row[f] for f in flat])
        signature = mix(*(np.where(self.row[f] >= 0, self.column[f], f + m) for f in flat))
        self.row[units] = -1
        for other in self.of[self.coords[chosen[0]][0]]:
            if other not in chosen and set(support(self.coords[other][2])) <= set(dims):
                signature = mix(signature, spread(self.coords[other][2], dims, shape).ravel())
        owner = rows.max(axis=0)
        if ((rows >= 0) & (rows != owner)).any():
            return None
        at = np.flatnonzero(owner >= 0)
        at = at[np.lexsort([signature[at], owner[at]])]
        if at.size % n or (owner[at].reshape(n, -1) != np.arange(n)[:, None]).any():
            return None
        signs = signature[at].reshape(n, -1)
        if (signs != signs[0]).any() or (signs[0][1:] == signs[0][:-1]).any():
            return None
        return fewer_dims(plain(at.reshape(n, -1), dims), tuple(shape[d] for d in dims))


def plain(rows: Ids, dims: tuple[int, ...]) -> Table:
    """Columns in the order in which the first row reads."""
    return Table(dims, np.ascontiguousarray(rows[:, np.argsort(rows[0])]))


def fewer_dims(table: Table, sizes: tuple[int, ...]) -> Table:
    """Drop the dims along which whole lines move unchanged."""
    for k, size in enumerate(sizes):
        if len(sizes) == 1:
            break
        index = np.unravel_index(table.rows, sizes)
        others = [i for j, i in enumerate(index) if j != k]
        rest_sizes = sizes[:k] + sizes[k + 1 :]
        rest = np.ravel_multi_index(others, rest_sizes)
        order = np.lexsort([index[k][0], rest[0]])
        if order.size % size:
            continue
        lines = rest[:, order].reshape(table.rows.shape[0], -1, size)
        along = index[k][:, order].reshape(lines.shape)
        if (lines == lines[..., :1]).all() and (along == np.arange(size)).all():
            smaller = plain(lines[..., 0], table.dims[:k] + table.dims[k + 1 :])
            return fewer_dims(smaller, rest_sizes)
    return table


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
    """The number of groups around a group, one in the other."""
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
