"""Means and inner products of the tensors of several models, collected chunk by chunk in float64."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def moments(tensors: Iterable[Tensor]) -> Moments:
    """Of `(models, *shape)` tensors, the chunks of one, by the pairwise update of Chan, Golub and LeVeque (1983).

    Sums of products of centred entries lose no digits where the mean is large against the spread.
    """
    count, means, scatter = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for tensor in tensors:
        entries = precise(tensor).reshape(len(tensor), -1)
        own = entries.mean(1, keepdim=True)
        entries = entries - own
        products, own, more = (entries @ entries.T).cpu(), own[:, 0].cpu(), entries.shape[1]
        if count == 0:
            count, means, scatter = more, own, products
            continue
        apart = own - means
        scatter = scatter + products + torch.outer(apart, apart) * (count * more / (count + more))
        means = means + apart * (more / (count + more))
        count += more
    return Moments(count, means, scatter / count)


def precise(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
