"""Convolutional networks without residual streams: flatten, concatenation, normalisation by groups, transposed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, S, vectors


def conv_bn(c_in: int, c_out: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def vgg_bn() -> nn.Module:
    """The flatten sees 10 channels of 2 x 2 pixels: each channel moves as a block of 4 columns."""
    return nn.Sequential(
        conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 12), conv_bn(12, 10), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(40, 14), nn.ReLU(), nn.Dropout(), nn.Linear(14, 5),
    )  # fmt: skip


class DenseNet(nn.Module):
    """Two dense layers with bottleneck, a transition, one more dense layer (Huang et al. 2017)."""

    def __init__(self, stem: int, growth: int, bottleneck: int, transition: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList(self.layer(stem + i * growth, bottleneck, growth) for i in range(2))
        width = stem + 2 * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, transition, 1), nn.AvgPool2d(2)
        )
        self.block2 = nn.ModuleList([self.layer(transition, bottleneck, growth)])
        self.norm = nn.BatchNorm2d(transition + growth)
        self.head = nn.Linear(transition + growth, 5)

    @staticmethod
    def layer(c_in: int, bottleneck: int, growth: int) -> nn.Sequential:
        return nn.Sequential(
            nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, bottleneck, 1, bias=False),
            nn.BatchNorm2d(bottleneck), nn.ReLU(), nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.block1:
            x = torch.cat([x, layer(x)], dim=1)
        x = self.transition(x)
        for layer in self.block2:
            x = torch.cat([x, layer(x)], dim=1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Inception(nn.Module):
    """Four branches concatenated (Szegedy et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 9)
        self.one = conv_bn(9, 5, 1)
        self.three = nn.Sequential(conv_bn(9, 6, 1), conv_bn(6, 7))
        self.five = nn.Sequential(conv_bn(9, 4, 1), conv_bn(4, 8, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn(9, 10, 1))
        self.head = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Two levels of down and up, transposed convolutions, skips by concatenation (Ronneberger et al. 2015)."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.enc1, self.enc2 = self.twice(3, w), self.twice(w, 2 * w)
        self.middle = self.twice(2 * w, 4 * w)
        self.up2, self.dec2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2), self.twice(4 * w, 2 * w)
        self.up1, self.dec1 = nn.ConvTranspose2d(2 * w, w, 2, stride=2), self.twice(2 * w, w)
        self.out = nn.Conv2d(w, 2, 1)

    @staticmethod
    def twice(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(c_in, c_out), conv_bn(c_out, c_out))

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        x = self.middle(F.max_pool2d(b, 2))
        x = self.dec2(torch.cat([self.up2(x), b], dim=1))
        x = self.dec1(torch.cat([self.up1(x), a], dim=1))
        return self.out(x)


def group_norm_net() -> nn.Module:
    """GroupNorm keeps the groups together: units within a group, and whole groups, may be exchanged."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1), nn.GroupNorm(2, 10), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    )  # fmt: skip


def instance_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1), nn.InstanceNorm2d(9, affine=True), nn.LeakyReLU(),
        nn.Conv2d(9, 11, 3, stride=2), nn.InstanceNorm2d(11, affine=True, track_running_stats=True), nn.ELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(44, 4),
    )  # fmt: skip


class Generator(nn.Module):
    """Noise -> image by transposed convolutions (Radford et al. 2016)."""

    def __init__(self, noise: int, w: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((noise, 4 * w), (4 * w, 2 * w), (2 * w, w)):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z[:, :, None, None])


class PixelShuffle(nn.Module):
    """Sub-pixel upsampling: 4 consecutive channels become the pixels of one, so channels move in blocks of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5 * 4, 3, padding=1)
        self.shuffle, self.out = nn.PixelShuffle(2), nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shuffle(self.b(torch.tanh(self.a(x)))))
        return self.out(F.interpolate(x, scale_factor=2, mode="bilinear"))


class Conv1dNet(nn.Module):
    """Dilated temporal convolutions with weight normalisation and a residual (Bai et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.a = norm(nn.Conv1d(4, 10, 3, padding=2, dilation=2))
        self.b = norm(nn.Conv1d(10, 10, 3, padding=4, dilation=4))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = x + torch.relu(self.b(x))
        return self.head(x[:, :, -1])


IMAGE, LARGER = vectors(2, 3, 8, 8), vectors(3, 3, 12, 12)

ENTRIES = [
    Entry("vgg_bn_flatten", vgg_bn, IMAGE, S(8) + S(12) + S(10) + S(14), larger=vectors(3, 3, 8, 8), still=("9.bias",)),
    Entry(
        "densenet",
        lambda: DenseNet(6, 5, 7, 8),
        IMAGE,
        # stem and transition; each dense layer adds its bottleneck and its growth
        S(6) + S(8) + 3 * (S(7) + S(5)),
        larger=LARGER,
        still=("head.bias",),
    ),
    Entry(
        "inception",
        Inception,
        IMAGE,
        S(9) + S(5) + S(6) + S(7) + S(4) + S(8) + S(10),
        larger=LARGER,
        still=("head.bias",),
    ),
    Entry(
        "unet",
        lambda: UNet(4),
        IMAGE,
        # double convolutions at 4, 8, 16, 8, 4 channels, and the two upsamplings
        2 * (S(4) + S(8) + S(16) + S(8) + S(4)) + S(8) + S(4),
        larger=vectors(1, 3, 16, 16),
        still=("out.bias",),
    ),
    Entry("group_norm", group_norm_net, IMAGE, S(4) + 4 * S(3) + S(2) + 2 * S(5), larger=LARGER, still=("8.bias",)),
    Entry("instance_norm", instance_norm_net, IMAGE, S(9) + S(11), larger=LARGER, still=("8.bias",)),
    Entry(
        "deconv_generator",
        lambda: Generator(5, 4),
        vectors(2, 5),
        S(16) + S(8) + S(4),
        larger=vectors(4, 5),
        still=("net.9.bias",),
    ),
    Entry(
        "pixel_shuffle", PixelShuffle, vectors(2, 1, 5, 5), S(6) + S(5), larger=vectors(1, 1, 9, 7), still=("out.bias",)
    ),
    Entry(
        "temporal_conv_weight_norm", Conv1dNet, vectors(2, 4, 9), S(10), larger=vectors(3, 4, 15), still=("head.bias",)
    ),
]
