"""The exact k-th smallest value of tensors that are seen one at a time, without sorting or holding them all.

A sample gives two values that the wanted one is between, almost surely; one pass counts what is below and collects
what is between, a few values in a thousand. Should the sample have misled, the bounds are widened.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 19  # up to so many values per model are simply held
GROUPS = 16  # parts of a sample, whose disagreement measures its error


def kth_smallest(
    passes: Callable[[], Iterable[Tensor]],
    ranks: Sequence[int],
    size: int,
    sample: Callable[[], Iterable[Tensor]] | None = None,
) -> Tensor:
    """The `ranks[t]`-th smallest value (1 = the minimum) of model t over all its tensors.

    Args:
        passes: starts a new pass over the values, finite tensors `(models, *shape)`.
        ranks: from 1 to `size`, one per model; further ones start with the first model again.
        size: the number of values of each model.
        sample: gives some of the values cheaply, in many tensors; by default another pass is sampled.

    Returns:
        `(len(ranks),)` on the CPU, values that occur.
    """
    if size <= SAMPLE:
        values = np.concatenate([_rows(v) for v in passes()], axis=1)
        values.partition(sorted({rank - 1 for rank in ranks}), axis=1)
        return torch.from_numpy(np.array([values[t % len(values), rank - 1] for t, rank in enumerate(ranks)]))
    if sample is None:
        stride = size // SAMPLE + 1
        drawn = [_rows(v)[:, ::stride].copy() for v in passes()]
    else:
        drawn = [_rows(v).copy() for v in sample()]
    groups = [np.concatenate(drawn[i::GROUPS], axis=1) for i in range(min(GROUPS, len(drawn)))]
    found: dict[int, float] = {}
    dtype, wider = drawn[0].dtype, 1
    while len(found) < len(ranks):
        searches = {
            t: _Search([group[t % len(group)] for group in groups], rank, size, wider)
            for t, rank in enumerate(ranks)
            if t not in found
        }
        for tensor in passes():
            values = _rows(tensor)
            for t, search in searches.items():
                search.see(values[t % len(values)])
        found |= {t: value for t, search in searches.items() if (value := search.result()) is not None}
        wider *= 8
    return torch.from_numpy(np.array([found[t] for t in range(len(ranks))], dtype=dtype))


def _rows(values: Tensor) -> np.ndarray:
    """`(models, values)`; comparing and counting is several times faster in NumPy."""
    return values.detach().reshape(len(values), -1).cpu().numpy()


class _Search:
    """Counts the values up to two bounds and collects those between."""

    def __init__(self, groups: Sequence[np.ndarray], rank: int, size: int, wider: int) -> None:
        sample = np.sort(np.concatenate(groups))
        count, share = len(sample), rank / size
        middle = sample[min(count - 1, round(share * count))]
        below = [float(np.mean(group <= middle)) for group in groups]
        # Neighbours are alike, so that the error is larger than that of as many independent values; where the groups
        # differ by chance less than those would, the latter's is taken.
        error = max(float(np.std(below)) / len(groups) ** 0.5, (share * (1 - share) / count) ** 0.5)
        margin = wider * (int(6 * error * count) + 4)
        place = round(share * count)
        self.low = sample[place - margin] if place >= margin else sample.dtype.type(-np.inf)
        self.high = sample[place + margin] if place + margin < count else sample.dtype.type(np.inf)
        self.rank = rank
        self.counts = np.zeros(4, dtype=np.int64)
        # One array that grows: many small ones, made between large ones that come and go, would fragment the heap.
        self.between, self.collected = np.empty(1 << 16, dtype=sample.dtype), 0

    def see(self, values: np.ndarray) -> None:
        upto_low, below_high = values <= self.low, values < self.high
        bounds = (values < self.low, upto_low, below_high, values <= self.high)
        counts = [np.count_nonzero(bound) for bound in bounds]
        self.counts += counts
        if counts[2] > counts[1]:
            self._collect(values[np.flatnonzero(upto_low ^ below_high)])

    def _collect(self, values: np.ndarray) -> None:
        end = self.collected + len(values)
        if end > len(self.between):
            grown = np.empty(max(end, 2 * len(self.between)), dtype=values.dtype)
            grown[: self.collected] = self.between[: self.collected]
            self.between = grown
        self.between[self.collected : end] = values
        self.collected = end

    def result(self) -> float | None:
        """The value of the wanted rank, or None if it is outside the bounds."""
        below_low, upto_low, below_high, upto_high = self.counts
        if not below_low < self.rank <= upto_high:
            return None
        if self.rank <= upto_low:
            return self.low
        if self.rank > below_high:
            return self.high
        place = int(self.rank - upto_low) - 1
        return np.partition(self.between[: self.collected], place)[place]
