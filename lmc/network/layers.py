"""Layers whose layout is known: which axes of weights and activations count channels, which layers are matrices, and which
have outputs that weights and biases of the network can rescale and shift, channel by channel."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from lmc.network.derived import written
from lmc.network.inputs import Call
from lmc.network.network import Network
from lmc.weights import Weights

Side = Literal["input", "output"]


def sides(module: nn.Module) -> list[tuple[int, Side, int]]:
    """`(axis of the weight, side, channel axis of the activation)` for the modules whose layout is known."""
    if isinstance(module, nn.Linear):
        return [(1, "input", -1), (0, "output", -1)]
    if isinstance(module, _ConvTransposeNd):
        channel = channel_axis(module)
        return [(0, "input", channel), (1, "output", channel)] if module.groups == 1 else []
    if isinstance(module, _ConvNd):
        channel = channel_axis(module)
        return [(1, "input", channel), (0, "output", channel)] if module.groups == 1 else [(0, "output", channel)]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return [(1, "output", -1)]
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return [(0, "output", -1)] if len(module.normalized_shape) == 1 else []
    if isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.PReLU):
        return [(0, "output", 1)]
    if _is_conv1d(module):
        return [(0, "input", -1), (1, "output", -1)]
    return []


def channel_axis(module: nn.Module) -> int:
    """The axis of the output of a linear or convolutional layer that counts channels, from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight (in, out), as GPT-2 has them."""
    return type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def fits(module: nn.Module) -> bool:
    """Whether a layer is a matrix that we know how to read: linear, a convolution over patches, or GPT-2's Conv1D."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def matrices(module: nn.Module, weights: Weights) -> dict[str, nn.Module]:
    """The layers that are matrices, by the name of the tensor that holds the matrix in gauged weights."""
    known, found = written(weights, module), {}
    for path, layer in module.named_modules():
        if not fits(layer):
            continue
        if not is_parametrized(layer, "weight"):
            names = ("weight", "weight_v", "weight_orig")
        elif len(layer.parametrizations["weight"]) == 1:  # type: ignore[index]
            names = ("parametrizations.weight.original1", "parametrizations.weight.original")
        else:
            continue
        for own in names:
            name = f"{path}.{own}".removeprefix(".")
            if name in known or (own == "weight" and name in weights):
                found[name] = layer
    return found


def rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """`(rows, inputs)`: what the weight matrix is multiplied with, float32 or wider."""
    x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        assert not isinstance(module.padding, str)
        x = x if x.ndim == len(module.kernel_size) + 2 else x[None]
        how = [module.kernel_size, module.dilation, module.padding, module.stride]
        if isinstance(module, nn.Conv1d):  # an image one pixel high
            x, how = x[..., None, :], [(neutral, *size) for neutral, size in zip((1, 1, 0, 1), how, strict=True)]
        return F.unfold(x, *how).mT.flatten(0, 1)  # from (N, in * kh * kw, positions)
    return x.reshape(-1, x.shape[-1])


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`(inputs, outputs)`."""
    return weight.flatten(1).T if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) else weight


def as_weight(module: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """A matrix that `as_matrix` made, back in the shape of the weight."""
    return (matrix.T if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) else matrix).reshape(shape)


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
    weighted = [at for at, call in enumerate(calls) if _is_weighted(call.module)]
    uses = _uses(network.module)
    counts = Counter(call.name for call in calls)
    found = []
    for at in range(weighted[-1] if weighted else 0):
        name, module = calls[at].name, calls[at].module
        if counts[name] > 1 or any(not isinstance(p, nn.Parameter) or uses[id(p)] > 1 for p in _own(module)):
            continue
        if _is_weighted(module):
            found += [Layer(name, channel, axis) for axis, side, channel in sides(module) if side == "output"]
        elif at and calls[at - 1].module.bias is None and not isinstance(module, _BatchNorm):
            channel = _scaled_axis(calls[at])
            if channel is not None:
                found.append(Layer(name, channel, 0))
    return found


def preactivations(network: Network, probe: Call) -> dict[str, tuple[str, int]]:
    """Every linear and convolutional layer, in the order of calls, with the module at which its output is read and the
    channel axis there, from the end: its own output, or without a bias that of the normalisation that is called next."""
    calls = _calls(network, probe)
    found = {}
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        if _is_weighted(call.module):
            found[call.name] = call.name, channel_axis(call.module)
            if call.module.bias is None and following is not None and not _is_weighted(following.module):
                channel = _scaled_axis(following)
                if channel is not None:
                    found[call.name] = following.name, channel
    return found


@torch.no_grad()
def run_seen(
    network: Network, call: Call, places: Sequence[tuple[str, int]], see: Callable[[int, Tensor], Tensor | None]
) -> None:
    """A forward pass in which `see(place, values (n, samples) in float64)` may replace the output of each module.

    Args:
        places: names of modules and the channel axes of their outputs.
    """

    def hook_for(at: int, channel: int):
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            front = output.movedim(channel, 0)
            replaced = see(at, front.reshape(len(front), -1).to(torch.float64, copy=True))
            return None if replaced is None else replaced.to(output).reshape(front.shape).movedim(0, channel)

        return hook

    modules = dict(network.module.named_modules())
    hooks = [modules[name].register_forward_hook(hook_for(at, axis)) for at, (name, axis) in enumerate(places)]
    try:
        network.result(call)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Called:
    """A call of a layer or normalisation in a forward pass."""

    name: str
    module: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


def _own(module: nn.Module) -> tuple[Any, Any]:
    return module.weight, module.bias


def _is_weighted(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd)


def _calls(network: Network, probe: Call) -> list[_Called]:
    """The calls of linear and convolutional layers, and of modules with a weight (n,) and a bias (n,), in their order."""
    calls: list[_Called] = []
    hooks = []
    for name, module in network.module.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        scales = isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.ndim == bias.ndim == 1
        if _is_weighted(module) or scales:

            def note(module, arguments, keywords, output, name=name):
                # What follows may work in place.
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (arguments, keywords))
                calls.append(_Called(name, module, args, kwargs, output))

            hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            network.result(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _uses(module: nn.Module) -> dict[int, int]:
    """The number of names of each tensor of the state dict."""
    uses: dict[int, int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return uses


@torch.no_grad()
def _scaled_axis(call: _Called) -> int | None:
    """The axis along which the module's output is `weight x + bias`, from the end; None where it is not of this form."""
    weight, bias = _own(call.module)
    count, ndim = len(bias), call.output.ndim
    one, step = torch.ones_like(weight), torch.arange(1.0, count + 1).to(bias) / count

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        given = {"weight": weight, "bias": bias}
        return torch.func.functional_call(call.module, given, call.arguments, call.keywords)

    plain, scaled = run(one, 0.0 * step), run(step, step.flip(0))
    for axis in range(-ndim, 0):
        along = [1] * (ndim + axis) + [-1] + [1] * (-axis - 1)
        expected = plain * step.view(along) + step.flip(0).view(along) if plain.shape[axis] == count else None
        if expected is not None and torch.allclose(scaled, expected, atol=1e-4):
            return axis
    return None
