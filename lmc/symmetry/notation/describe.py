"""From groups back to axis patterns: the text in which a specification is shown, compared and saved."""

from collections.abc import Mapping

import numpy as np

from lmc.symmetry.group import Group
from lmc.symmetry.notation.grammar import IRREGULAR, Axis, Factor, Fixed, Name, Product, Sum, ancestors, renamed, write
from lmc.symmetry.notation.layout import ABSENT, Units


def describe(groups: Mapping[str, Group], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The pattern of each tensor; an axis that the notation cannot say is written "table"."""
    inside = family_ancestors(groups)
    owners = {tensor: [{} for _ in shape] for tensor, shape in shapes.items()}
    outermost_first = sorted(groups.values(), key=lambda group: len(inside[group.family]))
    broken: set[tuple[str, int]] = set()
    for group in outermost_first:
        for tensor, tables in group.tables.items():
            for table in tables:
                _place(group, table.dims, table.rows, shapes[tensor], owners[tensor], inside, broken, tensor)
    axes = {
        tensor: [None if (tensor, k) in broken else _axis(length, owners[tensor][k]) for k, length in enumerate(shape)]
        for tensor, shape in shapes.items()
    }
    paths = _paths_to_write({t: tuple(a for a in found if a is not None) for t, found in axes.items()}, inside)
    return {
        tensor: " ".join(IRREGULAR if axis is None else write([renamed(axis, paths)]) for axis in found)
        for tensor, found in axes.items()
    }


def family_ancestors(groups: Mapping[str, Group]) -> dict[str, tuple[str, ...]]:
    """For each family the families it lives in, outermost first."""
    found: dict[str, tuple[str, ...]] = {}

    def visit(group: Group) -> tuple[str, ...]:
        if group.family not in found:
            around: dict[str, None] = {}
            for parent, _ in group.within:
                around.update(dict.fromkeys(visit(groups[parent])))
                around[groups[parent].family] = None
            found[group.family] = tuple(around)
        return found[group.family]

    for group in groups.values():
        visit(group)
    return found


def _place(group, dims, rows, shape, axes, inside, broken, tensor) -> None:
    """Enter the units of one table into the per-axis owners; a table over several axes must factor onto one of them."""
    if len(dims) == 1:
        _own(axes[dims[0]], group.family, rows, np.arange(group.size), shape[dims[0]], (tensor, dims[0]), broken)
        return
    coordinates = np.unravel_index(rows, [shape[d] for d in dims])
    around = inside[group.family]
    for axis, positions in zip(dims, coordinates, strict=True):
        first = positions[:, :1]
        if (positions == first).all() and len(np.unique(first)) == group.size:
            if not any(name in axes[axis] for name in around):
                _own(axes[axis], group.family, first, np.arange(group.size), shape[axis], (tensor, axis), broken)
                return
    broken.update((tensor, axis) for axis in dims)


def _own(owners: dict[str, Units], family: str, rows, units, length: int, where, broken) -> None:
    mine = owners.setdefault(family, np.full(length, ABSENT, dtype=np.int64))
    values = np.broadcast_to(units[:, None], rows.shape)
    if ((mine[rows] != ABSENT) & (mine[rows] != values)).any():
        broken.add(where)
    mine[rows] = values


def _axis(length: int, owners: Mapping[str, Units]) -> Axis | None:
    """One axis as a sum of products, None if it is not one.

    A fixed factor that ends every term is written once, behind the sum: "((a + b) 3)" is a flattened concatenation.
    Where there is only one fixed factor, its size follows from the axis, and it is written ".".
    """
    terms: list[list[Factor]] = []
    start = 0
    while start < length:
        stop, factors = _longest_term(start, length, owners)
        if not factors:
            return None
        terms.append(factors)
        start = stop
    terms = terms or [[Fixed()]]
    last = terms[0][-1]
    common = len(terms) > 1 and isinstance(last, Fixed) and all(len(term) > 1 and term[-1] == last for term in terms)
    if common:
        terms = [term[:-1] for term in terms]
    if sum(isinstance(factor, Fixed) for term in terms for factor in term) + common == 1:
        terms = [[Fixed() if isinstance(factor, Fixed) else factor for factor in term] for term in terms]
        last = Fixed()
    axis = Sum(tuple(Product(tuple(term)) for term in terms))
    return Sum((Product((axis, last)),)) if common else axis


def _longest_term(start: int, length: int, owners: Mapping[str, Units]) -> tuple[int, list[Factor]]:
    """The longest product that begins at `start`: (stop, its factors; none if there is no such product)."""
    here = {family: units[start:] for family, units in owners.items() if units[start] != ABSENT}
    same = np.ones(length - start, dtype=bool)
    for units in owners.values():
        same &= (units[start:] != ABSENT) == (units[start] != ABSENT)
    reach = length - start if same.all() else int(np.argmin(same))
    if not here:
        return start + reach, [Fixed(reach)]
    period = np.ones(reach, dtype=bool)
    for units in here.values():
        period &= units[:reach] == 0
    breaks = [reach, *(int(i) for i in np.flatnonzero(period)[::-1] if i > 0)]
    for stop in breaks[:64]:
        factors = _product({family: units[:stop] for family, units in here.items()}, stop)
        if factors:
            return start + stop, factors
    return length, []


def _product(units: Mapping[str, Units], length: int) -> list[Factor]:
    """`length` positions as an ordered product of the families and fixed factors; empty if they are not one.

    In a product, a factor of size n owns position p with unit (p // stride) % n, the stride being the size of all that
    stands to its right; so stride and size of each family are read off, and must multiply up to the whole.
    """
    places = []
    for family, owner in units.items():
        size = int(owner.max()) + 1
        stride = int(np.argmax(owner != owner[0])) or length
        if owner[0] != 0 or not (owner == (np.arange(length) // stride) % size).all():
            return []
        places.append((stride, size, family))
    places.sort(key=lambda place: (-place[0], -place[1]))
    factors: list[Factor] = []
    remaining = length
    for stride, size, family in places:
        outer, odd = divmod(remaining, stride * size)
        if odd or outer < 1:
            return []
        if outer > 1:
            factors.append(Fixed(outer))
        factors.append(Name(family))
        remaining = stride
    if remaining > 1:
        factors.append(Fixed(remaining))
    return factors


def _paths_to_write(axes: Mapping[str, tuple[Axis, ...]], inside: Mapping[str, tuple[str, ...]]) -> dict[str, Name]:
    """For every family whose nesting does not follow from the positions, its name with the path written out."""
    followed = ancestors(axes)
    return {
        family: Name(family, inside[family])
        for family in inside
        if family in followed and set(followed[family]) != set(inside[family])
    }
