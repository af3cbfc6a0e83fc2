"""From axis patterns to the tables of groups, and back; patterns of many tensors: wildcards, edits, plain data for JSON."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lmc.errors import SpecError
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.notation.grammar import (
    IRREGULAR,
    Axis,
    Factor,
    Fixed,
    Name,
    Product,
    Sum,
    ancestors,
    names_in,
    parse,
    parse_all,
    renamed,
    solve_sizes,
    unquoted,
    word,
    write,
)

Units = npt.NDArray[np.int64]
ABSENT = -1


def groups_from_axes(
    patterns: Mapping[str, tuple[Axis, ...]], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]
) -> dict[str, Group]:
    """The groups that the patterns describe, each nested family spelled out into one group per place it lives in."""
    for tensor, axes in patterns.items():
        if len(axes) != len(shapes[tensor]):
            raise SpecError(f"{tensor}: the pattern has {len(axes)} axes, the tensor has shape {shapes[tensor]}")
    sizes = solve_sizes(patterns, shapes, sizes)
    inside = ancestors(patterns)
    # For each tensor and axis, and each name on that axis, the unit that owns each position.
    units: dict[str, list[dict[str, Units]]] = {
        tensor: [axis_units(axis, shapes[tensor][k], sizes) for k, axis in enumerate(axes)]
        for tensor, axes in patterns.items()
    }
    groups: dict[str, Group] = {}
    movable = {name: tuple(p for p in around if sizes[p] > 1) for name, around in inside.items()}
    for family in _outermost_first(inside):
        around = inside[family]
        # `around` holds all ancestors; a group lives within its nearest ones, which have their own parents. One of a single
        # unit, which never moves, is no place to live in.
        parents = [p for p in movable[family] if not any(p in movable[q] for q in movable[family])]
        for index in itertools.product(*(range(sizes[p]) for p in around)):
            place = dict(zip(around, index, strict=True))
            tables = {
                tensor: found
                for tensor, axes in units.items()
                if (found := _tables(family, place, axes, shapes[tensor], sizes[family], tensor))
            }
            within = tuple((_name(p, movable[p], place), place[p]) for p in parents)
            name = _name(family, movable[family], place)
            groups[name] = Group(name, sizes[family], tables, family, within)
    return groups


def axis_units(axis: Axis, length: int, sizes: Mapping[str, int]) -> dict[str, Units]:
    """For each name of an axis the unit that owns each of its `length` positions, -1 where none does."""
    free = _dot_size(axis, length, sizes)
    return _sum_units(axis, sizes, free)


def _name(family: str, around: tuple[str, ...], place: Mapping[str, int]) -> str:
    return f"{family}[{','.join(str(place[p]) for p in around)}]" if around else family


def _outermost_first(inside: Mapping[str, tuple[str, ...]]) -> list[str]:
    return sorted(inside, key=lambda name: len(inside[name]))


def _tables(
    family: str, place: Mapping[str, int], axes: list[dict[str, Units]], shape: tuple[int, ...], size: int, tensor: str
) -> tuple[Table, ...]:
    """The tables of one group in one tensor: one for each axis that has its family.

    A table spans its own axis and, for each ancestor that does not stand on this axis, the first axis where it does: in
    "e e/f d" the units of f inside expert 2 are positions over both axes.
    """
    tables = []
    for k, owners in enumerate(axes):
        if family not in owners:
            continue
        dims = [k]
        for name in place:
            if name not in owners:
                others = [j for j, other in enumerate(axes) if name in other]
                if not others:
                    raise SpecError(f"{tensor}: {family!r} lives in {name!r}, which this tensor does not have")
                dims.append(others[0])
        dims = sorted(set(dims))
        # Flat positions over `dims`, those of them inside the units of `place`, and the unit of the family at each.
        grid = np.arange(int(np.prod([shape[d] for d in dims]))).reshape([shape[d] for d in dims])
        mine = np.ones(grid.shape, dtype=bool)
        for name, unit in place.items():
            holder = k if name in owners else next(d for d in dims if name in axes[d])
            mine &= _along(axes[holder][name] == unit, dims.index(holder), len(dims))
        own = np.broadcast_to(_along(owners[family], dims.index(k), len(dims)), grid.shape)
        rows = [grid[mine & (own == unit)] for unit in range(size)]
        if len({len(row) for row in rows}) != 1:
            raise SpecError(f"{tensor}: units of {family!r} own different numbers of positions on axis {k}")
        if rows[0].size:
            tables.append(Table(tuple(dims), np.stack(rows).astype(np.int64)))
    return tuple(tables)


def _along(values: npt.NDArray, axis: int, ndim: int) -> npt.NDArray:
    return values.reshape([-1 if d == axis else 1 for d in range(ndim)])


def _sum_units(axis: Sum, sizes: Mapping[str, int], free: int) -> dict[str, Units]:
    """Owners of a sum of products: terms follow each other, and in a product the position is a number in mixed radix."""
    parts = []
    for term in axis.terms:
        lengths = [_length(factor, sizes, free) for factor in term.factors]
        units: dict[str, Units] = {}
        for position, factor in enumerate(term.factors):
            before = int(np.prod(lengths[:position], dtype=int))
            after = int(np.prod(lengths[position + 1 :], dtype=int))
            # The digit of this factor: each value lasts for the product of the factors behind, and all repeat before.
            for name, owner in _factor_units(factor, sizes, free).items():
                units[name] = np.tile(np.repeat(owner, after), before)
        parts.append((int(np.prod(lengths, dtype=int)), units))
    names = dict.fromkeys(name for _, units in parts for name in units)
    return {
        name: np.concatenate([units.get(name, np.full(length, ABSENT, dtype=np.int64)) for length, units in parts])
        for name in names
    }


def _factor_units(factor: Factor, sizes: Mapping[str, int], free: int) -> dict[str, Units]:
    if isinstance(factor, Name):
        return {factor.name: np.arange(sizes[factor.name], dtype=np.int64)}
    return _sum_units(factor, sizes, free) if isinstance(factor, Sum) else {}


def _length(factor: Factor, sizes: Mapping[str, int], free: int) -> int:
    if isinstance(factor, Name):
        return sizes[factor.name]
    if isinstance(factor, Fixed):
        return free if factor.size is None else factor.size
    return sum(int(np.prod([_length(f, sizes, free) for f in term.factors], dtype=int)) for term in factor.terms)


def _dot_size(axis: Axis, length: int, sizes: Mapping[str, int]) -> int:
    """The size of the one "." in an axis: lengths are affine in it, so two trial values give it."""
    at_zero, at_one = (_length(axis, sizes, trial) for trial in (0, 1))
    if at_one == at_zero:
        return 1
    size, remainder = divmod(length - at_zero, at_one - at_zero)
    if remainder or size < min(1, length):
        raise SpecError(f"an axis of {length} positions does not divide as its pattern says: {sorted(names_in(axis))}")
    return size


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


def edited(
    groups: Mapping[str, Group], shapes: Mapping[str, tuple[int, ...]], changed: Mapping[str, str]
) -> dict[str, Group]:
    """The groups after the patterns of the tensors in `changed` are replaced; families named there are laid out again.

    Groups of families that only occur in irregular tables, and in tensors that are not edited, stay as they are.

    Raises:
        SpecError: a pattern does not fit, or the result contradicts itself.
    """
    patterns = describe(groups, shapes)
    irregular = {name for name, text in patterns.items() if IRREGULAR in text.split() and name not in changed}
    regular = {name: text for name, text in patterns.items() if name not in irregular} | dict(changed)
    sizes = {group.family: group.size for group in groups.values()}
    axes = parse_all(regular)
    known = {name: sizes[name] for found in axes.values() for axis in found for name in names_in(axis) if name in sizes}
    result = groups_from_axes(axes, shapes, known)
    for name in irregular:
        for old in groups.values():
            if name in old.tables:
                new = result.get(old.name, replace(old, tables={}))
                if new.size != old.size:
                    raise SpecError(f"group {old.name!r} has {old.size} units in {name}, {new.size} after the edit")
                result[old.name] = replace(new, tables={**new.tables, name: old.tables[name]})
    return result


def expand_wildcards(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Patterns with each wildcard name written out; later entries win. Raises `SpecError` for names that match nothing."""
    names = list(names)
    found: dict[str, str] = {}
    for glob, pattern in patterns.items():
        expression = re.compile(re.escape(glob).replace(r"\*", "(.*?)") + r"\Z")
        matches = [(name, match) for name in names if (match := expression.match(name))]
        if not matches:
            raise SpecError(f"{glob!r}: the weights have no such tensor; they have {', '.join(names[:6])}, ...")
        for name, match in matches:
            found[name] = _filled(pattern, match.groups(), glob)
    return found


def _filled(pattern: str, parts: Sequence[str], glob: str) -> str:
    """The pattern with its wildcards replaced by what those of the name matched; words that need it are quoted."""
    left = iter(parts)

    def fill(match: re.Match[str]) -> str:
        try:
            return word(re.sub(r"\*", lambda _: next(left), unquoted(match.group())))
        except StopIteration:
            raise SpecError(f"{glob!r}: the pattern {pattern!r} has more wildcards than the name") from None

    return re.sub(r"'(?:[^']|'')*'|[^\s()+/*']*\*[^\s()+/']*", fill, pattern)


Shapes = Mapping[str, tuple[int, ...]]


def groups_as_data(groups: Mapping[str, Group], shapes: Shapes) -> dict[str, Any]:
    """Either `patterns` and the `sizes` of the families, or `groups` with all their tables."""
    patterns = describe(groups, shapes)
    sizes = {group.family: group.size for group in groups.values()}
    if _say_everything(patterns, sizes, groups, shapes):
        return {"sizes": sizes, "patterns": patterns}
    return {"groups": [_group_as_data(group) for group in groups.values()]}


def groups_from_data(content: Mapping[str, Any], shapes: Shapes) -> dict[str, Group]:
    """The inverse of `groups_as_data`: the groups, in the same order."""
    if "patterns" not in content:
        return {item["name"]: _group_from_data(item) for item in content["groups"]}
    axes = {name: parse(text, name) for name, text in content["patterns"].items()}
    order = {family: place for place, family in enumerate(content["sizes"])}
    laid_out = groups_from_axes(axes, shapes, content["sizes"])
    return dict(sorted(laid_out.items(), key=lambda item: order[item[1].family]))


def _say_everything(
    patterns: Mapping[str, str], sizes: Mapping[str, int], groups: Mapping[str, Group], shapes: Shapes
) -> bool:
    if any(IRREGULAR in pattern.split() for pattern in patterns.values()):
        return False
    axes = {name: parse(text, name) for name, text in patterns.items()}
    try:
        again = groups_from_axes(axes, shapes, sizes)
    except SpecError:
        return False
    return again.keys() == groups.keys() and all(again[n] == groups[n] for n in again)


def _group_as_data(group: Group) -> dict[str, Any]:
    tables = {
        tensor: [{"dims": list(table.dims), "rows": table.rows.tolist()} for table in tables]
        for tensor, tables in group.tables.items()
    }
    within = [list(place) for place in group.within]
    return {"name": group.name, "size": group.size, "family": group.family, "within": within, "tables": tables}


def _group_from_data(item: Mapping[str, Any]) -> Group:
    tables = {
        tensor: tuple(Table(tuple(t["dims"]), np.asarray(t["rows"], dtype=np.int64)) for t in tables)
        for tensor, tables in item["tables"].items()
    }
    return Group(item["name"], item["size"], tables, item["family"], tuple((p, u) for p, u in item["within"]))
