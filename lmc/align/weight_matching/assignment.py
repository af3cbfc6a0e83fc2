"""The linear assignment problem, solved exactly on the CPU."""

import numpy as np
import torch
from torch import Tensor

# Below this size an assignment is quicker than finding prices for it.
_LARGE = 128
# Temperatures, as shares of the spread of the gains, and scalings at each of them.
_TEMPERATURES = (0.4, 0.1)
_SCALINGS = 8
# Smaller exponents would become denormal numbers, which are slow.
_FLOOR = -60.0


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
