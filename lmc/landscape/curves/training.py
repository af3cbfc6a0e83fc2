"""What training of weights between two networks needs, whichever way leads there: a schedule, tensors that follow from others,
a random state of its own."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lmc.errors import InputError
from lmc.network.derived import following, settled
from lmc.weights import Weights, tied_names


def whole(name: str, value: Any, least: int) -> None:
    """Raise `InputError` unless an argument is a whole number, at least `least`."""
    if not (isinstance(value, int) and value >= least):
        raise InputError(f"{name}={value!r}; expected a whole number, at least {least}")


def positive(name: str, value: float) -> None:
    """Raise `InputError` unless an argument is a positive number."""
    if not (math.isfinite(value) and value > 0.0):
        raise InputError(f"{name}={value}; expected a positive number")


@dataclass(frozen=True)
class Schedule:
    """The schedule by which bends are trained; arguments of `bezier_curve`."""

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        whole("epochs", self.epochs, 0)
        whole("batch_size", self.batch_size, 1)
        positive("lr", self.lr)
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise InputError(f"weight_decay={self.weight_decay}; expected a number, at least 0")

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch: constant for half of them, then linearly down to 1 % at 90 %."""
        return self.lr * float(np.interp(epoch / self.epochs, [0.5, 0.9], [1.0, 0.01]))


class Settling:
    """Brings derived tensors of mixtures of gauged weights in line (`lmc.network.derived`); else it changes nothing.

    Args:
        like: one of the gauged weights.
    """

    def __init__(self, like: Weights) -> None:
        self._like = like
        self._derived = {name: like[name] for name in following(like)}

    def trained(self, module: nn.Module) -> list[str]:
        """The names of the parameters that are trained: those that follow from others are not."""
        return [n for n, p in module.named_parameters() if p.is_floating_point() and n not in self._derived]

    def __call__(self, weights: Weights) -> Weights:
        if not self._derived:
            return weights
        device = next(iter(weights.values())).device
        rest = {name: tensor.to(device) for name, tensor in self._derived.items() if name not in weights}
        return settled(weights | rest, self._like)


@contextlib.contextmanager
def forked(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state, which dropout draws from, starts at `seed` inside and is as it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def finite_loss(loss: float, when: str, lr: float) -> float:
    """The loss, or `InputError` if it is no number."""
    if not math.isfinite(loss):
        raise InputError(f"the loss became {loss} in {when}; try a lower rate than lr={lr}")
    return loss


def with_parameters(old: Weights, new: Weights, module: nn.Module) -> Weights:
    """`old` with its parameters replaced, aliases of tied ones included, on the device that it was on."""
    state = {name: (new[name].detach() if name in new else old[name]).to(old[name].device) for name in old}
    return state | {alias: state[name] for alias, name in tied_names(module).items()}
