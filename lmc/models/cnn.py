"""A small convolutional network without normalisation."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lmc.errors import InputError
from lmc.models.layers import check_sizes


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
