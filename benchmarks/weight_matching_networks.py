"""The networks of the weight matching benchmark: two sets of weights, a specification by hand, and a module to trace."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmc

Patterns = dict[str, str]


@dataclass(frozen=True)
class Case:
    """An architecture: how to make it, its axis patterns (buffers left out), and the shape of one input."""

    make: Callable[[], nn.Module]
    patterns: Patterns
    input_shape: tuple[int, ...]

    def weights(self, seed: int) -> dict[str, Tensor]:
        """Freshly initialised parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: p.detach().clone() for name, p in self.make().named_parameters()}


def cases() -> dict[str, Case]:
    return {
        "mlp": Case(lambda: lmc.models.mlp(784, [512] * 3, 10), mlp_patterns(3), (1, 784)),
        "resnet20-1": Case(lambda: lmc.models.resnet20(1), resnet20_patterns(), (1, 3, 32, 32)),
        "resnet20-4": Case(lambda: lmc.models.resnet20(4), resnet20_patterns(), (1, 3, 32, 32)),
        "resnet20-16": Case(lambda: lmc.models.resnet20(16), resnet20_patterns(), (1, 3, 32, 32)),
        "vgg16": Case(VGG16, vgg16_patterns(), (1, 3, 32, 32)),
        "resnet50": Case(ResNet50, resnet50_patterns(), (1, 3, 64, 64)),
    }


def conv(name: str, out: str, into: str) -> Patterns:
    return {f"{name}.weight": f"{out} {into} . ."}


def norm(name: str, group: str) -> Patterns:
    return {f"{name}.weight": group, f"{name}.bias": group}


def dense(name: str, out: str, into: str) -> Patterns:
    return {f"{name}.weight": f"{out} {into}", f"{name}.bias": out}


def mlp_patterns(hidden: int) -> Patterns:
    groups = [".", *(f"h{i}" for i in range(1, hidden + 1))]
    found = {}
    for i in range(1, hidden + 1):
        found |= dense(f"fc{i}", groups[i], groups[i - 1])
    return found | dense("head", ".", groups[hidden])


def resnet20_patterns() -> Patterns:
    found = conv("conv1", "s1", ".") | norm("norm1", "s1")
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            name, inner, out = f"stage{stage}.block{block}", f"inner{stage}{block}", f"s{stage}"
            into = f"s{stage - 1}" if stage > 1 and block == 1 else out
            found |= conv(f"{name}.conv1", inner, into) | norm(f"{name}.norm1", inner)
            found |= conv(f"{name}.conv2", out, inner) | norm(f"{name}.norm2", out)
            if into != out:
                found |= conv(f"{name}.shortcut.conv", out, into) | norm(f"{name}.shortcut.norm", out)
    return found | dense("head", ".", "s3")


class VGG16(nn.Sequential):
    """Thirteen convolutions with batch normalisation down to one pixel, then three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        fan_in, i = 3, 0
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                i += 1
                self.add_module(f"conv{i}", nn.Conv2d(fan_in, width, 3, padding=1))
                self.add_module(f"norm{i}", nn.BatchNorm2d(width))
                self.add_module(f"relu{i}", nn.ReLU())
                fan_in = width
            self.add_module(f"pool{i}", nn.MaxPool2d(2))
        self.add_module("flatten", nn.Flatten())
        for name, out in (("fc1", 512), ("fc2", 512), ("head", 10)):
            self.add_module(name, nn.Linear(512, out))
            if name != "head":
                self.add_module(f"relu_{name}", nn.ReLU())


def vgg16_patterns() -> Patterns:
    found: Patterns = {}
    before = "."
    for i in range(1, 14):
        found |= conv(f"conv{i}", f"c{i}", before) | norm(f"norm{i}", f"c{i}") | {f"conv{i}.bias": f"c{i}"}
        before = f"c{i}"
    return found | dense("fc1", "f1", "c13") | dense("fc2", "f2", "f1") | dense("head", ".", "f2")


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with batch normalisation, around a shortcut."""

    def __init__(self, fan_in: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != out:
            self.shortcut.add_module("conv", nn.Conv2d(fan_in, out, 1, stride, bias=False))
            self.shortcut.add_module("norm", nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        return F.relu(self.norm3(self.conv3(hidden)) + self.shortcut(x))


RESNET50_DEPTHS = (3, 4, 6, 3)


class ResNet50(nn.Module):
    """ResNet50 with a thousand classes (He et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.Sequential()
        fan_in = 64
        for stage, depth in enumerate(RESNET50_DEPTHS, start=1):
            width = 32 * 2**stage
            for block in range(1, depth + 1):
                stride = 2 if block == 1 and stage > 1 else 1
                self.stages.add_module(f"{stage}_{block}", Bottleneck(fan_in, width, stride))
                fan_in = 4 * width
        self.head = nn.Linear(fan_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stages(self.pool(F.relu(self.norm1(self.conv1(x)))))
        return self.head(hidden.mean(dim=(2, 3)))


def resnet50_patterns() -> Patterns:
    found = conv("conv1", "s0", ".") | norm("norm1", "s0")
    for stage, depth in enumerate(RESNET50_DEPTHS, start=1):
        for block in range(1, depth + 1):
            name, out = f"stages.{stage}_{block}", f"s{stage}"
            into = f"s{stage - 1}" if block == 1 else out
            first, second = f"a{stage}_{block}", f"b{stage}_{block}"
            found |= conv(f"{name}.conv1", first, into) | norm(f"{name}.norm1", first)
            found |= conv(f"{name}.conv2", second, first) | norm(f"{name}.norm2", second)
            found |= conv(f"{name}.conv3", out, second) | norm(f"{name}.norm3", out)
            if block == 1:
                found |= conv(f"{name}.shortcut.conv", out, into) | norm(f"{name}.shortcut.norm", out)
    return found | dense("head", ".", "s4")
