"""Whether two specs describe the same symmetries, whatever their groups are called."""

from lmc.symmetry.group import Group, Table
from lmc.symmetry.symmetries import Symmetries


def differences(left: Symmetries, right: Symmetries) -> list[str]:
    """One line per group that only one of the two has; empty when the groups agree as sets of tables."""
    mine, theirs = _signatures(left), _signatures(right)
    lines = [f"{name}: only in the first" for key, name in mine.items() if key not in theirs]
    lines += [f"{name}: only in the second" for key, name in theirs.items() if key not in mine]
    shared = left.shapes.keys() & right.shapes.keys()
    lines += [f"{n}: shape {left.shapes[n]} and {right.shapes[n]}" for n in shared if left.shapes[n] != right.shapes[n]]
    return lines


def contains(outer: Symmetries, inner: Symmetries) -> bool:
    """Whether every exchange of two neighbouring units in `inner` is an element of `outer`.

    Such exchanges generate the group of `inner`. One is an element of `outer` if the positions that it moves are
    moved together by one exchange of a group of `outer`.
    """
    exchanges = {key for group in outer.groups.values() for key in _exchanges(group, all_pairs=True)}
    return all(key in exchanges for group in inner.groups.values() for key in _exchanges(group, all_pairs=False))


def _signatures(spec: Symmetries) -> dict[frozenset, str]:
    """A group up to its name and the order of its units: where each unit lies."""
    return {frozenset(_unit_places(group)): group.name for group in spec.groups.values()}


def _unit_places(group: Group) -> list[frozenset]:
    places: list[set] = [set() for _ in range(group.size)]
    for tensor, tables in group.tables.items():
        for table in tables:
            for unit, row in enumerate(table.rows):
                places[unit].add((tensor, table.dims, tuple(sorted(row.tolist()))))
    return [frozenset(place) for place in places]


def _exchanges(group: Group, all_pairs: bool):
    for i in range(group.size):
        for j in range(i + 1, group.size if all_pairs else min(i + 2, group.size)):
            yield frozenset(
                (tensor, table.dims, _swapped(table, i, j))
                for tensor, tables in group.tables.items()
                for table in tables
            )


def _swapped(table: Table, i: int, j: int) -> frozenset[tuple[int, int]]:
    return frozenset(
        (min(a, b), max(a, b)) for a, b in zip(table.rows[i].tolist(), table.rows[j].tolist(), strict=True)
    )
