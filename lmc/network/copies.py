"""Copies of modules that share nothing with the original."""

import copy

from torch import Tensor, nn


def copy_module(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep computed tensors as attributes (weight norm), which torch refuses to copy."""
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(model, memo)
