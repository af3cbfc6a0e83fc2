"""The gain of each assignment of a group's units, kept up to date while other groups move, and the best assignment; with
groups inside a group, the gain of a pair of units is the optimum of the problem inside them."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lmc.align.weight_matching.blocks import Shift, UnitBlock, sub_tensor
from lmc.weights.state import wide

# Below this size an assignment is quicker than finding prices for it.
_LARGE = 128
# Temperatures, as shares of the spread of the gains, and scalings at each of them.
_TEMPERATURES = (0.4, 0.1)
_SCALINGS = 8
# Smaller exponents would become denormal numbers, which are slow.
_FLOOR = -60.0
# From this size on, an assignment takes longer than finding the prices that speed up the next one.
_PRICED = 128
CHUNK = 1 << 18


def assign(gain: Tensor, prices: Tensor | None = None) -> tuple[Tensor, float]:
    """The permutation p that maximises `sum_i gain[i, p[i]]`, and by how much it beats the identity.

    `gain` is `(n, n)` on any device; the search runs in float64 on the CPU. `prices` `(n,)` are taken off the columns
    during the search: that cannot change the answer, but good prices make it quick (see `opening_prices`, `prices_of`).
    """
    matrix = gain.detach().to("cpu", torch.float64).numpy()
    cost = -matrix if prices is None else prices.to("cpu", torch.float64).numpy() - matrix
    from scipy.optimize import linear_sum_assignment  # slow to import

    rows, columns = linear_sum_assignment(cost)
    improvement = float(matrix[rows, columns].sum() - np.trace(matrix))
    return torch.from_numpy(columns.astype(np.int64)), improvement


def prices_of(gain: Tensor, index: Tensor, prices: Tensor | None = None) -> Tensor:
    """Column prices `(n,)` under which each row of `gain` likes its column `index[i]` best, or nearly so.

    They are the dual variables of the assignment problem, by one pass of Bellman-Ford from earlier `prices`: enough
    for the next problem of a series, whose gain differs anyway.
    """
    index = index.to(gain.device)
    own = gain.gather(1, index[:, None])
    start = -own if prices is None else prices[index, None] - own
    return (gain + start).amax(0)


def opening_prices(gain: Tensor) -> Tensor | None:
    """Column prices `(n,)` for an assignment of which nothing is known yet; None where it is small or all gains agree.

    They are the dual variables of the assignment with an entropy, after a few scalings of `exp(gain / temperature)` by
    rows and columns at falling temperatures (Sinkhorn; Cuturi 2013, arXiv:1306.0895), on the device of the gains. On the
    gain matrices of networks the exact search takes a third to a fifth of its time with them, finding them included.
    """
    if len(gain) < _LARGE:
        return None
    matrix = gain.detach().float()
    columns = matrix.mean(0)
    spread = float((matrix - columns - matrix.mean(1, keepdim=True) + columns.mean()).std())
    if not spread > 0.0:
        return None
    prices = columns - columns.mean()
    for share in _TEMPERATURES:
        temperature = share * spread
        kernel = matrix - prices
        kernel.sub_(kernel.amax(1, keepdim=True)).div_(temperature).clamp_min_(_FLOOR).exp_()
        scale = torch.ones_like(prices)
        for _ in range(_SCALINGS):
            scale = ((kernel @ scale).reciprocal() @ kernel).reciprocal()
        prices = prices - temperature * scale.log()
    return prices


class Gains:
    """For each block the matrix `gain[i, j]`: the inner product of what A's unit i and B's unit j own, B as moved so far.

    It is a sum over the places of a block. The product of a place is made when it is first asked for; when a neighbour
    moves, only the slices that changed enter, as `A_slices (B_after - B_before)_slices^T`.
    """

    def __init__(self, blocks: Sequence[UnitBlock], fixed: Mapping[str, Tensor]) -> None:
        self.blocks, self.fixed = blocks, fixed
        self._gain: dict[int, Tensor] = {}
        self._held: list[set[int]] = [set() for _ in blocks]
        self._prices: dict[int, Tensor] = {}

    def of(self, i: int, used: Collection[int], state: Mapping[str, Tensor]) -> Tensor:
        """The gain `(n, n)` of block i over its places `used`, which hold all those asked for before."""
        block, held = self.blocks[i], self._held[i]
        for k in used:
            if k not in held:
                place = block.places[k]
                self._add(i, place.features(self.fixed[place.tensor]), place.features(state[place.tensor]))
                held.add(k)
        if i not in self._gain:
            return torch.zeros(block.size, block.size)
        return self._gain[i]

    def assign(self, i: int, gain: Tensor) -> tuple[Tensor, float]:
        """The best permutation of block i and its improvement, searched from the prices of its last assignment."""
        index, improvement = assign(gain, self._prices.get(i))
        if len(index) >= _PRICED:
            self._prices[i] = prices_of(gain, index, self._prices.get(i))
        return index, improvement

    def reorder(self, i: int, index: Tensor) -> None:
        """UnitBlock i itself has moved: B's units come in the order `index`."""
        for columns in (self._gain, self._prices):
            if i in columns:
                columns[i] = columns[i].index_select(-1, index.to(columns[i].device))

    def forget(self, i: int) -> None:
        """Compute the gain of block i from scratch when it is next asked for."""
        self._gain.pop(i, None)
        self._prices.pop(i, None)
        self._held[i].clear()

    def update(self, i: int, name: str, shift: Shift | None, before: Tensor, after: Tensor) -> None:
        """A neighbour of block i has changed a tensor, along one axis if there is a `shift`."""
        places = [self.blocks[i].places[k] for k in self._held[i] if self.blocks[i].places[k].tensor == name]
        if shift is None or any(shift.axis in place.dims for place in places):
            if places:
                self.forget(i)
            return
        fixed = self.fixed[name]
        if len(shift.moved) < len(shift.index):
            fixed, before, after = (x.index_select(shift.axis, shift.moved) for x in (fixed, before, after))
        for place in places:
            self._add(i, place.features(fixed), place.features(after - before))

    def _add(self, i: int, mine: Tensor, theirs: Tensor) -> None:
        self._gain[i] = added(self._gain.get(i), mine, theirs)


def added(gain: Tensor | None, mine: Tensor, theirs: Tensor) -> Tensor:
    """`gain + mine @ theirs^T`, in place where there is a gain yet of no narrower dtype."""
    dtypes = {x.dtype for x in (mine, theirs, gain) if x is not None}
    if len(dtypes) > 1:  # a block reads tensors of several, such as a head in double precision
        common = reduce(torch.promote_types, dtypes)
        mine, theirs, gain = mine.to(common), theirs.to(common), gain if gain is None else gain.to(common)
    return mine @ theirs.T if gain is None else gain.addmm_(mine, theirs.T)


def comparable(tensor: Tensor) -> Tensor:
    """A tensor as it is matched on: in float32 at least, complex numbers as pairs along a last axis."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(wide(tensor.dtype))


def inner_product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """`sum <a, b>` over the tensors of `a`, in float64."""
    return sum(dot(x.flatten(), b[name].flatten()) for name, x in a.items())


def dot(x: Tensor, y: Tensor) -> float:
    """`<x, y>` in float64, widened chunk by chunk: chunks stay in the cache, whole layers would not."""
    if x.numel() <= CHUNK:
        return float(torch.dot(x.double(), y.double()))
    return sum(map(dot, x.split(CHUNK), y.split(CHUNK)))


Step: TypeAlias = dict[str, Tensor]
Solutions: TypeAlias = dict[tuple[int, int], Step]
SolveInside: TypeAlias = Callable[[Sequence[UnitBlock], Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Step, float]]


def nested_assignment(
    block: UnitBlock,
    used: Sequence[int],
    fixed: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    solve_inside: SolveInside,
) -> tuple[Step, float, float]:
    """The best permutation of a block together with what is nested in its units.

    Args:
        used: the places of the block that count.
        solve_inside: solves the problem inside one pair of units; called where inner blocks see each other.

    Returns:
        The step, the improvement, and the size of the terms involved.
    """
    places = {sub_tensor(k): block.places[k] for k in used}
    mine = {name: place.slices(fixed[place.tensor]) for name, place in places.items()}
    theirs = {name: place.slices(state[place.tensor]) for name, place in places.items()}
    if block.separable:
        gain, solutions = separate_pairs(block, mine, theirs)
    else:
        gain, solutions = _pairs(block, mine, theirs, solve_inside)
    index, _ = assign(gain)
    stay = inner_product(mine, theirs)
    improvement = float(gain[torch.arange(block.size), index].sum()) - stay
    step: Step = {block.name: index}
    # The inner problem is solved in the names of unit 0; its solution for A's unit i goes by the names within unit i.
    for unit, names in enumerate(block.names):
        solved = solutions[unit, int(index[unit])]
        step |= {n: solved[t] for t, n in zip(block.names[0], names, strict=True) if t in solved}
    return step, improvement, abs(stay)


def _pairs(
    block: UnitBlock, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], solve_inside: SolveInside
) -> tuple[Tensor, Solutions]:
    """The optimum inside every pair of units, and how it is reached, one pair after the other."""
    inner = [b for b in block.inner if any(name in mine for name in b.tables)]
    gain = torch.zeros(block.size, block.size, dtype=torch.float64)
    solutions: Solutions = {}
    for i, j in itertools.product(range(block.size), repeat=2):
        fixed = {name: tensor[i] for name, tensor in mine.items()}
        solutions[i, j], gain[i, j] = solve_inside(inner, fixed, {name: tensor[j] for name, tensor in theirs.items()})
    return gain, solutions


def separate_pairs(
    block: UnitBlock, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[Tensor, Solutions]:
    """The optimum inside every pair of units, for a block whose inner blocks do not see each other.

    One matrix product per place gives the gains of all pairs, so that only the small assignments are left.

    Args:
        mine, theirs: the slices `(n, m, *rest)` that each place gives to A's and to B's units.

    Returns:
        The gain `(n, n)` of each pair with its inside matched, and for each pair the inner permutations.
    """
    n = block.size
    gain = torch.zeros(n, n, dtype=torch.float64)
    for name in mine:
        gain += (mine[name].flatten(1) @ theirs[name].flatten(1).T).to("cpu", torch.float64)
    solutions: Solutions = {(i, j): {} for i in range(n) for j in range(n)}
    for inner in block.inner:
        if (pairs := _inner_gains(inner, mine, theirs)) is None:
            continue
        for (i, j), solved in solutions.items():
            solved[inner.name], improvement = assign(pairs[i, :, j, :])
            gain[i, j] += improvement
    return gain, solutions


def _inner_gains(inner: UnitBlock, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor | None:
    """`(n, s, n, s)`: the gain of each inner unit of each of A's units with each of B's; None if nothing is known."""
    total = None
    for place in inner.places:
        if place.tensor in mine:
            x, y = (
                torch.stack([place.features(unit) for unit in side[place.tensor]]).flatten(0, 1)
                for side in (mine, theirs)
            )
            total = x @ y.T if total is None else total.addmm_(x, y.T)
    return None if total is None else total.cpu().view(-1, inner.size, total.shape[0] // inner.size, inner.size)
