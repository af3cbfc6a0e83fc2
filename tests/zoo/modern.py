"""Ideas from many corners: adapters, sets, latents, graphs, hypernetworks, capsules, state spaces, diffusion."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, S, heads, vectors


class LowRank(nn.Module):
    """A linear layer plus a low-rank adapter (Hu et al. 2022): the units of the rank may be exchanged too."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(6, 10), nn.Linear(10, 3)
        self.down, self.up = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base(x) + 0.5 * (x @ self.down.t()) @ self.up.t()))


class Maxout(nn.Module):
    """The maximum over the pieces of each unit (Goodfellow et al. 2013)."""

    def __init__(self, units: int, pieces: int) -> None:
        super().__init__()
        self.units, self.pieces = units, pieces
        self.lift, self.head = nn.Linear(6, units * pieces), nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lift(x).view(-1, self.units, self.pieces).amax(-1))


class WaveNet(nn.Module):
    """Gated dilated convolutions with residual and skip paths (van den Oord et al. 2016)."""

    def __init__(self, stream: int, gate: int, skip: int) -> None:
        super().__init__()
        self.inp = nn.Conv1d(2, stream, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(stream, 2 * gate, 2, dilation=2**i) for i in range(2))
        self.residual = nn.ModuleList(nn.Conv1d(gate, stream, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(gate, skip, 1) for _ in range(2))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 9, 1), nn.ReLU(), nn.Conv1d(9, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), torch.zeros((), dtype=x.dtype, device=x.device)
        for i in range(2):
            filtered, gate = self.dilated[i](F.pad(x, (2**i, 0))).chunk(2, dim=1)
            y = torch.tanh(filtered) * torch.sigmoid(gate)
            x, total = x + self.residual[i](y), total + self.skip[i](y)
        return self.out(total)


class PointNet(nn.Module):
    """A shared network on points with a predicted transform of the features, then a maximum (Qi et al. 2017)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.k = features
        self.lift, self.wide = nn.Conv1d(3, features, 1), nn.Conv1d(features, 12, 1)
        self.transform = nn.Sequential(nn.Linear(features, 11), nn.ReLU(), nn.Linear(11, features * features))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.lift(x))
        matrix = self.transform(x.amax(-1)).view(-1, self.k, self.k)
        x = torch.bmm(matrix, x)
        return self.head(torch.relu(self.wide(x)).amax(-1))


class Perceiver(nn.Module):
    """Learned latents attend to the inputs and are averaged (Jaegle et al. 2021): latents may be exchanged."""

    def __init__(self, latents: int, dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.inp = nn.Linear(5, dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.o(F.scaled_dot_product_attention(self.q(z), self.k(x), self.v(x)))
        return self.head(self.norm(z).mean(1))


class ALiBi(nn.Module):
    """Each head has its own fixed slope over distances (Press et al. 2022), so heads stay; the units in them do not."""

    def __init__(self, n_heads: int, unit: int) -> None:
        super().__init__()
        self.h, self.unit = n_heads, unit
        self.qkv, self.out = nn.Linear(6, 3 * n_heads * unit), nn.Linear(n_heads * unit, 3)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, n_heads + 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.h, self.unit)).permute(2, 0, 3, 1, 4)
        place = torch.arange(n, device=x.device)
        bias = -self.slopes[:, None, None] * (place[:, None] - place[None]).abs()
        y = (q @ k.mT / math.sqrt(self.unit) + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class TalkingHeads(nn.Module):
    """Heads are mixed before and after the softmax (Shazeer et al. 2020), with a learned temperature per mixed head."""

    def __init__(self, before: int, middle: int, after: int, unit: int) -> None:
        super().__init__()
        self.unit, self.before, self.after = unit, before, after
        self.q, self.k, self.v = nn.Linear(6, before * unit), nn.Linear(6, before * unit), nn.Linear(6, after * unit)
        self.mix, self.remix = nn.Parameter(torch.randn(before, middle)), nn.Parameter(torch.randn(middle, after))
        self.temperature, self.out = nn.Parameter(torch.rand(middle, 1, 1)), nn.Linear(after * unit, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (p(x).unflatten(-1, (self.before, self.unit)) for p in (self.q, self.k))
        v = self.v(x).unflatten(-1, (self.after, self.unit))
        scores = torch.einsum("bqhd,bkhd,hm->bmqk", F.normalize(q, dim=-1), F.normalize(k, dim=-1), self.mix)
        weights = torch.einsum("bmqk,mn->bnqk", (scores * self.temperature).softmax(-1), self.remix)
        return self.out(torch.einsum("bnqk,bknd->bqnd", weights, v).flatten(2))


class Graph(nn.Module):
    """Messages along a list of edges, summed at their targets by index (Gilmer et al. 2017)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inp, self.message, self.update = nn.Linear(4, dim), nn.Linear(2 * dim, 11), nn.GRUCell(11, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        for _ in range(2):
            messages = torch.relu(self.message(torch.cat([h[edges[0]], h[edges[1]]], dim=-1)))
            total = torch.zeros(h.shape[0], 11, dtype=h.dtype, device=h.device).index_add(0, edges[1], messages)
            h = self.update(total, h)
        return self.head(h)


class Variational(nn.Module):
    """Encoder with mean and log-variance in one layer; the noise is an input (Kingma and Welling 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2 * 4))
        self.decode = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encode(x).chunk(2, dim=-1)
        return self.decode(mean + 0.3 * torch.exp(0.5 * log_variance))


class HyperNetwork(nn.Module):
    """One network makes the weights of another (Ha et al. 2017)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.make = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, hidden * 5 + hidden * 2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        first, second = self.make(condition).split([self.hidden * 5, self.hidden * 2], dim=-1)
        h = torch.relu(torch.einsum("bi,bhi->bh", x, first.view(-1, self.hidden, 5)))
        return torch.einsum("bh,bho->bo", h, second.view(-1, self.hidden, 2))


class Diffusion(nn.Module):
    """A residual block with group norm, scale and shift from a time embedding, then attention over pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inp = nn.Conv2d(3, channels, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, 10, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(4, 7), nn.SiLU(), nn.Linear(7, 20))
        self.norm2, self.conv2 = nn.GroupNorm(5, 10), nn.Conv2d(10, channels, 3, padding=1)
        self.qkv, self.proj = nn.Conv1d(channels, 3 * 6, 1), nn.Conv1d(6, channels, 1)
        self.out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.inp(x)
        angle = t[:, None] * torch.tensor([1.0, 0.1], device=t.device, dtype=t.dtype)
        scale, shift = self.time(torch.cat([angle.sin(), angle.cos()], -1))[:, :, None, None].chunk(2, dim=1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        x = x + self.conv2(F.silu(y))
        q, k, v = self.qkv(x.flatten(2)).chunk(3, dim=1)
        weights = torch.einsum("bcq,bck->bqk", q, k).softmax(-1)
        return self.out(x + self.proj(torch.einsum("bqk,bck->bcq", weights, v)).view_as(x))


class RepVGG(nn.Module):
    """3 x 3, 1 x 1 and identity in parallel, each normalised, added (Ding et al. 2021); weights standardised."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.stem, self.three, self.one = nn.Conv2d(3, c, 3), nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(3)), nn.Linear(c, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        weight = self.three.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-3)
        parts = (F.conv2d(x, weight, self.three.bias, padding=1), self.one(x), x)
        x = torch.relu(sum(norm(part) for norm, part in zip(self.norms, parts, strict=True)))
        return self.head(x.mean((2, 3)))


class BlurPool(nn.Module):
    """Downsampling by the same fixed blur on every channel (Zhang 2019): a constant that tells no channel apart."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, c, 3), nn.Linear(c, 4)
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (line[:, None] * line / 16).repeat(c, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(F.conv2d(x, self.blur, stride=2, groups=x.shape[1]).mean((2, 3)))


class Patches(nn.Module):
    """Convolution spelled as unfold and a linear layer: channels are blocks of 9 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear, self.head = nn.Conv2d(3, 7, 1), nn.Linear(63, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(torch.relu(self.stem(x)), 3).transpose(1, 2)
        return self.head(torch.relu(self.linear(columns)).mean(1))


class Radiance(nn.Module):
    """Sines of the inputs, a skip that concatenates the input again, two read-outs (Mildenhall et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(22, 9)
        self.density, self.color = nn.Linear(9, 1), nn.Linear(9 + 3, 3)

    def forward(self, x: Tensor, direction: Tensor) -> Tensor:
        x = torch.cat([torch.sin(x * 2**i) for i in range(4)], dim=-1)
        h = torch.relu(self.b(torch.cat([torch.relu(self.a(x)), x], dim=-1)))
        return torch.cat([self.density(h), torch.sigmoid(self.color(torch.cat([h, direction], -1)))], dim=-1)


class Capsules(nn.Module):
    """Two rounds of routing between capsules (Sabour et al. 2017); the output is the length of each capsule."""

    def __init__(self, n: int, n_in: int, n_out: int, unit: int) -> None:
        super().__init__()
        self.n, self.n_in, self.inp = n, n_in, nn.Linear(6, n * n_in)
        self.weight = nn.Parameter(torch.randn(n, n_out, n_in, unit))

    def forward(self, x: Tensor) -> Tensor:
        u = F.normalize(self.inp(x).view(-1, self.n, self.n_in), dim=-1)
        votes = torch.einsum("bid,iodk->biok", u, self.weight)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            capsule = torch.tanh((logits.softmax(2)[..., None] * votes).sum(1))
            logits = logits + (votes * capsule[:, None]).sum(-1)
        return capsule.square().sum(-1)


class LatentAttention(nn.Module):
    """Keys and values from a shared low-rank state (DeepSeek-AI 2024, without rotary part)."""

    def __init__(self, n_heads: int, unit: int, rank: int) -> None:
        super().__init__()
        self.h, self.unit = n_heads, unit
        self.q, self.down, self.norm = nn.Linear(6, n_heads * unit), nn.Linear(6, rank), nn.LayerNorm(rank)
        self.up, self.out = nn.Linear(rank, 2 * n_heads * unit), nn.Linear(n_heads * unit, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.h, self.unit).transpose(1, 2)
        kv = self.up(self.norm(self.down(x))).view(b, n, self.h, 2 * self.unit).transpose(1, 2)
        k, v = kv.split([self.unit, self.unit], dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))


def two(a: tuple[int, ...], b: tuple[int, ...]) -> Any:
    return lambda g: (torch.randn(a, generator=g), torch.randn(b, generator=g))


def graph(nodes: int, edges: int) -> Any:
    return lambda g: (torch.randn(nodes, 4, generator=g), torch.randint(0, nodes, (2, edges), generator=g))


ENTRIES = [
    Entry("low_rank_adapter", LowRank, vectors(2, 6), S(10) + S(4), larger=vectors(4, 6), still=("head.bias",)),
    Entry("maxout", lambda: Maxout(7, 3), vectors(2, 6), S(7) + 7 * S(3), larger=vectors(4, 6), still=("head.bias",)),
    Entry(
        "wavenet",
        lambda: WaveNet(6, 7, 8),
        vectors(2, 2, 8),
        S(6) + 2 * S(7) + S(8) + S(9),
        larger=vectors(3, 2, 13),
        # nothing reads the last residual
        still=("residual.1.*", "out.3.bias"),
    ),
    Entry(
        "pointnet_transform",
        lambda: PointNet(5),
        vectors(2, 3, 6),
        # the predicted matrix maps the features to new ones, which have an order of their own
        S(5) + S(5) + S(11) + S(12),
        larger=vectors(3, 3, 9),
        still=("head.bias",),
    ),
    Entry(
        "perceiver_latents",
        lambda: Perceiver(7, 8),
        vectors(2, 4, 5),
        S(7) + 4 * S(8),
        larger=vectors(3, 6, 5),
        still=("head.bias",),
    ),
    Entry("alibi", lambda: ALiBi(3, 4), vectors(2, 4, 6), 3 * 2 * S(4), larger=vectors(3, 7, 6), still=("out.bias",)),
    Entry(
        "talking_heads",
        lambda: TalkingHeads(2, 3, 4, 5),
        vectors(2, 4, 6),
        # heads of the scores with their query/key units, mixed heads, heads of the values with their units
        S(2) + 2 * S(5) + S(3) + S(4) + 4 * S(5),
        larger=vectors(3, 7, 6),
        still=("out.bias",),
    ),
    Entry("graph_messages", lambda: Graph(8), graph(5, 9), S(8) + S(11), larger=graph(7, 15), still=("head.bias",)),
    Entry(
        "variational", Variational, vectors(2, 6), S(10) + S(4) + S(9), larger=vectors(4, 6), still=("decode.2.bias",)
    ),
    Entry("hypernetwork", lambda: HyperNetwork(6), two((2, 5), (2, 3)), S(8) + S(6), larger=two((4, 5), (4, 3))),
    Entry(
        "diffusion_block",
        lambda: Diffusion(8),
        two((2, 3, 4, 4), (2,)),
        # 2 groups of 4 in the stream, 5 groups of 2 inside, time, query/key and value units of the one head
        S(2) + 2 * S(4) + S(5) + 5 * S(2) + S(7) + 2 * S(6),
        larger=two((3, 3, 6, 6), (3,)),
        still=("out.bias",),
    ),
    Entry(
        "repvgg_standardised",
        lambda: RepVGG(9),
        vectors(2, 3, 7, 7),
        S(9),
        larger=vectors(3, 3, 9, 9),
        still=("head.bias",),
    ),
    Entry(
        "blur_pool", lambda: BlurPool(9), vectors(2, 3, 8, 8), S(9), larger=vectors(3, 3, 12, 12), still=("head.bias",)
    ),
    Entry(
        "unfolded_patches", Patches, vectors(2, 3, 5, 5), S(7) + S(10), larger=vectors(3, 3, 7, 7), still=("head.bias",)
    ),
    Entry(
        "radiance_field",
        Radiance,
        two((2, 3), (2, 3)),
        S(10) + S(9),
        larger=two((4, 3), (4, 3)),
        still=("density.bias", "color.bias"),
        still_entries=3 * 3,  # the colour's columns for the direction
    ),
    Entry(
        "capsules",
        lambda: Capsules(5, 4, 3, 6),
        vectors(2, 6),
        # input capsules and the units within each; the units of each output capsule, whose order is its own
        S(5) + 5 * S(4) + 3 * S(6),
        larger=vectors(4, 6),
        found=S(5) + S(4) + S(6),
        short="units of single capsules; those that all capsules permute alike are found",
    ),
    Entry(
        "latent_attention",
        lambda: LatentAttention(3, 4, 7),
        vectors(2, 4, 6),
        S(7) + heads(3, 4),
        larger=vectors(3, 7, 6),
        still=("out.bias",),
    ),
]
