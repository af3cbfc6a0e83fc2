"""Optimal-transport couplings between the units of two networks, nested where units lie within units."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lmc.align.weight_matching.assignment import assign, opening_prices
from lmc.core.extras import require
from lmc.errors import SpecError
from lmc.symmetry.group import Group, Table
from lmc.symmetry.spec import PermutationSpec

View = tuple[str, int]  # a parameter and one of its axes, whose positions are channels

_SCALINGS = 10_000
_MARGIN = 1e-4
# Of the mean mass: units without incoming weights keep that much, so that shares are defined.
_LEAST_MASS = 1e-7


@dataclass(frozen=True, eq=False)
class Importance:
    """What units weigh: the norm of the given order of their incoming weights.

    Attributes:
        order: 1 or 2.
        powers: for each view where units are computed, per channel of A and of B, the sum of `|weight| ** order`.
    """

    order: int
    powers: Mapping[View, tuple[Tensor, Tensor]]

    def masses(self, a: Group, b: Group) -> tuple[Tensor, Tensor]:
        """The masses (n_a,), (n_b,) of the units of two groups, which sum to 1; none is quite 0."""
        totals = [torch.zeros(a.size, dtype=torch.float64), torch.zeros(b.size, dtype=torch.float64)]
        for view, powers in self.powers.items():
            for both in paired_rows(a, b, view):
                for total, power, rows in zip(totals, powers, both, strict=True):
                    total += power[rows].sum(1)
        norms = [total.pow(1.0 / self.order) for total in totals]
        left, right = (n.clamp_min((_LEAST_MASS * float(n.mean())) or 1.0) for n in norms)
        return left / left.sum(), right / right.sum()


def plan(cost: Tensor, regularization: float, name: str, masses: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The coupling T (n_a, n_b) that makes `sum T cost` least, in float64, on the device of the cost.

    Its rows sum to the masses of A's units, its columns to those of B's; by default 1/n_a and 1/n_b. Exact for
    `regularization` 0, where equally many units of equal mass are a linear assignment (an extreme point of the Birkhoff
    polytope); else with an entropy of that weight, relative to the median cost.

    Raises:
        MissingPackageError: the problem needs the package POT, which is not installed.
    """
    n_a, n_b = cost.shape
    if regularization == 0.0 and n_a == n_b and masses is None:
        gain = -cost
        coupling = torch.zeros(n_a, n_b, dtype=torch.float64, device=cost.device)
        coupling[torch.arange(n_a), assign(gain, opening_prices(gain))[0]] = 1.0 / n_a
        return coupling
    ot = require("ot", "ot")
    matrix = cost.detach().to("cpu", torch.float64)
    matrix = (matrix / matrix.median().clamp_min(1e-12)).numpy()
    if masses is None:
        masses = (
            torch.full((n_a,), 1.0 / n_a, dtype=torch.float64),
            torch.full((n_b,), 1.0 / n_b, dtype=torch.float64),
        )
    left, right = (mass.numpy() for mass in masses)
    if regularization == 0.0:
        return torch.from_numpy(ot.emd(left, right, matrix, numItermax=10_000_000)).to(cost.device)
    coupling = torch.from_numpy(
        ot.sinkhorn(
            left, right, matrix, regularization, method="sinkhorn_log", numItermax=_SCALINGS, stopThr=1e-9, warn=False
        )
    )
    off = max(float((coupling.sum(1 - k) / mass - 1).abs().max()) for k, mass in enumerate(masses))
    if not off < _MARGIN:
        warnings.warn(
            f"{name}: Sinkhorn has not converged in {_SCALINGS} iterations, marginals are off by {off:.1g} of their "
            f"value; raise regularization above {regularization:g}, or take 0 for the exact coupling",
            stacklevel=2,
        )
    return coupling.to(cost.device)


@dataclass(frozen=True, eq=False)
class Coupling:
    """How the units of a group of A are spread over those of the group of B, and what is nested in each pair of units.

    Attributes:
        a, b: the group in either network.
        plan: T (n_a, n_b).
        inner: (unit of A, unit of B) -> the couplings of the groups within these two units.
    """

    a: Group
    b: Group
    plan: Tensor
    inner: dict[tuple[int, int], "list[Coupling]"] = field(default_factory=dict)

    @cached_property
    def index(self) -> Tensor | None:
        """(n,) the unit of A for each unit of B, where the plan is a permutation."""
        used = self.plan > 0
        if used.shape[0] == used.shape[1] and bool((used.sum(0) == 1).all() and (used.sum(1) == 1).all()):
            return used.to(torch.uint8).argmax(0)
        return None

    def share(self, producing: bool) -> Tensor:
        """(n_b, n_a): the share of each unit of A in each unit of B.

        Where units are computed, the shares in a unit of B sum to 1: it becomes a mean of units of A. Where they are
        consumed, the shares of a unit of A sum to 1: its outgoing weight is split. Both are `n T` for equal widths and
        masses; for unequal ones only this pair keeps a function whose units were merely duplicated.
        """
        return (self.plan / self.plan.sum(0 if producing else 1, keepdim=True)).T

    def plans(self) -> dict[str, Tensor]:
        """All plans by name; those between the units within unit i of A and unit j of B are `family[i->j]`."""
        found = {self.a.name: self.plan}
        for (i, j), couplings in self.inner.items():
            for coupling in couplings:
                for name, matrix in coupling.plans().items():
                    family = coupling.a.family if name == coupling.a.name else name
                    found[f"{family}[{i}->{j}]"] = matrix
        return found

    def matrix(self, view: View, producing: bool, shape: tuple[int, int]) -> Tensor:
        """(channels of B, channels of A) of a view: what takes A's channels to B's, 0 where the group has none."""
        found = torch.zeros(shape, dtype=torch.float64, device=self.plan.device)
        self._fill(found, view, producing, 1.0)
        return found

    def _fill(self, matrix: Tensor, view: View, producing: bool, factor: float) -> None:
        share = self.share(producing)
        for rows_a, rows_b in paired_rows(self.a, self.b, view):
            for j, i in share.nonzero().tolist():
                inner = self.inner.get((i, j), [])
                left, right = _uncovered(rows_a[i], rows_b[j], inner, view)
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
    """The coupling of two groups for squared distances between channels (K_a, K_b) at some views, and what it costs.

    The cost of a pair of units is the sum over their channels; where groups are nested in them, channels are paired by
    the optimal coupling within the pair.
    """
    a, b = groups
    within_a, within_b = _children(specs[0], a), _children(specs[1], b)
    nested = any(within_a.values())
    device = next(iter(squares.values())).device
    cost = torch.zeros(a.size, b.size, dtype=torch.float64, device=device)
    inner: dict[tuple[int, int], list[Coupling]] = {}
    for i in range(a.size) if nested else ():
        for j in range(b.size):
            pairs = zip(within_a[i], within_b[j], strict=True)
            solved = [couple(specs, pair, squares, regularization, squared, importance) for pair in pairs]
            inner[i, j] = [coupling for coupling, _ in solved]
            cost[i, j] = sum(value for _, value in solved)
    for view, square in squares.items():
        for rows_a, rows_b in paired_rows(a, b, view):
            if not nested:
                cost += _by_unit(square, rows_a.to(device), rows_b.to(device))
                continue
            for i in range(a.size):
                for j in range(b.size):
                    left, right = _uncovered(rows_a[i], rows_b[j], inner[i, j], view)
                    cost[i, j] += square[left, right].sum()
    masses = None if importance is None else importance.masses(a, b)
    found = plan(cost if squared else cost.clamp_min(0.0).sqrt(), regularization, b.name, masses)
    return Coupling(a, b, found, inner), float((found * cost).sum()) * b.size


def paired_rows(a: Group, b: Group, view: View, device: torch.device | None = None) -> list[tuple[Tensor, Tensor]]:
    """The rows (n_a, m_a), (n_b, m_b) of two corresponding groups at a view."""
    tensor, axis = view
    left = [table for table in a.tables.get(tensor, ()) if table.dims == (axis,)]
    right = [table for table in b.tables.get(tensor, ()) if table.dims == (axis,)]
    return [(_rows(x, device), _rows(y, device)) for x, y in zip(left, right, strict=True)]


def _rows(table: Table, device: torch.device | None) -> Tensor:
    return torch.from_numpy(table.rows).to(device)


def _by_unit(square: Tensor, rows_a: Tensor, rows_b: Tensor) -> Tensor:
    if rows_a.shape[1] != rows_b.shape[1]:
        raise SpecError(f"units of {rows_a.shape[1]} channels in a and {rows_b.shape[1]} in b cannot be compared")
    columns = iter(zip(rows_a.T, rows_b.T, strict=True))
    x, y = next(columns)
    total = square[x].index_select(1, y)
    for x, y in columns:
        total += square[x].index_select(1, y)
    return total


def _uncovered(row_a: Tensor, row_b: Tensor, inner: list[Coupling], view: View) -> tuple[Tensor, Tensor]:
    """The channels of two units that no nested group has; they correspond in order."""
    taken_a = [rows.flatten() for coupling in inner for rows, _ in paired_rows(coupling.a, coupling.b, view)]
    taken_b = [rows.flatten() for coupling in inner for _, rows in paired_rows(coupling.a, coupling.b, view)]
    left = row_a[~torch.isin(row_a, torch.cat(taken_a))] if taken_a else row_a
    right = row_b[~torch.isin(row_b, torch.cat(taken_b))] if taken_b else row_b
    if len(left) != len(right):
        raise SpecError(f"{view[0]}, axis {view[1]}: units of {len(left)} channels in a and {len(right)} in b")
    return left, right


def _children(spec: PermutationSpec, group: Group) -> dict[int, list[Group]]:
    found: dict[int, list[Group]] = {unit: [] for unit in range(group.size)}
    for other in spec.groups.values():
        for parent, unit in other.within:
            if parent == group.name:
                found[unit].append(other)
    return found
