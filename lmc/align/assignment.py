"""The linear assignment problem, solved exactly on the CPU."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(gain: Tensor, prices: Tensor | None = None) -> tuple[Tensor, float]:
    """The permutation p that maximises `sum_i gain[i, p[i]]`, and by how much it beats the identity.

    `gain` is `(n, n)` on any device; the search runs in float64 on the CPU. `prices` `(n,)` are taken off the columns
    during the search: that cannot change the answer, but good prices make it quick (see `prices_of`).
    """
    matrix = gain.detach().to("cpu", torch.float64).numpy()
    cost = -matrix if prices is None else prices.to("cpu", torch.float64).numpy() - matrix
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
