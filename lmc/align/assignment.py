"""The linear assignment problem, solved exactly on the CPU."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(gain: Tensor) -> tuple[Tensor, float]:
    """The permutation p that maximises `sum_i gain[i, p[i]]`, and by how much it beats the identity.

    `gain` is `(n, n)` on any device; the search runs in float64 on the CPU.
    """
    matrix = gain.detach().to("cpu", torch.float64).numpy()
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    improvement = float(matrix[rows, columns].sum() - np.trace(matrix))
    return torch.from_numpy(columns.astype(np.int64)), improvement
