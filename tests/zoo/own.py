"""The architectures of `lmc.models`."""

from lmc import models

from .entry import Entry, S, heads, tokens, vectors

STAGES = S(16) + S(32) + S(64)

ENTRIES = [
    Entry(
        "lmc_mlp",
        lambda: models.mlp(8, [12, 10], 4, norm="layer"),
        vectors(2, 8),
        S(12) + S(10),
        larger=vectors(5, 8),
        still=("head.bias",),
    ),
    Entry(
        "lmc_vgg11",
        lambda: models.vgg(1 / 16, image=(3, 8, 8)),
        vectors(2, 3, 8, 8),
        # convolutions of 4, 8, 16 16, 32 32, 32 32 channels and a dense layer of 32
        S(4) + S(8) + 2 * S(16) + 4 * S(32) + S(32),
        larger=vectors(3, 3, 8, 8),
        still=("head.bias",),
    ),
    # the stream of each stage, and the inner channels of its three blocks
    Entry(
        "lmc_resnet20",
        lambda: models.resnet20(),
        vectors(2, 3, 8, 8),
        4 * STAGES,
        larger=vectors(1, 3, 12, 12),
        still=("head.bias",),
    ),
    Entry(
        "lmc_resnet20_layer",
        lambda: models.resnet20(norm="layer"),
        vectors(2, 3, 8, 8),
        4 * STAGES,
        larger=vectors(1, 3, 12, 12),
        still=("head.bias",),
    ),
    Entry(
        "lmc_vit",
        lambda: models.vit((1, 8, 8), dim=16, depth=2, heads=4, fused_qkv=True),
        vectors(2, 1, 8, 8),
        S(16) + 2 * (S(64) + heads(4, 4)),
        larger=vectors(3, 1, 8, 8),
        still=("head.bias",),
    ),
    Entry(
        "lmc_gpt",
        lambda: models.gpt(13, 8, dim=16, depth=1, heads=2, tied=True),
        tokens(2, 4, 13),
        S(16) + S(64) + heads(2, 8),
        larger=tokens(3, 7, 13),
    ),
]
