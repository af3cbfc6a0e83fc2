"""Attention in its common spellings, hand-written: fused projections, grouped queries, rotary, windows, two towers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, S, grouped_query, heads, tokens, vectors


class Attention(nn.Module):
    """Self-attention; `spelling` says how q, k and v come out of the projection.

    timm:     one linear layer, reshape to (3, heads, dim) and unbind
    chunk:    one linear layer, chunk in three, view as heads
    separate: three linear layers, softmax by hand with an additive mask, einsum over heads
    """

    def __init__(self, dim: int, n_heads: int, unit: int, spelling: str, causal: bool = False) -> None:
        super().__init__()
        self.h, self.unit, self.spelling, self.causal = n_heads, unit, spelling, causal
        inner = n_heads * unit
        if spelling == "separate":
            self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * inner)
        self.out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.spelling == "timm":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.h, self.unit).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = self.qkv(x).chunk(3, dim=-1) if self.spelling == "chunk" else (self.q(x), self.k(x), self.v(x))
            q, k, v = (p.view(b, n, self.h, self.unit).transpose(1, 2) for p in parts)
        if self.spelling == "separate":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(self.unit)
            if self.causal:
                scores = scores + torch.full((n, n), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
            y = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, n, -1)
        return self.out(y)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Class token, learned positions, pre-norm blocks (Dosovitskiy et al. 2021)."""

    def __init__(self, dim: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 5, dim))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """Decoder with learned positions; the read-out is the token embedding."""

    def __init__(self, dim: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, dim), nn.Embedding(8, dim)
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 13, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def sinusoids(length: int, dim: int) -> Tensor:
    angle = torch.arange(length)[:, None] / 100 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Sinusoidal(nn.Module):
    """Fixed sinusoidal positions are added to the stream, which pins it; nn.TransformerEncoderLayer does the rest."""

    def __init__(self, norm_first: bool, positions: bool) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 20, batch_first=True, norm_first=norm_first)
        self.register_buffer("positions", sinusoids(9, 8) if positions else None, persistent=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        return self.head(self.layer(x).mean(1))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with other widths for keys and values, and a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.query = nn.Linear(6, 9), nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, kdim=9, vdim=9, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inp(x))
        y, _ = self.attention(self.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)
        return self.head(y[:, 0])


class RotaryGQA(nn.Module):
    """Grouped-query attention with rotary embeddings (halves rotated), causal, no biases."""

    def __init__(self, dim: int, kv: int, repeat: int, unit: int, rotary: int) -> None:
        super().__init__()
        self.kv, self.repeat, self.unit, self.rotary = kv, repeat, unit, rotary
        self.q, self.k = nn.Linear(dim, kv * repeat * unit, bias=False), nn.Linear(dim, kv * unit, bias=False)
        self.v, self.o = nn.Linear(dim, kv * unit, bias=False), nn.Linear(kv * repeat * unit, dim, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        turned, kept = x[..., : self.rotary], x[..., self.rotary :]
        half = self.rotary // 2
        frequency = 10.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
        angle = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * frequency
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        flipped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
        return torch.cat([turned * cos + flipped * sin, kept], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, self.unit).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t[:, :, None].expand(-1, -1, self.repeat, -1, -1).reshape(b, -1, n, self.unit) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


class TwoTowers(nn.Module):
    """Image and text towers that meet in one normalised space (Radford et al. 2021); logits of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 9)
        )
        self.text, self.project = nn.Embedding(13, 6), nn.Linear(6, 9, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        a = F.normalize(self.image(image), dim=-1)
        b = F.normalize(self.project(torch.tanh(self.text(ids)).mean(1)), dim=-1)
        return self.temperature.exp() * a @ b.t()


class Windows(nn.Module):
    """A Swin block on 2 x 2 windows with relative position bias, then patch merging (Liu et al. 2021)."""

    def __init__(self, dim: int, n_heads: int, unit: int) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.h, self.unit, self.qkv = n_heads, unit, nn.Linear(dim, 3 * n_heads * unit)
        self.out, self.table = nn.Linear(n_heads * unit, dim), nn.Parameter(torch.randn(9, n_heads))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 14), nn.GELU(), nn.Linear(14, dim))
        self.merge = nn.Sequential(nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 11, bias=False))
        self.head = nn.Linear(11, 3)
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        difference = place[:, :, None] - place[:, None, :] + 1
        self.register_buffer("index", difference[0] * 3 + difference[1])

    def attend(self, x: Tensor) -> Tensor:
        b, height, width, c = x.shape
        x = torch.roll(x, (-1, -1), (1, 2))
        x = x.view(b, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, self.h, self.unit).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, self.h).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1) * self.unit**-0.5 + bias).softmax(-1)
        y = self.out((scores @ v).transpose(1, 2).reshape(-1, 4, self.h * self.unit))
        y = y.view(b, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)
        return torch.roll(y, (1, 1), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = x + self.attend(self.norm(x))
        x = x + self.mlp(x)
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.head(self.merge(torch.cat(corners, dim=-1)).mean((1, 2)))


class Conformer(nn.Module):
    """Half-step feed-forward, then a gated depthwise convolution over time (Gulati et al. 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.inp = nn.Linear(6, dim)
        self.ff = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 15), nn.SiLU(), nn.Linear(15, dim))
        self.norm, self.up = nn.LayerNorm(dim), nn.Conv1d(dim, 2 * inner, 1)
        self.depthwise, self.bn = nn.Conv1d(inner, inner, 3, padding=1, groups=inner), nn.BatchNorm1d(inner)
        self.down, self.head = nn.Conv1d(inner, dim, 1), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + 0.5 * self.ff(x)
        y = F.glu(self.up(self.norm(x).transpose(1, 2)), dim=1)
        x = x + self.down(F.silu(self.bn(self.depthwise(y)))).transpose(1, 2)
        return self.head(x)


class LinearAttention(nn.Module):
    """Linear attention with ELU features and a shared query norm (Katharopoulos et al. 2020)."""

    def __init__(self, n_heads: int, unit: int) -> None:
        super().__init__()
        self.h, self.unit = n_heads, unit
        self.q, self.k, self.v = (nn.Linear(6, n_heads * unit) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(unit), nn.Linear(n_heads * unit, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.h, self.unit)) for p in (self.q, self.k, self.v))
        q, k = F.elu(self.norm(q)) + 1, F.elu(k) + 1
        state = torch.einsum("bnhd,bnhe->bhde", k, v)
        y = torch.einsum("bnhd,bhde->bnhe", q, state) / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))[..., None]
        return self.out(y.flatten(2))


def vit(spelling: str) -> nn.Module:
    return ViT(12, [Block(12, Attention(12, 3, 5, spelling), 18)])


def gpt(depth: int) -> nn.Module:
    return GPT(12, [Block(12, Attention(12, 3, 4, "separate", causal=True), 18) for _ in range(depth)])


def rotary(spelled: int) -> nn.Module:
    return GPT(10, [Block(10, RotaryGQA(10, 2, 3, 6, spelled), 18)])


IMAGE, BATCH = vectors(2, 3, 8, 8), vectors(5, 3, 8, 8)
SENTENCE, LONGER = tokens(2, 4, 13), tokens(3, 7, 13)
VIT = S(12) + S(18) + heads(3, 5)
ENCODER = S(20) + heads(2, 4)

ENTRIES = [
    Entry("vit_timm_qkv", lambda: vit("timm"), IMAGE, VIT, larger=BATCH, still=("head.bias",)),
    Entry("vit_chunk_qkv", lambda: vit("chunk"), IMAGE, VIT, larger=BATCH, still=("head.bias",)),
    Entry("vit_separate_qkv", lambda: vit("separate"), IMAGE, VIT, larger=BATCH, still=("head.bias",)),
    Entry("gpt_tied", lambda: gpt(2), SENTENCE, S(12) + 2 * (S(18) + heads(3, 4)), larger=LONGER),
    Entry(
        "gqa_rotary",
        lambda: rotary(6),
        SENTENCE,
        # the rotation tells all query/key units apart: each pair of rows has its own frequency and orientation
        S(10) + S(18) + grouped_query(2, 3, 6),
        larger=LONGER,
    ),
    Entry(
        "gqa_partial_rotary",
        lambda: rotary(2),
        SENTENCE,
        # 2 of the 6 query/key units rotate; the other 4 are free within each key head
        S(10) + S(18) + grouped_query(2, 3, 6, qk=4),
        larger=LONGER,
    ),
    Entry(
        "encoder_layer",
        lambda: Sinusoidal(False, False),
        vectors(2, 4, 6),
        S(8) + ENCODER,
        larger=vectors(3, 7, 6),
        still=("head.bias",),
    ),  # fmt: skip
    Entry(
        "encoder_layer_sinusoids",
        lambda: Sinusoidal(True, True),
        vectors(2, 4, 6),
        # sin(0) = 0 and cos(0) = 1 do not matter: further positions tell all channels of the stream apart
        ENCODER,
        larger=vectors(3, 7, 6),
        still=("inp.*", "layer.norm*", "layer.linear2.bias", "layer.self_attn.out_proj.bias", "head.*"),
    ),
    Entry(
        "cross_attention",
        CrossAttention,
        vectors(2, 4, 6),
        # the query and the output have 8 channels each and are not connected by a residual
        S(9) + 2 * S(8) + heads(2, 4),
        larger=vectors(3, 7, 6),
        still=("head.bias",),
    ),
    Entry(
        "two_towers",
        TwoTowers,
        lambda g: (vectors(2, 3, 6, 6)(g), tokens(3, 4, 13)(g)),
        S(7) + S(6) + S(9),
        larger=lambda g: (vectors(3, 3, 8, 8)(g), tokens(2, 5, 13)(g)),
        still=("temperature",),
    ),
    Entry(
        "swin_windows",
        lambda: Windows(8, 2, 5),
        IMAGE,
        # the four corners of a merged patch carry the same stream, so it moves as blocks in the merging norm
        S(8) + heads(2, 5) + S(14) + S(11),
        larger=vectors(1, 3, 16, 16),
        still=("head.bias",),
    ),
    Entry(
        "conformer",
        lambda: Conformer(8, 10),
        vectors(2, 5, 6),
        S(8) + S(15) + S(10),
        larger=vectors(3, 9, 6),
        still=("head.bias",),
    ),
    Entry(
        "linear_attention_query_norm",
        lambda: LinearAttention(3, 5),
        vectors(2, 4, 6),
        # the norm's weight is shared by the heads: query/key units move in all heads at once
        S(3) + 3 * S(5) + S(5),
        larger=vectors(3, 7, 6),
        still=("out.bias",),
    ),
]
