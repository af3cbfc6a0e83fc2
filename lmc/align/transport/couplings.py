"""Optimal-transport couplings between the units of two networks, nested where units are within units."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lmc.align.weight_matching.gains import assign, opening_prices
from lmc.core.context import warn
from lmc.core.extras import require
from lmc.errors import SpecError
from lmc.symmetry.groups.group import Group, Table
from lmc.symmetry.spec import PermutationSpec

View = tuple[str, int]  # a parameter and one of its axes, whose positions are channels

_SCALINGS = 10_000
_MARGIN = 1e-4
# Of the mean mass: units without incoming weights keep that much, so that shares are defined.
_LEAST_MASS = 1e-7


@dataclass(frozen=True, eq=False)
class Importance:
    """Masses of units: the norm of the given order of their incoming weights.

    Attributes:
        order: 1 or 2.
        powers: for each view where units are computed, per channel of the moving network and of the anchor, the sum of `|weight| ** order`.
    """

    order: int
    powers: Mapping[View, tuple[Tensor, Tensor]]

    def masses(self, moving: Group, anchor: Group) -> tuple[Tensor, Tensor]:
        """The masses (n_b,), (n_a,) of the units of two groups, which sum to 1; none is quite 0."""
        totals = [torch.zeros(group.size, dtype=torch.float64) for group in (moving, anchor)]
        for view, powers in self.powers.items():
            for both in paired_rows(moving, anchor, view):
                for total, power, rows in zip(totals, powers, both, strict=True):
                    total += power[rows].sum(1)
        norms = [total.pow(1.0 / self.order) for total in totals]
        left, right = (n.clamp_min((_LEAST_MASS * float(n.mean())) or 1.0) for n in norms)
        return left / left.sum(), right / right.sum()


def plan(cost: Tensor, regularization: float, name: str, masses: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The coupling T (n_b, n_a) that makes `sum T cost` least, in float64, on the device of the cost.

    Its rows sum to the masses of B's units, its columns to those of A's; by default 1/n_b and 1/n_a. Exact for
    `regularization` 0, where equally many units of equal mass are a linear assignment (an extreme point of the Birkhoff
    polytope); else with an entropy of that weight, relative to the median cost.

    Raises:
        MissingPackageError: the problem needs the package POT, which is not installed.
    """
    n_b, n_a = cost.shape
    if regularization == 0.0 and n_a == n_b and masses is None:
        gain = -cost
        coupling = torch.zeros(n_b, n_a, dtype=torch.float64, device=cost.device)
        coupling[torch.arange(n_a), assign(gain, opening_prices(gain))[0]] = 1.0 / n_a
        return coupling
    ot = require("ot", "ot")
    matrix = cost.detach().to("cpu", torch.float64)
    matrix = (matrix / matrix.median().clamp_min(1e-12)).numpy()
    sides = masses or [torch.full((n,), 1.0 / n, dtype=torch.float64) for n in cost.shape]
    left, right = (mass.numpy() for mass in sides)
    if regularization == 0.0:
        return torch.from_numpy(ot.emd(left, right, matrix, numItermax=10_000_000)).to(cost.device)
    coupling = torch.from_numpy(
        ot.sinkhorn(
            left, right, matrix, regularization, method="sinkhorn_log", numItermax=_SCALINGS, stopThr=1e-9, warn=False
        )
    )
    off = max(float((coupling.sum(1 - k) / mass - 1).abs().max()) for k, mass in enumerate(sides))
    if not off < _MARGIN:
        warn(
            f"{name}: Sinkhorn has not converged in {_SCALINGS} iterations, marginals are off by {off:.1g} of their "
            f"value; raise regularization above {regularization:g}, or take 0 for the exact coupling"
        )
    return coupling.to(cost.device)


@dataclass(frozen=True, eq=False)
class Coupling:
    """The spread of the units of a group of B over those of the same group of A, with that of groups nested in them.

    Attributes:
        moving, anchor: the group in B and in A.
        plan: T (n_b, n_a).
        inner: (unit of B, unit of A) -> the couplings of the groups within these two units.
    """

    moving: Group
    anchor: Group
    plan: Tensor
    inner: dict[tuple[int, int], "list[Coupling]"] = field(default_factory=dict)

    @cached_property
    def index(self) -> Tensor | None:
        """(n,) the unit of B for each unit of A, where the plan is a permutation."""
        used = self.plan > 0
        if used.shape[0] == used.shape[1] and bool((used.sum(0) == 1).all() and (used.sum(1) == 1).all()):
            return used.to(torch.uint8).argmax(0)
        return None

    def share(self, producing: bool) -> Tensor:
        """(n_a, n_b): the share of each unit of B in each unit of A.

        Where units are computed, the shares in a unit of A sum to 1: it becomes a mean of units of B. Where they are
        consumed, the shares of a unit of B sum to 1: its outgoing weight is split. Both are `n T` for equal widths and
        masses; for unequal ones only this pair keeps a function whose units were merely duplicated.
        """
        return (self.plan / self.plan.sum(0 if producing else 1, keepdim=True)).T

    def plans(self) -> dict[str, Tensor]:
        """All plans by name; those between the units within unit i of B and unit j of A are `family[i->j]`."""
        found = {self.moving.name: self.plan}
        for (i, j), couplings in self.inner.items():
            for coupling in couplings:
                for name, matrix in coupling.plans().items():
                    family = coupling.moving.family if name == coupling.moving.name else name
                    found[f"{family}[{i}->{j}]"] = matrix
        return found

    def matrix(self, view: View, producing: bool, shape: tuple[int, int]) -> Tensor:
        """(channels of A, channels of B) of a view: what takes B's channels to A's, 0 where the group has none."""
        found = torch.zeros(shape, dtype=torch.float64, device=self.plan.device)
        self._fill(found, view, producing, 1.0)
        return found

    def _fill(self, matrix: Tensor, view: View, producing: bool, factor: float) -> None:
        share = self.share(producing)
        for theirs, ours in paired_rows(self.moving, self.anchor, view):
            for j, i in share.nonzero().tolist():
                inner = self.inner.get((i, j), [])
                left, right = _uncovered(theirs[i], ours[j], inner, view)
                matrix[right, left] += factor * share[j, i]
        for j, i in share.nonzero().tolist():
            for coupling in self.inner.get((i, j), []):
                coupling._fill(matrix, view, producing, factor * float(share[j, i]))


def couple(
    specs: tuple[PermutationSpec, PermutationSpec],
    groups: tuple[Group, Group],
    squares: Mapping[View, Tensor],
    regularization: float,
    squared: bool,
    importance: Importance | None = None,
) -> tuple[Coupling, float]:
    """The coupling of two groups for squared distances between channels (K_b, K_a) at some views, and what it costs.

    The cost of a pair of units is the sum over their channels; where groups are nested in them, channels are paired by
    the optimal coupling within the pair.
    """
    moving, anchor = groups
    within_moving, within_anchor = _children(specs[0], moving), _children(specs[1], anchor)
    nested = any(within_moving.values())
    device = next(iter(squares.values())).device
    cost = torch.zeros(moving.size, anchor.size, dtype=torch.float64, device=device)
    inner: dict[tuple[int, int], list[Coupling]] = {}
    for i in range(moving.size) if nested else ():
        for j in range(anchor.size):
            pairs = zip(within_moving[i], within_anchor[j], strict=True)
            solved = [couple(specs, pair, squares, regularization, squared, importance) for pair in pairs]
            inner[i, j] = [coupling for coupling, _ in solved]
            cost[i, j] = sum(value for _, value in solved)
    for view, square in squares.items():
        for theirs, ours in paired_rows(moving, anchor, view):
            if not nested:
                cost += _by_unit(square, theirs.to(device), ours.to(device))
                continue
            for i in range(moving.size):
                for j in range(anchor.size):
                    left, right = _uncovered(theirs[i], ours[j], inner[i, j], view)
                    cost[i, j] += square[left, right].sum()
    masses = None if importance is None else importance.masses(moving, anchor)
    found = plan(cost if squared else cost.clamp_min(0.0).sqrt(), regularization, anchor.name, masses)
    return Coupling(moving, anchor, found, inner), float((found * cost).sum()) * anchor.size


def paired_rows(
    moving: Group, anchor: Group, view: View, device: torch.device | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The rows (n_b, m_b), (n_a, m_a) of two corresponding groups at a view."""
    tensor, axis = view
    left = [table for table in moving.tables.get(tensor, ()) if table.dims == (axis,)]
    right = [table for table in anchor.tables.get(tensor, ()) if table.dims == (axis,)]
    return [(_rows(x, device), _rows(y, device)) for x, y in zip(left, right, strict=True)]


def _rows(table: Table, device: torch.device | None) -> Tensor:
    return torch.from_numpy(table.rows).to(device)


def _by_unit(square: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    if theirs.shape[1] != ours.shape[1]:
        raise SpecError(f"units of {ours.shape[1]} channels in a and {theirs.shape[1]} in b cannot be compared")
    columns = iter(zip(theirs.T, ours.T, strict=True))
    x, y = next(columns)
    total = square[x].index_select(1, y)
    for x, y in columns:
        total += square[x].index_select(1, y)
    return total


def _uncovered(theirs: Tensor, ours: Tensor, inner: list[Coupling], view: View) -> tuple[Tensor, Tensor]:
    """The channels of two units that no nested group has; they correspond in order."""
    taken = [rows for coupling in inner for rows in paired_rows(coupling.moving, coupling.anchor, view)]
    left, right = theirs, ours
    if taken:
        left, right = (
            row[~torch.isin(row, torch.cat([rows.flatten() for rows in side]))]
            for row, side in zip((theirs, ours), zip(*taken, strict=True), strict=True)
        )
    if len(left) != len(right):
        raise SpecError(f"{view[0]}, axis {view[1]}: units of {len(right)} channels in a and {len(left)} in b")
    return left, right


def _children(spec: PermutationSpec, group: Group) -> dict[int, list[Group]]:
    found: dict[int, list[Group]] = {unit: [] for unit in range(group.size)}
    for other in spec.groups.values():
        for parent, unit in other.within:
            if parent == group.name:
                found[unit].append(other)
    return found
