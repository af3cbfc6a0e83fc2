"""Fully connected networks: plain, normalised, gated, tied, shared, mixing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, S, vectors


class TiedAutoencoder(nn.Module):
    """Decoder weights are the encoder's, transposed."""

    def __init__(self, dim: int, hidden: int, code: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.code = nn.Linear(hidden, code)
        self.hidden_bias = nn.Parameter(torch.randn(hidden))
        self.output_bias = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.code(torch.tanh(self.down(x))))
        h = torch.tanh(F.linear(z, self.code.weight.t(), self.hidden_bias))
        return F.linear(h, self.down.weight.t(), self.output_bias)


class GatedShared(nn.Module):
    """A residual gated unit applied twice with the same weights: `GLU` takes the halves of one linear layer."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, dim), nn.LayerNorm(dim)
        self.both, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = x + self.down(F.glu(self.both(self.norm(x)), dim=-1))
        return self.head(x)


class SwiGLU(nn.Module):
    """value, gate = chunk; SiLU(gate) * value; RMS normalisation by hand."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.scale = nn.Linear(6, dim), nn.Parameter(torch.ones(dim))
        self.both, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.head = nn.Linear(dim, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        value, gate = self.both(y).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * value))


class Siamese(nn.Module):
    """One encoder, two inputs; the head reads |a - b| and a * b, so the features move in both halves of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9))
        self.head = nn.Linear(18, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.encoder(a), self.encoder(b)
        return self.head(torch.cat([(u - v).abs(), u * v], dim=1))


class Mixer(nn.Module):
    """MLP-Mixer: a linear layer over tokens, then one over channels (Tolstikhin et al. 2021)."""

    def __init__(self, dim: int, token_hidden: int, channel_hidden: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "tokens": nn.Sequential(nn.Linear(4, token_hidden), nn.GELU(), nn.Linear(token_hidden, 4)),
                    "norm2": nn.LayerNorm(dim),
                    "channels": nn.Sequential(
                        nn.Linear(dim, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, dim)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block["tokens"](block["norm1"](x).transpose(1, 2)).transpose(1, 2)
            x = x + block["channels"](block["norm2"](x))
        return self.head(self.norm(x).mean(1))


def mlp_bn_prelu() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 12),
        nn.BatchNorm1d(12),
        nn.PReLU(12),
        nn.Linear(12, 10),
        nn.BatchNorm1d(10),
        nn.PReLU(10),
        nn.Linear(10, 4),
    )


class HyperLinear(nn.Module):
    """A linear layer whose weight is an outer product of learned vectors plus a full matrix; a bilinear read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(11)), nn.Parameter(torch.randn(7))
        self.weight = nn.Parameter(torch.randn(11, 7))
        self.read = nn.Bilinear(11, 11, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ (self.weight + torch.outer(self.u, self.v)).t())
        return self.read(h, h)


class MultiBranch(nn.Module):
    """Two branches of the same width added up: their units are locked; a third multiplied from the side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(6, 10)
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((torch.relu(self.a(x)) + torch.tanh(self.b(x))) * torch.sigmoid(self.gate(x)))


ENTRIES = [
    Entry(
        "mlp",
        lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)),
        vectors(2, 8),
        S(12) + S(10),
        larger=vectors(5, 8),
        still=("4.bias",),
    ),
    Entry("mlp_bn_prelu", mlp_bn_prelu, vectors(2, 8), S(12) + S(10), larger=vectors(5, 8), still=("6.bias",)),
    Entry(
        "tied_autoencoder",
        lambda: TiedAutoencoder(9, 12, 7),
        vectors(2, 9),
        S(12) + S(7),
        larger=vectors(5, 9),
        still=("output_bias",),
    ),
    Entry(
        "glu_shared",
        lambda: GatedShared(10, 14),
        vectors(2, 6),
        S(10) + S(14),
        larger=vectors(3, 6),
        still=("head.bias",),
    ),
    Entry("swiglu_rmsnorm", lambda: SwiGLU(10, 14), vectors(2, 6), S(10) + S(14), larger=vectors(2, 5, 6)),
    Entry(
        "siamese",
        Siamese,
        lambda g: (vectors(2, 7)(g), vectors(2, 7)(g)),
        S(12) + S(9),
        larger=lambda g: (vectors(4, 7)(g), vectors(4, 7)(g)),
        still=("head.bias",),
    ),
    Entry(
        "mlp_mixer",
        lambda: Mixer(12, 6, 20, depth=2),
        vectors(2, 3, 8, 8),
        S(12) + 2 * (S(6) + S(20)),
        larger=vectors(5, 3, 8, 8),
        # the token axis is spatial and stays, so the second token bias does too
        still=("head.bias", "blocks.*.tokens.2.bias"),
    ),
    Entry("outer_product_bilinear", HyperLinear, vectors(2, 7), S(11), larger=vectors(3, 7), still=("v", "read.bias")),
    Entry("multi_branch", MultiBranch, vectors(2, 6), S(10), larger=vectors(3, 6), still=("out.bias",)),
]
