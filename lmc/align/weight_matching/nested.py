"""What units contain, matched for all pairs of units at once."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lmc.align.weight_matching.assignment import assign
from lmc.align.weight_matching.blocks import UnitBlock

Step: TypeAlias = dict[str, Tensor]
Solutions: TypeAlias = dict[tuple[int, int], Step]


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
