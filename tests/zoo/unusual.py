"""Modules as people really write them: in-place, parametrised, checkpointed, half precision, masks, dead parts."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .entry import Entry, S, Symmetry, tokens, vectors


class InPlace(nn.Module):
    """In-place activations, sums and writes into slices of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 9, 3, padding=1)
        self.scale, self.head = nn.Parameter(torch.rand(9, 1, 1)), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        y = self.b(x)
        y.mul_(self.scale).tanh_()
        y[:, :, 0] = 0.0
        y[:, :, :, 1:] += x[:, :, :, 1:]
        x += y
        return self.head(x.mean((2, 3)))


class BagOfTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.hidden, self.head = nn.EmbeddingBag(13, 8, mode="mean"), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.bag(ids))))


class Masked(nn.Module):
    """Missing inputs become a learned vector; an additive mask and a masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.missing = nn.Linear(5, 8), nn.Parameter(torch.randn(8))
        self.score, self.head = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        h = torch.where(present[..., None], torch.tanh(self.embed(x)), self.missing)
        bias = torch.zeros_like(x[..., 0]).masked_fill(~present, -4.0)
        weights = (self.score(h)[..., 0] + bias).softmax(-1)
        h = torch.einsum("bn,bnd->bd", weights, h) + (h * present[..., None]).sum(1) / present.sum(
            1, keepdim=True
        ).clamp(min=1)
        return self.head(h)


class Lists(nn.Module):
    """Parameters in lists and dicts, a residual loop, reshapes with -1, and a matrix written with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ParameterList(nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))
        self.parts = nn.ModuleDict({"in": nn.Linear(5, 8), "out": nn.Linear(8 * 3, 2)})
        self.scales = nn.ParameterDict({"s": nn.Parameter(torch.randn(8))})

    def forward(self, x: Tensor) -> Tensor:
        h = self.parts["in"](x)
        for matrix in self.maps:
            h = h + torch.tanh(torch.einsum("bnd,de->bne", h, matrix) * self.scales["s"])
        return self.parts["out"](h.reshape(x.shape[0], -1))


class Statistics(nn.Module):
    """Standardised inputs; a persistent buffer on 10 units, a non-persistent one that tells 7 other units apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 10), nn.Linear(10, 7), nn.Linear(7, 3)
        self.register_buffer("center", torch.randn(10))
        self.register_buffer("fixed", torch.linspace(0.5, 1.5, 7), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.a(x)) - self.center
        return {"hidden": h, "logits": self.head(torch.tanh(self.b(h)) * self.fixed)}


class Dead(nn.Module):
    """A layer that is never used, a result that is thrown away, and columns that are sliced off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused, self.thrown = nn.Linear(5, 12), nn.Linear(5, 6), nn.Linear(5, 6)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.thrown(x)
        return self.head(torch.relu(self.a(x))[:, :9])


class Sign(torch.autograd.Function):
    """Sign with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Binary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Sign.apply(self.a(x)) * torch.tanh(self.a(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 10), nn.GELU(), nn.Dropout(0.5), nn.Linear(10, 8), nn.SELU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Fourier(nn.Module):
    """Mixes the tokens by a Fourier transform along the sequence; channels stay alike."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + torch.fft.fft(x, dim=1).real
        return self.head(x + self.down(torch.relu(self.up(x))))


class Preallocated(nn.Module):
    """Writes each step into a buffer made beforehand, as loops over time often do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        out = torch.zeros_like(h)
        state = h[:, 0]
        for t in range(h.shape[1]):
            state = torch.tanh(self.mix(state)) + h[:, t]
            out[:, t] = state
        return self.head(out)


def spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(6, 10)), nn.ReLU(), norm(nn.Linear(10, 9)), nn.ReLU(), nn.Linear(9, 3))


def weight_norm_hooks() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 10)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(10, 3)))


def half_precision() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 3)).to(torch.bfloat16)


def presence(batch: int, length: int) -> Any:
    def make(g: torch.Generator) -> tuple[Tensor, Tensor]:
        present = torch.rand(batch, length, generator=g) < 0.7
        present[:, 0] = True
        return torch.randn(batch, length, 5, generator=g), present

    return make


ENTRIES = [
    Entry("in_place", InPlace, vectors(2, 3, 6, 6), S(9), larger=vectors(3, 3, 8, 8), still=("head.bias",)),
    Entry("spectral_norm", spectral, vectors(2, 6), S(10) + S(9), larger=vectors(4, 6), still=("4.bias",)),
    # the magnitudes of the last layer belong to outputs
    Entry(
        "weight_norm_hooks",
        weight_norm_hooks,
        vectors(2, 6),
        S(10),
        larger=vectors(4, 6),
        still=("2.bias", "2.weight_g"),
    ),
    Entry("half_precision", half_precision, lambda g: vectors(2, 6)(g).bfloat16(), S(10), still=("3.bias",)),
    Entry("embedding_bag", BagOfTokens, tokens(3, 4, 13), S(8) + S(6), larger=tokens(2, 6, 13), still=("head.bias",)),
    Entry("masked", Masked, presence(2, 4), S(8), larger=presence(3, 6), still=("score.bias", "head.bias")),
    Entry("lists", Lists, vectors(2, 3, 5), S(8), larger=vectors(4, 3, 5), still=("parts.out.bias",)),
    Entry(
        "buffers_and_dict",
        Statistics,
        vectors(2, 5),
        S(10),
        larger=vectors(4, 5),
        still=("b.bias", "head.*"),
        outputs="logits",
    ),
    # the 3 columns that are sliced off would be free too, but nobody sees them
    Entry(
        "dead_parts", Dead, vectors(2, 5), S(9), still=("unused.*", "thrown.*", "head.bias"), still_entries=3 * 5 + 3
    ),
    Entry("autograd_function", Binary, vectors(2, 5), S(10), larger=vectors(4, 5), still=("b.bias",)),
    Entry("checkpointed", Checkpointed, vectors(2, 5), S(10) + S(8), larger=vectors(4, 5), still=("head.bias",)),
    Entry("fourier_tokens", Fourier, vectors(2, 4, 5), S(8) + S(12), larger=vectors(3, 7, 5), still=("head.bias",)),
    Entry("preallocated", Preallocated, vectors(2, 3, 5), S(8), larger=vectors(3, 5, 5), still=("head.bias",)),
    Entry("nothing_to_move", lambda: nn.Linear(5, 3), vectors(2, 5), Symmetry(), still=("*",)),
]
