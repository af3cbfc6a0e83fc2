"""The barrier: how much worse the way between two networks is than its ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lmc.errors import InputError

Baseline: TypeAlias = Literal["linear", "mean"]


@dataclass(frozen=True)
class Barrier:
    """The highest rise of a measure E (lower is better) above a baseline between two ends.

    Attributes:
        value: `max E(alpha) - baseline(alpha)` over the grid with both ends, in the unit of the values.
        alpha: where the maximum is attained.
        midpoint: E at the grid point nearest to 1/2.
        start, end: E(0) and E(1).
        baseline: "linear", (1 - alpha) E(0) + alpha E(1) (Entezari et al. 2022, arXiv:2110.06296, Definition 2.1), or
            "mean", (E(0) + E(1)) / 2 (Frankle et al. 2020, arXiv:1912.05671, section 2).
    """

    value: float
    alpha: float
    midpoint: float
    start: float
    end: float
    baseline: Baseline


def barrier(
    alphas: Sequence[float] | npt.NDArray[np.float64],
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    baseline: Baseline = "linear",
) -> Barrier:
    """The barrier of `values` (P,) at `alphas` (P,), which hold 0 and 1.

    Both ends belong to the grid, so with the linear baseline the barrier is never negative. Points that are NaN (not
    evaluated) are passed over; so is whatever lies outside [0, 1].

    Raises:
        InputError: lengths that differ, an unknown baseline, or ends that are missing or NaN.
    """
    grid, heights = np.asarray(alphas, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if grid.shape != heights.shape or grid.ndim != 1:
        raise InputError(f"alphas of shape {grid.shape} and values of shape {heights.shape}; expected the same (P,)")
    if baseline not in get_args(Baseline):
        raise InputError(f"baseline={baseline!r}; expected one of {', '.join(get_args(Baseline))}")
    ends = heights[np.isin(grid, (0.0, 1.0))]
    if np.isnan(ends).any():
        raise InputError(f"no barrier between ends of {ends.tolist()}: the values at alpha = 0 and 1 must be numbers")
    inside = (grid >= 0.0) & (grid <= 1.0) & ~np.isnan(heights)
    grid, heights = grid[inside], heights[inside]
    if not {0.0, 1.0} <= set(grid.tolist()):
        raise InputError("a barrier needs the values at alpha = 0 and alpha = 1")
    start, end = float(heights[grid == 0.0][0]), float(heights[grid == 1.0][0])
    floor = (1.0 - grid) * start + grid * end if baseline == "linear" else np.full_like(grid, 0.5 * (start + end))
    rise = heights - floor
    top = int(np.argmax(rise))
    middle = int(np.argmin(np.abs(grid - 0.5)))
    return Barrier(float(rise[top]), float(grid[top]), float(heights[middle]), start, end, baseline)
