"""Tied weights: names of one and the same tensor, such as an embedding and the output head."""

from collections.abc import Hashable

from torch import Tensor, nn

from lmc.weights.state import ModelOrWeights


def tied_names(model: ModelOrWeights) -> dict[str, str]:
    """Further names (aliases) of tensors that have several -> the first name.

    Of a module or state dict those of one memory; of an opened checkpoint those that are stored once. Other mappings,
    which may make their tensors on demand, have none.
    """
    if not isinstance(model, nn.Module | dict):
        return dict(getattr(model, "ties", {}))
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    first: dict[Hashable, str] = {}
    names = {name: first.setdefault(memory(tensor), name) for name, tensor in state.items()}
    return {name: origin for name, origin in names.items() if name != origin}


def memory(tensor: Tensor) -> Hashable:
    """The place of a tensor's values: equal for two tensors that are one; tensors without values are compared by identity."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
