"""Which layers of a network have outputs that its own weights and biases can rescale and shift, channel by channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lmc.inputs import Call, call_module
from lmc.network import Network


@dataclass(frozen=True)
class Layer:
    """A layer whose output can be rescaled: its module, and the channel axes of its output and of its weight."""

    module: str
    channel: int
    axis: int


def rescalable(network: Network, probe: Call) -> list[Layer]:
    """The layers that are called once in a forward pass, in this order, all before the last linear or convolutional one.

    Linear and convolutional layers with a bias, and for those without one the normalisation that is called next, if it has
    a weight and a bias; batch normalisation is not among them.
    """
    calls = _calls(network, probe)
    weighted = [at for at, (name, _, _) in enumerate(calls) if _is_weighted(network.module.get_submodule(name))]
    uses = _uses(network.module)
    counts: dict[str, int] = {}
    for name, _, _ in calls:
        counts[name] = counts.get(name, 0) + 1
    found = []
    for at in range(weighted[-1] if weighted else 0):
        name, arguments, output = calls[at]
        module = network.module.get_submodule(name)
        if counts[name] > 1 or any(not isinstance(p, nn.Parameter) or uses[id(p)] > 1 for p in _own(module)):
            continue
        if _is_weighted(module):
            if not (isinstance(module, _ConvTransposeNd) and module.groups > 1):
                found.append(Layer(name, channel_axis(module), 1 if isinstance(module, _ConvTransposeNd) else 0))
        elif at and network.module.get_submodule(calls[at - 1][0]).bias is None:
            channel = _scaled_axis(module, arguments, output)
            if channel is not None:
                found.append(Layer(name, channel, 0))
    return found


def channel_axis(module: nn.Module) -> int:
    """The axis of the output of a linear or convolutional layer that counts its channels, from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def _own(module: nn.Module) -> tuple[Any, Any]:
    return module.weight, module.bias


def _is_weighted(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd)


def _calls(network: Network, probe: Call) -> list[tuple[str, Sequence[Tensor], Tensor]]:
    """Name, arguments and output of every layer and normalisation in a forward pass."""
    calls = []
    hooks = []
    for name, module in network.module.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        scales = isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.ndim == bias.ndim == 1
        if _is_weighted(module) or (scales and not isinstance(module, _BatchNorm)):

            def note(_module, arguments, output, name=name):
                copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]  # what follows may work in place
                calls.append((name, copies, output))

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            call_module(network.module, probe, network.device)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _uses(module: nn.Module) -> dict[int, int]:
    """How many names each tensor of the state dict has."""
    uses: dict[int, int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return uses


@torch.no_grad()
def _scaled_axis(module: nn.Module, arguments: Sequence[Tensor], output: Tensor) -> int | None:
    """The axis along which the module's output is `weight x + bias`, from the end; None where it is not of this form."""
    weight, bias = _own(module)
    count = len(bias)
    one, step = torch.ones_like(weight), torch.arange(1.0, count + 1).to(bias) / count

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, tuple(arguments))

    plain = run(one, 0.0 * step)
    for axis in range(-output.ndim, 0):
        along = [1] * (output.ndim + axis) + [-1] + [1] * (-axis - 1)
        if output.shape[axis] == count and torch.allclose(
            run(step, step.flip(0)), plain * step.view(along) + step.flip(0).view(along), atol=1e-4
        ):
            return axis
    return None
