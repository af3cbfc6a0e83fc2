"""Pieces that several architectures share: activations, normalisation, pre-norm attention blocks."""

import math
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


class Attention(nn.Module):
    """Multi-head self-attention, spelled out: `softmax(q kᵀ / sqrt(d)) v`, heads as the slowest axis of the units.

    Rows of `q`, `k`, `v` (or of each third of the fused `qkv`) are `(head unit)`; so are the columns of `o`.
    """

    def __init__(self, dim: int, heads: int, causal: bool, fused: bool):
        super().__init__()
        self.heads, self.causal, self.fused = heads, causal, fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q = nn.Linear(dim, dim)
            self.k = nn.Linear(dim, dim)
            self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, dim = tokens.shape
        if self.fused:
            q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        else:
            q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        q, k, v = (x.view(batch, length, self.heads, -1).transpose(1, 2) for x in (q, k, v))  # (N, head, T, unit)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.causal:
            past = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            scores = scores.masked_fill(~past, float("-inf"))
        mixed = scores.softmax(dim=-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then two dense layers, each added to the residual stream."""

    def __init__(self, dim: int, heads: int, hidden: int, causal: bool, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal, fused)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


def blocks(depth: int, dim: int, heads: int, hidden: int | None, causal: bool, fused: bool) -> nn.ModuleDict:
    """`depth` transformer blocks named `"1"`, `"2"`, ...; `hidden` defaults to `4 dim`."""
    check_sizes(depth=depth, dim=dim, heads=heads)
    if dim % heads:
        raise InputError(f"dim={dim} does not divide into heads={heads}: choose a multiple")
    return nn.ModuleDict({str(i): Block(dim, heads, hidden or 4 * dim, causal, fused) for i in range(1, depth + 1)})
