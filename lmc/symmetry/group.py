"""Groups of interchangeable units as index tables: the one shape that covers every permutation symmetry.

A group of `n` units touches some axes of some tensors. A `Table` says where: over the flattened axes `dims` of
one tensor, row `i` of `rows` lists the flat positions that belong to unit `i`. Permuting the group permutes rows:
a plain axis has rows `(n, 1)`, convolution -> flatten `(channels, pixels)`, heads `(heads, head_dim)`, fused gates
`(hidden, 4)`; a concatenation covers only a part of the axis; grouped convolutions and stacked experts need two axes.

Groups may live inside units of other groups: the value units of head 3 are a group `within` unit 3 of the heads. The
groups of one `family` (the value units of all heads) are carried onto each other when the heads move.
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """Where the units of a group lie in one tensor.

    Attributes:
        dims: the axes concerned, ascending.
        rows: `(n, m)` int64; `rows[i]` are the flat positions over `dims` (row-major) that belong to unit `i`.
            Column `c` of two rows corresponds: exchanging units i and j exchanges `rows[i, c]` with `rows[j, c]`.
    """

    dims: tuple[int, ...]
    rows: Rows

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Table)
            and self.dims == other.dims
            and self.rows.shape == other.rows.shape
            and bool((self.rows == other.rows).all())
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Group:
    """`size` interchangeable units: any permutation of them, applied to all `tables` at once, keeps the function.

    Attributes:
        name: unique name, for a nested group `family[i]` (or `family[i,j]` two levels deep).
        size: number of units n.
        tables: for each tensor that the group touches, one or more tables (two when a tensor has the group on both axes).
        family: name shared by the groups that outer permutations carry onto each other; the name itself if alone.
        within: the (group name, unit) pairs whose units this group lives inside; empty for an outermost group.
    """

    name: str
    size: int
    tables: dict[str, tuple[Table, ...]]
    family: str = ""
    within: tuple[tuple[str, int], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.name)

    @property
    def log10_order(self) -> float:
        """log10 of the number of permutations of the units, log10(n!)."""
        return math.lgamma(self.size + 1) / math.log(10)


class Groups(dict[str, Group]):
    """Groups by name, printed short."""

    def __repr__(self) -> str:
        shown = [f"{name}: {group.size}" for name, group in itertools.islice(self.items(), 12)]
        more = f", ... ({len(self) - 12} more)" if len(self) > 12 else ""
        return f"Groups({len(self)}: {', '.join(shown)}{more})" if self else "Groups(none)"
