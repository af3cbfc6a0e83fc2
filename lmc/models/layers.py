"""Pieces that several architectures share: activations, normalisation, checks."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.errors import InputError

Option = TypeVar("Option")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def pick(options: Mapping[str, Option], name: str, argument: str) -> Option:
    """`options[name]`, or an `InputError` that lists what the argument may be."""
    if name not in options:
        raise InputError(f"{argument}={name!r}: expected one of {', '.join(map(repr, options))}")
    return options[name]


def check_sizes(**sizes: int) -> None:
    """Raise `InputError` naming the first size that is not a positive integer."""
    for argument, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{argument}={size!r}: expected a positive integer")


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, `(N, C, H, W)`: the norm of Git Re-Basin's ResNet.

    It has no running statistics, so weights can be interpolated without re-estimating anything
    (Ainsworth et al. 2022, section 5 and appendix on ResNets).
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, images: Tensor) -> Tensor:
        last = F.layer_norm(images.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return last.movedim(-1, 1)


IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": ChannelNorm}
