"""Convolutional networks: a small one without normalisation, VGG (Simonyan and Zisserman 2014), and ResNet20 for small images
(He et al. 2015, section 4.2) in the variants used to study mode connectivity."""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lmc.errors import InputError
from lmc.models.layers import IMAGE_NORMS, check_sizes, pick


class CNN(nn.Sequential):
    """`conv1, conv2, ...`, each followed by ReLU and 2x2 max pooling, then the map is flattened into `head`.

    Images `(N, C, H, W)` -> logits `(N, classes)`. The columns of `head.weight` are `(channel pixel)`.
    """


def cnn(channels: Sequence[int] = (16, 32), *, image: tuple[int, int, int] = (1, 8, 8), classes: int = 10) -> CNN:
    """A `CNN` with one 3x3 convolution per entry of `channels`, for images of shape `image` (C, H, W).

    Raises `InputError` when the image is too small for that many poolings.
    """
    check_sizes(classes=classes, **{f"channels[{i}]": width for i, width in enumerate(channels)})
    fan_in, height, width = image
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, fan_out in enumerate(channels, start=1):
        layers[f"conv{i}"] = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        fan_in, height, width = fan_out, height // 2, width // 2
    if height < 1 or width < 1:
        raise InputError(f"image={tuple(image)} is too small for {len(channels)} poolings: give fewer channels")
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(fan_in * height * width, classes)
    return CNN(layers)


# Table 1 of the paper, columns A, B, D, E: convolutions in each of the five stages.
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Sequential):
    """`conv1, norm1, conv2, ...` (3x3 convolution, norm, ReLU), pooling after each stage, then `fc` and `head`.

    Images `(N, C, H, W)` -> logits `(N, classes)`. A stage is not pooled when that would leave less than 2x2, so
    the columns of `fc.weight` are always `(channel pixel)` with several pixels per channel.
    """


def vgg(
    width: float = 1.0,
    *,
    config: str = "vgg11",
    norm: str | None = "batch",
    image: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
) -> VGG:
    """A `VGG` whose stages have `width` times 64-128-256-512-512 channels, for images of shape `image` (C, H, W).

    `config`: "vgg11", "vgg13", "vgg16" or "vgg19"; `norm`: "batch", "layer" (over channels) or None.
    Raises `InputError` for other words and for images smaller than 2x2.
    """
    depths = pick(DEPTHS, config, "config")
    fan_in, rows, columns = image
    channels = [round(width * c) for c in CHANNELS]
    check_sizes(classes=classes, image_channels=fan_in, narrowest_stage=channels[0])
    if min(rows, columns) < 2:
        raise InputError(f"image={tuple(image)}: expected at least 2x2 pixels")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    i = 0
    for stage, (depth, fan_out) in enumerate(zip(depths, channels, strict=True), start=1):
        for _ in range(depth):
            i += 1
            layers[f"conv{i}"] = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=norm is None)
            if norm is not None:
                layers[f"norm{i}"] = pick(IMAGE_NORMS, norm, "norm")(fan_out)
            layers[f"relu{i}"] = nn.ReLU()
            fan_in = fan_out
        if min(rows, columns) >= 4:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            rows, columns = rows // 2, columns // 2
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(fan_in * rows * columns, fan_in)
    layers["relu"] = nn.ReLU()
    layers["head"] = nn.Linear(fan_in, classes)
    return VGG(layers)


class ResidualBlock(nn.Module):
    """`relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))`; the shortcut projects when the shape changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str):
        super().__init__()
        make_norm = pick(IMAGE_NORMS, norm, "norm")
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = make_norm(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = make_norm(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut.add_module("conv", nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False))
            self.shortcut.add_module("norm", make_norm(fan_out))

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResNet20(nn.Module):
    """`conv1, norm1`, three stages of three residual blocks (`stage2.block1.conv1`, ...), mean over pixels, `head`.

    Images `(N, C, H, W)` -> logits `(N, classes)`. Stages have `width` times 16, 32 and 64 channels; the second and
    the third begin with a stride of 2 and a projection shortcut.
    """

    def __init__(self, width: int, norm: str, in_channels: int, classes: int):
        super().__init__()
        channels = [16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.norm1 = pick(IMAGE_NORMS, norm, "norm")(channels[0])
        self.stage1 = self._stage(channels[0], channels[0], 1, norm)
        self.stage2 = self._stage(channels[0], channels[1], 2, norm)
        self.stage3 = self._stage(channels[1], channels[2], 2, norm)
        self.head = nn.Linear(channels[2], classes)

    @staticmethod
    def _stage(fan_in: int, fan_out: int, stride: int, norm: str) -> nn.Sequential:
        stage = nn.Sequential()
        stage.add_module("block1", ResidualBlock(fan_in, fan_out, stride, norm))
        stage.add_module("block2", ResidualBlock(fan_out, fan_out, 1, norm))
        stage.add_module("block3", ResidualBlock(fan_out, fan_out, 1, norm))
        return stage

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(images)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        return self.head(hidden.mean(dim=(2, 3)))


def resnet20(width: int = 1, *, norm: str = "batch", in_channels: int = 3, classes: int = 10) -> ResNet20:
    """A `ResNet20`; `width` multiplies the channels 16-32-64.

    `norm`: "batch", or "layer" for normalisation over channels as in Git Re-Basin (Ainsworth et al. 2022), which
    keeps no running statistics. Raises `InputError` for any other word.
    """
    check_sizes(width=width, in_channels=in_channels, classes=classes)
    return ResNet20(width, norm, in_channels, classes)
