"""Multilayer perceptron."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lmc.models.layers import ACTIVATIONS, check_sizes, pick

NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class MLP(nn.Sequential):
    """Hidden layers `fc1, fc2, ...` (each with `norm1, ...` when normalised), then the linear `head`.

    Takes `(N, inputs)` or images `(N, C, H, W)` of that many pixels, gives logits `(N, classes)`.
    """


def mlp(inputs: int, hidden: Sequence[int], classes: int, *, activation: str = "relu", norm: str | None = None) -> MLP:
    """An `MLP` with hidden layers of the given widths.

    `activation`: "relu", "gelu", "silu" or "tanh"; `norm`: None, "layer" or "batch", between the linear map and
    the activation. Raises `InputError` for any other word and for widths that are not positive integers.
    """
    check_sizes(inputs=inputs, classes=classes, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    fan_in = inputs
    for i, width in enumerate(hidden, start=1):
        layers[f"fc{i}"] = nn.Linear(fan_in, width)
        if norm is not None:
            layers[f"norm{i}"] = pick(NORMS, norm, "norm")(width)
        layers[f"{activation}{i}"] = pick(ACTIVATIONS, activation, "activation")()
        fan_in = width
    layers["head"] = nn.Linear(fan_in, classes)
    return MLP(layers)
