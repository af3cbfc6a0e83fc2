"""The first layer of the networks on a plane, whose products with the raw inputs are made once.

The weights of a point are `origin + u U + v V`, and so is what a layer makes of the raw inputs: its products with origin,
U and V are mixed at every further point. The result is the same up to rounding.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmc.landscape.planes.span import PlaneSpan
from lmc.network.batches import tensors
from lmc.network.copies import fresh_copy
from lmc.network.network import Network

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEWEST_INPUTS = 16  # to one output; with fewer, mixing three products takes as long as making one
PRODUCT_BYTES = 512 << 20


class Products:
    """Products of the first layer with the data, at the origin of a plane and along its directions; threads share them.

    Args:
        layer: it has the name `name` in the network.
        inputs: the data that the network is evaluated on; they stay where they are as long as this lives.
    """

    def __init__(self, span: PlaneSpan, name: str, layer: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.name = name
        self._layer = fresh_copy(layer)
        self._parts = [
            {key: part.get(f"{name}.{key}", torch.zeros_like(slot)) for key, slot in layer.state_dict().items()}
            for part in span.parts()
        ]
        for key in layer.state_dict():
            self._parts[0][key] = span.origin[f"{name}.{key}"]
        self._data = {tensor.data_ptr(): tensor for tensor in inputs}
        self._known: dict[Any, list[Tensor]] = {}
        self._left = PRODUCT_BYTES
        self._lock = threading.Lock()

    def of(self, inputs: Tensor) -> list[Tensor] | None:
        """The three products, made at the first call; None where `inputs` are no view of the data, or memory ends."""
        key = (inputs.data_ptr(), inputs.shape, inputs.stride())
        if key not in self._known and inputs.data_ptr() in self._data:
            with self._lock:
                if key not in self._known and self._left > 0:
                    products = [functional_call(self._layer, part, (inputs,)) for part in self._parts]
                    self._left -= sum(product.nbytes for product in products)
                    self._known[key] = products
        return self._known.get(key)


class FirstLayer:
    """Takes the place of `forward` in the first layer of one network, and mixes products where it can.

    Attributes:
        place: (u, v) of the point whose weights the network has; None for weights off the plane.
    """

    def __init__(self, network: Network, products: Products) -> None:
        layer = network.module.get_submodule(products.name)
        self.place: tuple[float, float] | None = None
        self._products = products
        self._forward = layer.forward
        layer.forward = self

    def __call__(self, inputs: Tensor) -> Tensor:
        products = None if self.place is None else self._products.of(inputs)
        if products is None or self.place is None:
            return self._forward(inputs)
        base, along_u, along_v = products
        return torch.add(base, along_u, alpha=self.place[0]).add_(along_v, alpha=self.place[1])


def find_first_layer(network: Network, inputs: Any) -> str | None:
    """The name of the layer that sees the raw inputs, or a view of them, once in a forward pass; None where there is no
    such layer, or mixing its products would not pay."""
    raw = {leaf.data_ptr() for leaf in tensors(inputs)}
    layers = {name: module for name, module in network.module.named_modules() if type(module) in LAYERS}
    calls: list[tuple[str, bool]] = []

    def watch(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append((name, len(args) == 1 and isinstance(args[0], Tensor) and args[0].data_ptr() in raw))

        return note

    plain = {n: m for n, m in layers.items() if not m._forward_hooks and not m._forward_pre_hooks}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in plain.items()]
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    name = next((name for name, sees in calls if sees), None)
    if name is None or [called for called, _ in calls].count(name) > 1:
        return None
    weight = network.module.get_parameter(f"{name}.weight")
    wide = weight.dtype in (torch.float32, torch.float64)
    return name if wide and weight[0].numel() >= FEWEST_INPUTS else None
