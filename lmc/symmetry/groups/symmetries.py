"""The permutation symmetries of one architecture as data: the groups, their places in its tensors, and the proof."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lmc.core.extras import require
from lmc.core.results import Result
from lmc.errors import SpecError
from lmc.symmetry.groups.group import Group, Groups, Shape, Table, absence, check_groups, outermost_first
from lmc.symmetry.groups.kinds import ContinuousSymmetries, Kind
from lmc.weights import ModelOrWeights, as_weights
from lmc.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd


VISIBLE = 1e3


@dataclass(frozen=True)
class Evidence:
    """The observations of one family of groups.

    Attributes:
        error: largest change of the outputs when the family moved with all the others, relative to their largest value.
        powers: group -> change of the outputs when it moves and one of the tensors that it touches is left behind; of
            specs with many groups the rate of change, when one of the tensors begins to move alone.
    """

    error: float
    powers: Mapping[str, float]

    @property
    def power(self) -> float:
        """The smallest power of the groups."""
        return min(self.powers.values(), default=0.0)


@dataclass(frozen=True)
class Certificate(Result):
    """The result of a certification: the precision of the agreement, and the change when a group is broken on purpose.

    A group whose breakage is invisible is not proven by equal outputs: its name is in `unverified`.

    Attributes:
        max_error: largest difference of outputs, relative to their largest absolute value.
        tolerance: what it was held against.
        trials: number of permutations tried, each on other weights.
        groups: number of groups that they moved.
        moved: share of the weight entries that changed places (a certificate in which nothing moves proves nothing).
        inputs: shapes of the example inputs used.
        dtype: the precision of the arithmetic.
        families: family of groups -> error, and power of each group.
        outputs: names of the outputs compared, if the model returns several.
    """

    max_error: float
    tolerance: float
    trials: int
    groups: int
    moved: float
    inputs: tuple[tuple[tuple[int, ...], ...], ...]
    dtype: str = "float64"
    families: Mapping[str, Evidence] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The even power of ten that `max_error` stays under, from 1e-14 on: equal on machines that round differently."""
        return 10.0 ** max(-14, 2 * math.ceil(math.log10(self.max_error) / 2)) if self.max_error else 1e-14

    @property
    def power(self) -> float:
        """The smallest power of the groups that could be verified."""
        return min((p for e in self.families.values() for p in e.powers.values() if self._seen(p)), default=0.0)

    @property
    def unverified(self) -> tuple[str, ...]:
        """The groups for which an error would not have been seen: their power is not far above the tolerance. Where that
        are all the groups of a family, its name stands for them."""
        found: list[str] = []
        for family, evidence in self.families.items():
            hidden = [name for name, power in evidence.powers.items() if not self._seen(power)]
            found += [family] if hidden and len(hidden) == len(evidence.powers) else hidden
        return tuple(found)

    def _seen(self, power: float) -> bool:
        return power > VISIBLE * self.tolerance

    def to_frame(self) -> "pd.DataFrame":
        """A row for each group: its family, error, power, and whether an error would have been seen."""
        rows = [
            (name, family, evidence.error, power, self._seen(power))
            for family, evidence in self.families.items()
            for name, power in evidence.powers.items()
        ]
        return require("pandas").DataFrame(rows, columns=["group", "family", "error", "power", "verified"])

    def __str__(self) -> str:
        tried = "one permutation" if self.trials == 1 else f"{self.trials} random permutations"
        text = (
            f"certified: {tried} of {self.groups} groups, {self.moved:.0%} of the weights moved, "
            f"outputs equal to {self.max_error:.1e} ({self.dtype})"
        )
        if self.power:
            text += f", changed by {self.power:.1e} or more when one group is broken"
        if self.unverified:
            text += f"; not verified, as breaking them changes nothing here: {', '.join(self.unverified)}"
        return text


@dataclass(frozen=True, eq=False)
class Symmetries:
    """The data of a `PermutationSpec`, and what follows from them; see there."""

    groups: dict[str, Group]
    shapes: dict[str, Shape]
    buffers: frozenset[str] = frozenset()
    frozen: dict[tuple[str, int], str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    certificate: Certificate | None = None
    outputs: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    continuous: ContinuousSymmetries | None = None

    def __post_init__(self) -> None:
        ordered = outermost_first(self.groups)
        alone = {group.name for group in ordered if group.size == 1}  # a unit of one is everywhere, and never moves
        groups = Groups(
            (g.name, replace(g, within=tuple(place for place in g.within if place[0] not in alone)))
            for g in ordered
            if g.size > 1
        )
        check_groups(groups, self.shapes)
        object.__setattr__(self, "groups", groups)

    def beyond(self, family: str) -> str:
        """The moves that the units of a family admit beyond permutations, in words; empty if there are none, or none are known."""
        return self.kind(family).beyond

    def kind(self, family: str) -> Kind:
        """The moves that the units of a family admit beyond permutations, as far as it is known."""
        return Kind() if self.continuous is None else self.continuous.kinds.get(family, Kind())

    def check(self, weights: ModelOrWeights) -> None:
        """Raise `SpecError` naming the first tensor that the spec knows and the weights lack, or of another shape."""
        weights = weights.outline() if isinstance(weights, Checkpoint) else as_weights(weights)
        for name in self.tables_by_tensor:
            if name not in weights:
                why = absence(name, self.aliases, weights)
                raise SpecError(f"the spec moves {name} {self.shapes[name]}, which the weights do not have{why}")
        for name, tensor in weights.items():
            if name in self.shapes and tuple(tensor.shape) != self.shapes[name]:
                raise SpecError(f"{name}: the spec was made for shape {self.shapes[name]}, got {tuple(tensor.shape)}")

    @cached_property
    def tables_by_tensor(self) -> dict[str, list[tuple[str, Table]]]:
        """For each tensor that moves its (group name, table) pairs, outermost group first."""
        found: dict[str, list[tuple[str, Table]]] = {}
        for group in self.groups.values():
            for tensor, tables in group.tables.items():
                found.setdefault(tensor, []).extend((group.name, table) for table in tables)
        return found

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """The names of the groups of each family: one, or as many as there are places to live in."""
        found: dict[str, list[str]] = {}
        for group in self.groups.values():
            found.setdefault(group.family, []).append(group.name)
        return found

    @cached_property
    def by_place(self) -> dict[tuple[str, tuple[tuple[str, int], ...]], str]:
        """The group of a family that lives in given units."""
        return {(group.family, group.within): group.name for group in self.groups.values()}

    @property
    def log10_order(self) -> float:
        """log10 of the number of symmetries, the product of n! over the groups."""
        return sum(group.log10_order for group in self.groups.values())

    @cached_property
    def coverage(self) -> float:
        """Share of the parameters (buffers not counted) that are on an axis that moves."""
        moving = sum(self.moving_share(name) * size for name, size in self.parameters.items())
        return moving / max(1, sum(self.parameters.values()))

    @property
    def parameters(self) -> dict[str, int]:
        """The number of entries of each parameter: buffers left out, tied tensors under their first name only."""
        return {
            name: int(np.prod(shape, dtype=np.int64))
            for name, shape in self.shapes.items()
            if name not in self.buffers and name not in self.aliases
        }

    def moving_share(self, tensor: str, moving: Mapping[str, np.ndarray] | None = None) -> float:
        """Share of one tensor's entries that are on a moving position of some axis.

        Args:
            moving: for each group a mask of the units that move (default: all).
        """
        shape = self.shapes[tensor]
        # Disjoint sets of axes, each with the positions over it that move; the shares that stay multiply over the sets.
        blocks: dict[tuple[int, ...], np.ndarray] = {}
        for name, table in self.tables_by_tensor.get(tensor, ()):
            moves = np.zeros([shape[d] for d in table.dims], dtype=bool)
            moves.reshape(-1)[table.rows if moving is None else table.rows[moving[name]]] = True
            met = [dims for dims in blocks if set(dims) & set(table.dims)]
            joint = tuple(sorted(set(table.dims).union(*met)))
            for dims, mask in [(table.dims, moves), *((dims, blocks.pop(dims)) for dims in met)]:
                spread = mask.reshape([shape[d] if d in dims else 1 for d in joint])
                blocks[joint] = blocks[joint] | spread if joint in blocks else spread
        return 1.0 - float(np.prod([1.0 - mask.mean() for mask in blocks.values() if mask.size]))

    def differences(self, other: "Symmetries") -> list[str]:
        """One line per group that only one of two specs has, whatever the groups are called; empty if they describe the
        same symmetries."""
        mine, theirs = _signatures(self), _signatures(other)
        lines = [f"{name}: only in the first" for key, name in mine.items() if key not in theirs]
        lines += [f"{name}: only in the second" for key, name in theirs.items() if key not in mine]
        shared = [name for name in self.shapes if name in other.shapes]
        return lines + [
            f"{name}: shape {self.shapes[name]} and {other.shapes[name]}"
            for name in shared
            if self.shapes[name] != other.shapes[name]
        ]

    def contains(self, other: "Symmetries") -> bool:
        """Whether every symmetry of `other` is one of this spec.

        Exchanges of two neighbouring units generate the groups of `other`. One is a symmetry of this spec if the positions
        that it moves are moved together by one exchange of one of its groups.
        """
        owners: dict[tuple[str, tuple[int, ...], int], list[tuple[Group, int]]] = {}
        for group in self.groups.values():
            for tensor, tables in group.tables.items():
                for table in tables:
                    for unit, row in enumerate(table.rows.tolist()):
                        for position in row:
                            owners.setdefault((tensor, table.dims, position), []).append((group, unit))

        def holds(group: Group, i: int) -> bool:
            (tensor, (table, *_)), *_ = group.tables.items()
            ends = (owners.get((tensor, table.dims, int(table.rows[unit, 0])), ()) for unit in (i, i + 1))
            wanted = _exchange(group, i, i + 1)
            pairs = itertools.product(*ends)
            return any(_exchange(own, a, b) == wanted for (own, a), (also, b) in pairs if own is also and a != b)

        return all(holds(group, i) for group in other.groups.values() if group.tables for i in range(group.size - 1))


def _signatures(spec: Symmetries) -> dict[frozenset, str]:
    """A group up to its name and the order of its units: the places of each unit."""
    return {frozenset(_unit_places(group)): group.name for group in spec.groups.values()}


def _unit_places(group: Group) -> list[frozenset]:
    places: list[set] = [set() for _ in range(group.size)]
    for tensor, tables in group.tables.items():
        for table in tables:
            for unit, row in enumerate(table.rows):
                places[unit].add((tensor, table.dims, tuple(sorted(row.tolist()))))
    return [frozenset(place) for place in places]


def _exchange(group: Group, i: int, j: int) -> frozenset[Any]:
    """The moves where two units change places."""
    return frozenset(
        (tensor, table.dims, _swapped(table, i, j)) for tensor, tables in group.tables.items() for table in tables
    )


def _swapped(table: Table, i: int, j: int) -> frozenset[tuple[int, int]]:
    return frozenset(
        (min(a, b), max(a, b)) for a, b in zip(table.rows[i].tolist(), table.rows[j].tolist(), strict=True)
    )
