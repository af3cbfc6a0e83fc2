"""Small networks of every family with their symmetries written by hand, for the tests of alignment methods."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import handwritten
import pytest
import torch
from torch import Tensor, nn

import lmc
from lmc.data import Dataset
from lmc.landscape.path import loss_path
from lmc.models.convnets import cnn, resnet20, vgg
from lmc.models.mlp import mlp
from lmc.models.transformers import gpt, vit
from lmc.symmetry.spec import PermutationSpec
from lmc.weights import Weights

HEADS = 2
CNN = {
    "conv1.weight": "c1 . . .",
    "conv1.bias": "c1",
    "conv2.weight": "c2 c1 . .",
    "conv2.bias": "c2",
    "head.weight": ". (c2 .)",
}


def _norm(name: str, group: str) -> dict[str, str]:
    return {f"{name}.weight": group, f"{name}.bias": group}


def transformer_patterns(depth: int) -> dict[str, str]:
    """Heads, the units inside each head, and hidden units; the residual stream stays or moves with the caller."""
    found = _norm("norm", "d") | {"head.weight": ". d"}
    for i in range(1, depth + 1):
        at, h, qk, v, f = f"blocks.{i}", f"head{i}", f"qk{i}", f"v{i}", f"f{i}"
        for part, units in (("q", qk), ("k", qk), ("v", v)):
            found[f"{at}.attention.{part}.weight"] = f"({h} {units}) d"
            found[f"{at}.attention.{part}.bias"] = f"({h} {units})"
        found[f"{at}.attention.o.weight"] = f"d ({h} {v})"
        found[f"{at}.attention.o.bias"] = "d"
        found |= {
            f"{at}.fc1.weight": f"{f} d",
            f"{at}.fc1.bias": f,
            f"{at}.fc2.weight": f"d {f}",
            f"{at}.fc2.bias": "d",
        }
        found |= _norm(f"{at}.norm1", "d") | _norm(f"{at}.norm2", "d")
    return found


@dataclass(frozen=True)
class Case:
    """A network with weights that no layer leaves at their defaults, its symmetries, and inputs."""

    model: nn.Module
    spec: PermutationSpec
    inputs: Tensor
    targets: Tensor

    def other(self, seed: int) -> Weights:
        """Unrelated weights of the same architecture."""
        return random_weights(self.model, seed)


def random_weights(model: nn.Module, seed: int) -> Weights:
    """Weights in which every parameter and statistic is drawn anew: no ties, no units that a norm leaves alike."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
        elif name.endswith("running_var"):
            found[name] = 1.0 + 0.3 * noise.abs()
        elif tensor.ndim == 1:
            found[name] = {"weight": 1.0, "bias": 0.2, "running_mean": 0.0}[name.rsplit(".", 1)[1]] + 0.2 * noise
        else:
            found[name] = noise / tensor[0].numel() ** 0.5
    return found


def _case(model: nn.Module, patterns: dict[str, str], inputs: Tensor, classes: int, **sizes: int) -> Case:
    model.load_state_dict(random_weights(model, 1))
    spec = PermutationSpec.from_patterns(patterns, model, **sizes)
    targets = torch.arange(len(inputs)) % classes
    return Case(model.eval(), spec, inputs, targets)


def _images(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


def _heads(depth: int) -> dict[str, int]:
    return {f"head{i}": HEADS for i in range(1, depth + 1)}


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: _case(mlp(12, [16, 10], 5), handwritten.mlp(2), _images(200, 12), 5),
    "cnn": lambda: _case(cnn((6, 8), classes=5), CNN, _images(60, 1, 8, 8), 5),
    "vgg-bn": lambda: _case(vgg(0.125, image=(1, 8, 8), classes=5), handwritten.vgg(8), _images(150, 1, 8, 8), 5),
    "resnet-bn": lambda: _case(resnet20(1, in_channels=1, classes=5), handwritten.resnet20(), _images(60, 1, 8, 8), 5),
    "resnet-ln": lambda: _case(
        resnet20(1, norm="layer", in_channels=1, classes=5),
        handwritten.resnet20(handwritten.LAYER_NORM),
        _images(60, 1, 8, 8),
        5,
    ),
    "vit": lambda: _case(
        vit(dim=8, heads=HEADS, depth=2, hidden=12, classes=5),
        transformer_patterns(2)
        | {"patch.weight": "d . . .", "patch.bias": "d", "class_token": ". . d", "position": ". . d"},
        _images(60, 1, 8, 8),
        5,
        **_heads(2),
    ),
    "gpt": lambda: _case(
        gpt(11, 6, dim=8, heads=HEADS, depth=2, hidden=12),
        transformer_patterns(2) | {"token.weight": ". d", "position.weight": ". d"},
        torch.randint(11, (60, 6), generator=torch.Generator().manual_seed(7)),
        11,
        **_heads(2),
    ),
}


def cases(*usual: str) -> list:
    """The names of all cases as parameters of a test; those that are not `usual` are for the thorough form."""
    return [pytest.param(name, marks=[] if name in usual else [pytest.mark.thorough]) for name in CASES]


@dataclass(frozen=True)
class Trained:
    """Networks of one architecture trained from different seeds on the digits."""

    data: Dataset
    model: nn.Module
    spec: PermutationSpec
    weights: tuple[Weights, ...]

    def barrier(self, a: Weights, b: Weights) -> float:
        return loss_path(self.model, a, b, self.data.test, alphas=7, progress=False).barrier


@cache
def digits() -> Trained:
    data, model = lmc.data.digits(), mlp(64, [96, 96], 10)
    weights = tuple(lmc.training.train(model, data, seeds=range(3), epochs=8, progress=False))
    return Trained(data, model, PermutationSpec.from_patterns(handwritten.mlp(2), model), weights)
