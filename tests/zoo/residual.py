"""Residual, depthwise and grouped convolutional networks: streams, shortcuts, channel shuffle, squeeze-and-excite."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convnets import IMAGE, LARGER, conv_bn
from .entry import Entry, S, vectors


def norm_layer(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(1, channels)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; the shortcut is the identity, a projection, or padded (option A of He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str, pad: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), norm_layer(norm, c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), norm_layer(norm, c_out)
        self.pad = (c_out - c_in) // 2 if pad else 0
        if c_in != c_out and not pad:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm_layer(norm, c_out))
        elif c_in == c_out:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else self.shortcut(x)
        return F.relu(y + skip)


class ResNet(nn.Module):
    """Three stages of `blocks` basic blocks at widths w, 2w, 4w."""

    def __init__(self, w: int, blocks: int, norm: str = "batch", pad: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, w, 3, 1, 1, bias=False), norm_layer(norm, w), nn.ReLU())
        layers, c_in = [], w
        for stage in range(3):
            for i in range(blocks):
                c_out = w * 2**stage
                layers.append(BasicBlock(c_in, c_out, 2 if stage and not i else 1, norm, pad))
                c_in = c_out
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4 * w, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (maybe grouped: ResNeXt), 1 x 1, maybe squeeze-and-excite."""

    def __init__(self, c_in: int, mid: int, c_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = conv_bn(c_in, mid, 1), conv_bn(mid, mid, 3, groups=groups, stride=stride)
        self.c = nn.Sequential(nn.Conv2d(mid, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.shortcut = nn.Identity()
        if c_in != c_out or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(self.b(self.a(x))) + self.shortcut(x))


def bottleneck_net(groups: int = 1) -> nn.Module:
    """Stem 7; a stage of width 12 with two blocks, a stage of width 16 with one."""
    return nn.Sequential(
        conv_bn(3, 7, 3), nn.MaxPool2d(3, 2, 1), Bottleneck(7, 6, 12, groups=groups), Bottleneck(12, 6, 12,
        groups=groups),
        Bottleneck(12, 8, 16, stride=2, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are brought to mean 0 and variance 1 (Qiao et al. 2019), as one row each."""

    def forward(self, x: Tensor) -> Tensor:
        rows = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(
            x, rows.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


def standardised_groups() -> nn.Module:
    middle = [StandardisedConv2d(6, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


class ConvMixer(nn.Module):
    """Depthwise with residual, then pointwise (Trockman and Kolter 2022)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(3, dim, 2, 2), nn.GELU(), nn.BatchNorm2d(dim))
        self.depthwise = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))
            for _ in range(depth)
        )
        self.pointwise = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim)) for _ in range(depth)
        )
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = pointwise(x + depthwise(x))
        return self.head(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, optionally squeeze-and-excite, project; residual when the widths agree."""

    def __init__(self, c_in: int, expanded: int, c_out: int, squeeze: int = 0) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_bn(c_in, expanded, 1), conv_bn(expanded, expanded, 3, groups=expanded)
        self.project = nn.Sequential(nn.Conv2d(expanded, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.squeeze = (
            nn.Sequential(nn.Conv2d(expanded, squeeze, 1), nn.SiLU(), nn.Conv2d(squeeze, expanded, 1), nn.Sigmoid())
            if squeeze
            else None
        )
        self.residual = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.squeeze is not None:
            y = y * self.squeeze(F.adaptive_avg_pool2d(y, 1))
        y = self.project(y)
        return x + y if self.residual else y


def mobilenet() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 7), InvertedResidual(7, 14, 6), InvertedResidual(6, 12, 6), conv_bn(6, 15, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(15, 5),
    )  # fmt: skip


def efficientnet() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 7), InvertedResidual(7, 14, 7, squeeze=4), conv_bn(7, 15, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(15, 5),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, channel shuffle, depthwise 3 x 3, grouped 1 x 1, residual (Zhang et al. 2018)."""

    def __init__(self, channels: int, mid: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.a, self.b = conv_bn(channels, mid, 1, groups=groups), conv_bn(mid, mid, 3, groups=mid)
        self.c = nn.Sequential(nn.Conv2d(mid, channels, 1, groups=groups, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        y = y.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return F.relu(x + self.c(self.b(y)))


class ShuffleV2(nn.Module):
    """Half of the channels passes through, the other half is convolved; then they are interleaved (Ma et al. 2018)."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.stem, self.branch = conv_bn(3, 2 * half), nn.Sequential(conv_bn(half, 9, 1), conv_bn(9, half, 1))
        self.head = nn.Linear(2 * half, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.stem(x).chunk(2, dim=1)
        x = F.channel_shuffle(torch.cat([kept, self.branch(worked)], dim=1), 2)
        return self.head(x.mean((2, 3)))


def shuffle_net(units: int) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8),
        *(ShuffleUnit(8, 12, 2) for _ in range(units)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class WideDepthwise(nn.Module):
    """A depthwise convolution with multiplier 3: each input channel makes 3 output channels, alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.head = conv_bn(3, 5), nn.Conv2d(5, 15, 3, groups=5), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.depth(self.stem(x))).mean((2, 3)))


SHORT = "the exchange of the stream's groups, which exchanges both indices of the middle cells"
STREAMS = S(4) + S(8) + S(16)

ENTRIES = [
    Entry("resnet20_batch", lambda: ResNet(4, 3), IMAGE, STREAMS + 3 * STREAMS, larger=LARGER, still=("head.bias",)),
    Entry(
        "resnet20_layer",
        lambda: ResNet(4, 3, "layer"),
        IMAGE,
        STREAMS + 3 * STREAMS,
        larger=LARGER,
        still=("head.bias",),
    ),
    Entry(
        "resnet_option_a",
        lambda: ResNet(4, 2, pad=True),
        IMAGE,
        # the first stage's 4 channels stay in the stream; the padding adds 4, then 8 new ones that start as zero
        S(4) + S(4) + S(8) + 2 * (S(4) + S(8) + S(16)),
        larger=LARGER,
        still=("head.bias",),
    ),
    Entry(
        "resnet50_bottleneck",
        bottleneck_net,
        IMAGE,
        S(7) + S(12) + S(16) + 2 * (2 * S(6)) + 2 * S(8),
        larger=LARGER,
        still=("7.bias",),
    ),  # fmt: skip
    Entry(
        "resnext_grouped",
        lambda: bottleneck_net(groups=2),
        IMAGE,
        # a grouped convolution: its groups may be exchanged, and units on both sides within each group
        S(7) + S(12) + S(16) + 2 * (S(2) + 2 * (S(3) + S(3))) + S(2) + 2 * (S(4) + S(4)),
        larger=LARGER,
        still=("7.bias",),
    ),
    Entry(
        "weights_standardised_groups",
        standardised_groups,
        IMAGE,
        S(2) + 2 * (S(3) + S(4)) + S(5),
        larger=LARGER,
        still=("6.bias",),
    ),
    Entry("convmixer", lambda: ConvMixer(9, 2), IMAGE, S(9) + 2 * S(9), larger=LARGER, still=("head.bias",)),
    Entry("mobilenet", mobilenet, IMAGE, S(7) + S(14) + S(6) + S(12) + S(15), larger=LARGER, still=("6.bias",)),
    Entry("efficientnet_se", efficientnet, IMAGE, S(7) + S(14) + S(4) + S(15), larger=LARGER, still=("5.bias",)),
    Entry(
        "shufflenet",
        lambda: shuffle_net(1),
        IMAGE,
        # Stream: 2 groups of 4. The 12 middle channels sit at (group written, group read): 2 x 2 cells of 3 that move
        # freely. The stream's groups may be exchanged, which exchanges both indices of the cells at once.
        S(2) + 2 * S(4) + 4 * S(3),
        larger=LARGER,
        still=("4.bias",),
        found=2 * S(4) + 4 * S(3),
        short=SHORT,
    ),
    Entry(
        "shufflenet_deep",
        lambda: shuffle_net(2),
        IMAGE,
        S(2) + 2 * S(4) + 2 * (4 * S(3)),
        larger=LARGER,
        still=("5.bias",),
        found=2 * S(4) + 2 * (4 * S(3)),
        short=SHORT,
    ),
    Entry("shufflenet_v2", lambda: ShuffleV2(6), IMAGE, S(6) + S(6) + S(9) + S(6), larger=LARGER, still=("head.bias",)),
    Entry(
        "depthwise_multiplier", WideDepthwise, vectors(2, 3, 6, 6), S(5) + 5 * S(3), larger=LARGER, still=("head.bias",)
    ),
]
