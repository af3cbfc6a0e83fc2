"""Small networks with every kind of axis that the notation can say, for tests that need no discovery."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Softmax attention with a residual connection; `kv` heads are shared by `heads // kv` query heads each."""

    def __init__(
        self, width: int = 12, heads: int = 4, kv: int | None = None, qk: int = 3, v: int = 2, bias: bool = True
    ):
        super().__init__()
        kv = kv or heads
        self.heads, self.kv = heads, kv
        self.embed = nn.Linear(5, width, bias=bias)
        self.q = nn.Linear(width, heads * qk, bias=bias)
        self.k = nn.Linear(width, kv * qk, bias=bias)
        self.v = nn.Linear(width, kv * v, bias=bias)
        self.o = nn.Linear(heads * v, width, bias=bias)
        self.out = nn.Linear(width, 4, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self._split(self.q(x), self.heads), self._split(self.k(x), self.kv), self._split(self.v(x), self.kv)
        repeat = self.heads // self.kv
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(x + self.o(mixed.transpose(1, 2).flatten(2)))

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Experts(nn.Module):
    """A soft mixture of experts with stacked weights."""

    def __init__(self, width: int = 6, experts: int = 3, hidden: int = 4):
        super().__init__()
        self.embed = nn.Linear(5, width, bias=False)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width))
        self.down = nn.Parameter(torch.randn(experts, width, hidden))
        self.out = nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        hidden = torch.einsum("efd,nd->nef", self.up, x).relu()
        shares = self.router(x).softmax(-1)
        return self.out(x + torch.einsum("edf,nef,ne->nd", self.down, hidden, shares))


class Branches(nn.Module):
    """Two convolutions concatenated, flattened and read by a linear layer; one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 3, 3)
        self.right = nn.Conv2d(2, 4, 3)
        self.fc = nn.Linear(7 * 4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.cat([self.left(images).relu(), self.right(images).relu()], dim=1)
        return self.head(self.fc(maps.flatten(1)).relu())


BRANCHES = {
    "left.weight": "a . . .",
    "left.bias": "a",
    "right.weight": "b . . .",
    "right.bias": "b",
    "fc.weight": "f ((a + b) .)",
    "fc.bias": "f",
    "head.weight": ". f",
}


class GroupedConvolution(nn.Module):
    """conv -> grouped conv -> conv: groups move whole, with the channels inside each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2, bias=False)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.grouped(self.first(images).relu()).relu())


GROUPED = {
    "first.weight": "(g i) . . .",
    "first.bias": "(g i)",
    "grouped.weight": "(g o) g/i . .",
    "last.weight": ". (g o) . .",
}


class ResidualMLP(nn.Module):
    """A residual stream whose linear map reads and writes it directly, so one group lies on both axes of a tensor."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.out(x + self.mix(x).tanh())


RESIDUAL = {
    "embed.weight": "d .",
    "embed.bias": "d",
    "mix.weight": "d d",
    "mix.bias": "d",
    "out.weight": ". d",
}
