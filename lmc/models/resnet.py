"""ResNet20 for small images (He et al. 2015, section 4.2), in the variants used to study mode connectivity."""

import torch.nn.functional as F
from torch import Tensor, nn

from lmc.models.layers import IMAGE_NORMS, check_sizes, pick


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
