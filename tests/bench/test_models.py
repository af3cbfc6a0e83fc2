"""`lmc.models`: shapes, names, export, and the symmetries that each architecture is built to have."""

import pytest
import torch
from torch import nn

import lmc.models
from lmc.errors import InputError

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
COLOUR = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(10).reshape(2, 5) % 7

CASES = {
    "mlp": (lambda: lmc.models.mlp(64, [16, 12], 10), IMAGES.flatten(1), (3, 10)),
    "mlp, images": (lambda: lmc.models.mlp(64, [16], 10, activation="tanh", norm="layer"), IMAGES, (3, 10)),
    "mlp, batch norm": (lambda: lmc.models.mlp(64, [16], 10, norm="batch"), IMAGES.flatten(1), (3, 10)),
    "cnn": (lambda: lmc.models.cnn((4, 6)), IMAGES, (3, 10)),
    "vgg11": (lambda: lmc.models.vgg(1 / 16, image=(1, 8, 8)), IMAGES, (3, 10)),
    "vgg16": (lambda: lmc.models.vgg(1 / 16, config="vgg16", norm="layer", classes=7), COLOUR, (2, 7)),
    "resnet20": (lambda: lmc.models.resnet20(1, in_channels=1), IMAGES, (3, 10)),
    "resnet20, layer norm": (lambda: lmc.models.resnet20(1, norm="layer"), COLOUR, (2, 10)),
    "vit": (lambda: lmc.models.vit(dim=12, depth=2, heads=3), IMAGES, (3, 10)),
    "vit, fused": (lambda: lmc.models.vit(dim=8, depth=1, heads=2, fused_qkv=True), IMAGES, (3, 10)),
    "gpt": (lambda: lmc.models.gpt(7, 6, dim=8, depth=2, heads=2), TOKENS, (2, 5, 7)),
    "gpt, tied": (lambda: lmc.models.gpt(7, 5, dim=8, depth=1, heads=2, tied=True, fused_qkv=True), TOKENS, (2, 5, 7)),
}


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        make, inputs, shape = CASES[name]
        return make().eval(), inputs, shape


@pytest.mark.parametrize("name", CASES)
def test_exports_and_gives_logits(name):
    model, inputs, shape = build(name)
    exported = torch.export.export(model, (inputs,), strict=False).module()
    with torch.no_grad():
        expected = model(inputs)
        assert expected.shape == shape
        torch.testing.assert_close(exported(inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_every_own_parameter_can_be_reset(name):
    model, _, _ = build(name)
    for layer in model.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            assert callable(getattr(layer, "reset_parameters", None)), type(layer).__name__


def test_names():
    names = {name: list(build(name)[0].state_dict()) for name in CASES}
    assert names["mlp"] == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "head.weight", "head.bias"]
    assert names["mlp, batch norm"][2:4] == ["norm1.weight", "norm1.bias"]
    assert names["vgg11"][:2] == ["conv1.weight", "norm1.weight"] and names["vgg11"][-4] == "fc.weight"
    assert {"stage1.block1.conv1.weight", "stage2.block1.shortcut.conv.weight"} <= set(names["resnet20"])
    assert "stage1.block1.shortcut.conv.weight" not in names["resnet20"]
    assert {"class_token", "position", "blocks.2.attention.q.weight", "blocks.1.fc2.bias"} <= set(names["vit"])
    assert "blocks.1.attention.qkv.weight" in names["vit, fused"]
    assert names["gpt"][0] == "token.weight" and names["gpt"][-1] == "head.weight"


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_are_those_of_the_papers():
    # He et al. 2015: 0.27 M with identity shortcuts; two projections (16*32 + 2*32, 32*64 + 2*64) come on top
    assert count(lmc.models.resnet20(1)) == 269_722 + (512 + 64) + (2048 + 128)
    assert lmc.models.resnet20(4).head.in_features == 256
    convolutions = [m for m in lmc.models.vgg(1.0, config="vgg16").modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13 and sum(m.weight.numel() for m in convolutions) == 14_710_464
    assert count(lmc.models.mlp(784, [512, 512, 512], 10)) == 784 * 512 + 2 * 512 * 512 + 3 * 512 + 512 * 10 + 10


@pytest.mark.parametrize(("image", "pixels"), [((1, 8, 8), 4), ((3, 32, 32), 4), ((1, 28, 28), 9), ((1, 6, 4), 6)])
def test_vgg_always_flattens_several_pixels(image, pixels):
    model = lmc.models.vgg(1 / 16, image=image)
    assert model.fc.in_features == 32 * pixels
    assert model.eval()(torch.zeros(1, *image)).shape == (1, 10)


def permute_rows(layer, order):
    layer.weight.data = layer.weight.data[order]
    if layer.bias is not None:
        layer.bias.data = layer.bias.data[order]


@pytest.mark.parametrize("name", ["vit", "vit, fused", "gpt"])
def test_attention_heads_are_blocks_of_rows(name):
    """Swapping the first two heads, and two units of the values in one, moves blocks of rows and leaves the outputs."""
    model, inputs, _ = build(name)
    with torch.no_grad():
        before = model(inputs)
        for block in model.blocks.values():
            attention = block.attention
            dim, size = attention.o.in_features, attention.o.in_features // attention.heads
            heads = [1, 0, *range(2, attention.heads)]
            order = torch.cat([torch.arange(h * size, (h + 1) * size) for h in heads])
            values = order.clone()
            values[[0, 1]] = order[[1, 0]]
            if attention.fused:
                permute_rows(attention.qkv, torch.cat([order, dim + order, 2 * dim + values]))
            else:
                permute_rows(attention.q, order)
                permute_rows(attention.k, order)
                permute_rows(attention.v, values)
            attention.o.weight.data = attention.o.weight.data[:, values]
        torch.testing.assert_close(model(inputs), before)


def test_gpt_does_not_look_ahead():
    model, tokens, _ = build("gpt")
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert float((after[:, 3:] - before[:, 3:]).abs().min(dim=-1).values.max()) > 1e-6


def test_tied_gpt_shares_one_tensor():
    model, _, _ = build("gpt, tied")
    assert model.head.weight is model.token.weight
    assert "head.weight" in model.state_dict() and "head.weight" not in dict(model.named_parameters())


def test_channel_norm_normalises_each_pixel():
    norm = lmc.models.resnet20(1, norm="layer").norm1.requires_grad_(False)
    out = norm(torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1)) * 5 + 3)
    assert float(out.mean(dim=1).abs().max()) < 1e-5 and float((out.var(dim=1, unbiased=False) - 1).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lmc.models.mlp(64, [0], 10), r"hidden\[0\]=0"),
        (lambda: lmc.models.mlp(64, [4], 10, activation="step"), "activation='step': expected one of 'relu', 'gelu'"),
        (lambda: lmc.models.mlp(64, [4], 10, norm="group"), "norm='group': expected one of 'layer', 'batch'"),
        (lambda: lmc.models.cnn((4, 4, 4, 4)), "too small for 4 poolings"),
        (lambda: lmc.models.vgg(config="vgg12"), "config='vgg12'"),
        (lambda: lmc.models.vgg(image=(3, 1, 8)), "at least 2x2"),
        (lambda: lmc.models.vgg(0.001), "narrowest_stage=0"),
        (lambda: lmc.models.resnet20(width=0), "width=0"),
        (lambda: lmc.models.resnet20(norm="none"), "norm='none'"),
        (lambda: lmc.models.vit(patch=3), "does not divide into patches of 3x3"),
        (lambda: lmc.models.vit(dim=10, heads=4), "dim=10 does not divide into heads=4"),
        (lambda: lmc.models.gpt(7, 0), "context=0"),
        (
            lambda: build("gpt")[0](torch.zeros(1, 7, dtype=torch.long)),
            "axis 1 has length 7, this model's context is 6",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
