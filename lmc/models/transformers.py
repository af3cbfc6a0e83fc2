"""Pre-norm attention blocks, and what is made of them: a small causal language model (Radford et al. 2019), for characters
or any other small vocabulary, and a small vision transformer (Dosovitskiy et al. 2020)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmc.errors import InputError
from lmc.models.layers import check_sizes


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


class GPT(nn.Module):
    """Token and position embeddings, causal pre-norm `blocks`, `norm`, and `head` at every position.

    Token numbers `(N, T)` -> logits `(N, T, vocabulary)`, T at most `context`.
    """

    def __init__(self, vocabulary: int, context: int, dim: int, layers: nn.ModuleDict, tied: bool):
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = layers
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings and head from N(0, 0.02²), as in GPT-2; the blocks look after themselves."""
        for layer in (self.token, self.position, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length, context = tokens.shape[1], self.position.num_embeddings
        if length > context:
            raise InputError(f"tokens: axis 1 has length {length}, this model's context is {context}")
        hidden = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        for block in self.blocks.values():
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def gpt(
    vocabulary: int,
    context: int,
    *,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    hidden: int | None = None,
    tied: bool = False,
    fused_qkv: bool = False,
) -> GPT:
    """A `GPT` over `vocabulary` tokens and at most `context` positions.

    `hidden`: width of the dense layer in each block (default `4 dim`); `tied`: `head` shares the token embedding;
    `fused_qkv`: one linear map `qkv` in place of `q`, `k` and `v`. Raises `InputError` when `dim` does not divide
    into heads.
    """
    check_sizes(vocabulary=vocabulary, context=context)
    return GPT(vocabulary, context, dim, blocks(depth, dim, heads, hidden, causal=True, fused=fused_qkv), tied)


class ViT(nn.Module):
    """Patches and a class token with learned positions, pre-norm `blocks`, `norm`, and `head` on the class token.

    Images `(N, C, H, W)` -> logits `(N, classes)`.
    """

    def __init__(self, image: tuple[int, int, int], patch: int, dim: int, layers: nn.ModuleDict, classes: int):
        super().__init__()
        channels, height, width = image
        self.patch = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + (height // patch) * (width // patch), dim))
        self.blocks = layers
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class token and positions from N(0, 0.02²); the layers within look after themselves."""
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)  # (N, patches, dim)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.position
        for block in self.blocks.values():
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


def vit(
    image: tuple[int, int, int] = (1, 8, 8),
    *,
    patch: int = 2,
    dim: int = 32,
    depth: int = 2,
    heads: int = 4,
    hidden: int | None = None,
    classes: int = 10,
    fused_qkv: bool = False,
) -> ViT:
    """A `ViT` for images of shape `image` (C, H, W), cut into `patch` x `patch` squares.

    `hidden`: width of the dense layer in each block (default `4 dim`); `fused_qkv`: one linear map `qkv` in place of
    `q`, `k` and `v`. Raises `InputError` when the image does not divide into patches, or `dim` into heads.
    """
    check_sizes(patch=patch, classes=classes)
    _, height, width = image
    if height % patch or width % patch:
        raise InputError(f"image={tuple(image)} does not divide into patches of {patch}x{patch}")
    return ViT(image, patch, dim, blocks(depth, dim, heads, hidden, causal=False, fused=fused_qkv), classes)
