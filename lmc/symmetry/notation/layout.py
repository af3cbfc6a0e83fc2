"""From parsed axis patterns to groups: which positions of which tensor belong to which unit."""

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lmc.errors import SpecError
from lmc.symmetry.group import Group, Table
from lmc.symmetry.notation.grammar import Axis, Factor, Fixed, Name, Sum, ancestors, names_in, solve_sizes

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
    for family in _outermost_first(inside):
        around = inside[family]
        # `around` holds all ancestors; a group lives within its nearest ones, which have their own parents.
        parents = [p for p in around if not any(p in inside[q] for q in around)]
        for index in itertools.product(*(range(sizes[p]) for p in around)):
            place = dict(zip(around, index, strict=True))
            tables = {
                tensor: found
                for tensor, axes in units.items()
                if (found := _tables(family, place, axes, shapes[tensor], sizes[family], tensor))
            }
            within = tuple((_name(p, inside[p], place), place[p]) for p in parents)
            name = _name(family, around, place)
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
