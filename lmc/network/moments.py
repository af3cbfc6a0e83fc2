"""Running moments: means and sums of products of centred samples, streamed over batches or chunks.

Sets of samples are joined by the pairwise update of Chan, Golub and LeVeque (1983) on centred values, so a mean that is
large beside the spread costs no digits.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def joined(count: int, mean: Tensor, more: int, other: Tensor) -> tuple[Tensor, Tensor, float]:
    """The mean of `count` samples with one mean and `more` with another, the shift between the two, and a weight.

    With them, sums of products of centred samples add up: `S = S_1 + S_2 + weight * outer(shift, shift)`.
    """
    shift, total = other - mean, max(count + more, 1)
    return mean + (more / total) * shift, shift, count * more / total


class ChannelMoments:
    """Means (K, n) and covariances (K, K, n) of n channels, seen on the same samples in K networks."""

    def __init__(self) -> None:
        self.samples = 0
        self.mean = self.square = torch.zeros(())

    def update(self, values: Tensor) -> None:
        """Take in values (K, n, samples)."""
        center = values.mean(2)
        values = values - center[:, :, None]
        alone = len(values) == 1  # then in a fifth of the time
        square = values.square_().sum(2)[None] if alone else torch.einsum("kns,lns->kln", values, values)
        self._join(values.shape[2], center, square)

    def join(self, other: "ChannelMoments") -> None:
        """Take in what others are the moments of."""
        self._join(other.samples, other.mean, other.square)

    def _join(self, samples: int, mean: Tensor, square: Tensor) -> None:
        self.mean, shift, weight = joined(self.samples, self.mean, samples, mean)
        self.square = self.square + square + weight * shift[:, None] * shift[None]
        self.samples += samples

    @property
    def covariance(self) -> Tensor:
        return self.square / self.samples

    @property
    def deviation(self) -> Tensor:
        """Standard deviations (K, n)."""
        return torch.diagonal(self.covariance).T.clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class Moments:
    """Of the flattened tensors of one name, in float64 on the CPU.

    Attributes:
        count: the number of entries of each.
        means: `(models,)`, the mean entries.
        covariances: `(models, models)`, divided by `count`.
    """

    count: int
    means: Tensor
    covariances: Tensor

    @property
    def gram(self) -> Tensor:
        """`(models, models)`: the inner products."""
        return self.count * (self.covariances + torch.outer(self.means, self.means))


BLOCK = 1 << 14  # values that are worked on in float64 at a time, in the cache of a processor core
STRETCH = 512  # products of values in float32 that are added up before float64


def moments(tensors: Iterable[Tensor]) -> Moments:
    """Of `(models, *shape)` tensors, the chunks of one."""
    count, shift, sums, products = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for tensor in tensors:
        rows = tensor.reshape(len(tensor), -1)
        apart = rows.device.type == "cpu" and (rows.dtype != torch.float32 or rows.shape[1] % STRETCH)
        for block in rows.split(BLOCK if apart else max(1, rows.shape[1]), 1):
            if count == 0:  # numbers that are large beside their spread cost no digits
                shift = precise(block.mean(1, keepdim=True))
            count += block.shape[1]
            total, square = _sums(block, shift)
            sums, products = sums + total, products + square
    off = sums / count
    return Moments(count, (shift[:, 0] + off).cpu(), (products / count - torch.outer(off, off)).cpu())


def _sums(block: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Of `(models, values)` less a shift of each model the sums, and `(models, models)` the sums of products, in float64.

    Of float32 those of short stretches are taken in float32 first: half of the time, for errors of 1e-8.
    """
    if block.dtype != torch.float32 or block.shape[1] % STRETCH:
        values = precise(block) - shift
        return values.sum(1), values @ values.T
    stretches = (block - shift.to(block)).unflatten(1, (-1, STRETCH)).transpose(0, 1)  # (stretches, models, values)
    products = stretches @ stretches.mT
    return precise(stretches.sum(-1)).sum(0), precise(products).sum(0)


def precise(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
