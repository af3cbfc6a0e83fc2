"""A small vision transformer (Dosovitskiy et al. 2020)."""

import torch
from torch import Tensor, nn

from lmc.errors import InputError
from lmc.models.layers import blocks, check_sizes


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
