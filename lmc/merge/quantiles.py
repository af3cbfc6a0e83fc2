"""The exact k-th smallest value of tensors that are seen one at a time, without sorting or holding them all.

A sample tells between which two values the wanted one lies, almost surely; a second pass counts what is below and
collects what is between, about one value in a hundred. Should the sample have misled, the bounds are widened.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 17


def kth_smallest(passes: Callable[[], Iterable[Tensor]], ranks: Sequence[int], size: int) -> Tensor:
    """For each model t the `ranks[t]`-th smallest value (1 = the minimum) over all its tensors.

    Args:
        passes: starts a new pass over the values, finite tensors `(models, *shape)`.
        ranks: one rank per model, from 1 to `size`.
        size: the number of values of each model.

    Returns:
        `(models,)` on the CPU, values that occur.
    """
    stride = max(1, size // SAMPLE)
    parts = [values.reshape(len(ranks), -1)[:, ::stride].to("cpu", copy=True) for values in passes()]
    samples = torch.cat(parts, dim=1).sort(dim=1).values
    if stride == 1:
        return samples.gather(1, torch.tensor(ranks)[:, None] - 1)[:, 0]
    found: dict[int, Tensor] = {}
    margin = int(4 * samples.shape[1] ** 0.5)  # the place of a quantile in a sample of m strays by about sqrt(m) / 2
    while len(found) < len(ranks):
        searches = {t: _Search(samples[t], rank, size, margin) for t, rank in enumerate(ranks) if t not in found}
        for values in passes():
            for t, search in searches.items():
                search.see(values[t].flatten())
        found |= {t: value for t, search in searches.items() if (value := search.result()) is not None}
        margin *= 8
    return torch.stack([found[t] for t in range(len(ranks))])


class _Search:
    """Counts the values at and below two bounds and collects those between."""

    def __init__(self, sample: Tensor, rank: int, size: int, margin: int) -> None:
        place = round(rank / size * len(sample))
        unbounded = torch.tensor(float("inf"), dtype=sample.dtype)
        self.low = sample[place - margin] if place >= margin else -unbounded
        self.high = sample[place + margin] if place + margin < len(sample) else unbounded
        self.rank = rank
        self.below = self.at_low = self.at_high = 0
        self.between: list[Tensor] = []

    def see(self, values: Tensor) -> None:
        low, high = self.low.to(values.device), self.high.to(values.device)
        near = values[(values >= low) & (values <= high)]
        self.below += int((values < low).sum())
        self.at_low += int((near == low).sum())
        self.at_high += int((near == high).sum())
        self.between.append(near[(near > low) & (near < high)].cpu())

    def result(self) -> Tensor | None:
        """The value of the wanted rank, or None if it lies outside the bounds."""
        between = torch.cat(self.between)
        rank = self.rank - self.below
        if rank <= 0:
            return None
        if rank <= self.at_low:
            return self.low
        if rank <= self.at_low + len(between):
            return between.kthvalue(rank - self.at_low).values
        return self.high if rank <= self.at_low + len(between) + self.at_high else None
