"""Convolutional networks: a small one without normalisation, and VGG (Simonyan and Zisserman 2014)."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

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
