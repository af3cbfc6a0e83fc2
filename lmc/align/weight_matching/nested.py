"""Nested assignment: the gain of a pair of units is the optimum of the problem inside them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lmc.align.weight_matching.blocks import UnitBlock, sub_tensor
from lmc.align.weight_matching.gains import assign, inner_product

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
