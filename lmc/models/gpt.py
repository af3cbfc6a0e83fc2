"""A small causal language model (Radford et al. 2019), for characters or any other small vocabulary."""

import torch
from torch import Tensor, nn

from lmc.errors import InputError
from lmc.models.layers import blocks, check_sizes


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
