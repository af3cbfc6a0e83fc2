"""From units to index tables: where the rows of a fibre lie in the parameters."""

from collections.abc import Mapping
from math import prod

import numpy as np

from lmc.symmetry.discovery.refine import mix
from lmc.symmetry.discovery.tags import Tag, clusters, spread, support
from lmc.symmetry.discovery.units import Ids
from lmc.symmetry.group import Table


class Places:
    """Where every unit of a parameter axis lies."""

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


def positions_moved(table: Table, shape: tuple[int, ...]) -> int:
    """How many elements of the tensor a table moves."""
    return table.rows.size * prod(n for d, n in enumerate(shape) if d not in table.dims)
