"""A private copy of a module that takes on weight sets, so that the caller's module is never touched."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmc.errors import DataError, InputError
from lmc.network.batches import tensors
from lmc.network.copies import copy_module
from lmc.network.inputs import arguments
from lmc.network.task import tensor_of
from lmc.weights import Weights, check_compatible


class Network:
    """One architecture in eval mode on one device; `load` gives it weights, calling it gives its outputs.

    Parameters are taken by reference, buffers are copied: a forward pass may write buffers, never parameters.

    Args:
        read: what is taken of the module's result (default: the tensor, or its `.logits`); see `Task.read`.
    """

    def __init__(self, model: nn.Module, device: torch.device, read: Callable[[Any], Any] = tensor_of) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected an nn.Module, which says what to compute, got {type(model).__name__}")
        self.device, self.read = device, read
        self.module = copy_module(model).to(device).eval().requires_grad_(False)
        self._slots = self.module.state_dict(keep_vars=True)
        self._shapes = {name: tensor.shape for name, tensor in self._slots.items()}
        # One name for each tensor: tied parameters have several, and functional_call wants one.
        self._own_names = [name for name, _ in self.module.named_parameters()]
        self._own_names += [name for name, _ in self.module.named_buffers() if name in self._slots]

    def check(self, weights: Weights, what: str) -> None:
        """Raise `MismatchError` unless the names and shapes are the module's; dtype and device may be others."""
        if {name: tensor.shape for name, tensor in weights.items()} != self._shapes:
            check_compatible(_shapes_only(self._slots), _shapes_only(weights), ("model", what))

    def load(self, weights: Weights) -> None:
        """Take on `weights`."""
        for name, slot in self._slots.items():
            tensor = weights[name].to(self.device)
            slot.data = tensor if isinstance(slot, nn.Parameter) else tensor.clone()

    def buffers(self) -> Weights:
        """The buffers as the last forward pass left them."""
        return {name: slot.detach() for name, slot in self._slots.items() if not isinstance(slot, nn.Parameter)}

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Any:
        """The outputs (N, ...) for inputs of any accepted form, on this network's device."""
        args, kwargs = arguments(self.module, inputs)
        return self.read(self.module(*args, **kwargs))

    @torch.no_grad()
    def many(self, stacked: Weights, inputs: Any) -> Tensor:
        """The outputs (K, N, ...) of K weight sets stacked along a new first axis."""
        args, kwargs = arguments(self.module, inputs)

        def outputs(weights: Weights) -> Tensor:
            return self.read(functional_call(self.module, weights, args, kwargs))

        # On a CPU, torch has no fused attention for a stack of networks, but the plain one.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            return torch.vmap(outputs)(stacked)

    def outputs(self, weights: Weights, inputs: Any) -> Any:
        """The outputs (N, ...) as a differentiable function of `weights`; a tensor not given keeps what was loaded."""
        args, kwargs = arguments(self.module, inputs)
        own = {name: weights[name] for name in self._own_names if name in weights}
        return self.read(functional_call(self.module, own, args, kwargs))

    def stack(self, states: Sequence[Weights]) -> Weights:
        """K weight sets as one, each tensor with a new first axis."""
        return {name: torch.stack([state[name].to(self.device) for state in states]) for name in self._own_names}

    def check_inputs(self, weights: Weights, inputs: Any, split: str) -> None:
        """Raise `DataError` when floating-point inputs have a dtype that none of the weights has."""
        dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        for leaf in tensors(inputs):
            if dtypes and leaf.is_floating_point() and leaf.dtype not in dtypes:
                known = ", ".join(sorted(map(str, dtypes)))
                raise DataError(f"{split}: inputs are {leaf.dtype}, the weights {known}; convert with .to(dtype)")


def pick_device(device: torch.device | str | None, weights: Weights) -> torch.device:
    """The device asked for, else the one the weights are on.

    Raises:
        InputError: an unknown device, or one that this machine lacks.
    """
    if device is None:
        return next((tensor.device for tensor in weights.values()), torch.device("cpu"))
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "meta":
        raise InputError("the meta device holds no values: nothing can be computed there; load the weights elsewhere")
    return chosen


def activation_bytes(network: Network, inputs: Any) -> int:
    """Bytes that the leaf modules put out in one forward pass: what a further weight set costs beside its weights."""
    total = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        total += sum(tensor.nbytes for tensor in tensors(output))

    leaves = [module for module in network.module.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _shapes_only(weights: Mapping[str, Tensor]) -> Weights:
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in weights.items()}
