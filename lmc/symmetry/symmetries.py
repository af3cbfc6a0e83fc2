"""The permutation symmetries of one architecture as data: the groups, and where they lie in its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lmc.errors import SpecError
from lmc.symmetry.certificate import Certificate
from lmc.symmetry.checks import Shape, absence, check_groups, outermost_first
from lmc.symmetry.group import Group, Groups, Table
from lmc.symmetry.notation.describe import describe
from lmc.weights import ModelOrWeights, as_weights


@dataclass(frozen=True, eq=False)
class Symmetries:
    """What a `PermutationSpec` knows, and what follows from it; see there."""

    groups: dict[str, Group]
    shapes: dict[str, Shape]
    buffers: frozenset[str] = frozenset()
    frozen: dict[tuple[str, int], str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    certificate: Certificate | None = None
    outputs: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        groups = Groups({group.name: group for group in outermost_first(self.groups) if group.size > 1})
        check_groups(groups, self.shapes)
        object.__setattr__(self, "groups", groups)

    def check(self, weights: ModelOrWeights) -> None:
        """Raise `SpecError` naming the first tensor that the spec knows and the weights lack, or of another shape."""
        weights = as_weights(weights)
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

    @cached_property
    def patterns(self) -> dict[str, str]:
        """The axis pattern of every tensor; "table" stands for an axis that the notation cannot say."""
        return describe(self.groups, self.shapes)

    @property
    def log10_order(self) -> float:
        """log10 of the number of symmetries, the product of n! over the groups."""
        return sum(group.log10_order for group in self.groups.values())

    @cached_property
    def coverage(self) -> float:
        """Share of the parameters (buffers not counted) that lie on an axis that moves."""
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
        """Share of one tensor's entries that lie on a moving position of some axis.

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
