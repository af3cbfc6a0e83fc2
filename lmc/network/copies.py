"""Copies of modules as if nobody had called them before."""

import copy
import functools
from typing import Any

import torch
from torch import nn

from lmc.network.caches import hidden_tensors


def fresh_copy(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy, in the modes of the original, whose modules hold nothing that they can drop by themselves.

    Values under `functools.cached_property` and `functools.lru_cache` do not come along, and the copy goes through
    `train(True)` and back, in which modules drop what they derived from their weights for evaluation. Modules that keep
    computed tensors as attributes (weight norm), which torch refuses to copy, are copied as well.

    Args:
        model: any module; not touched.
        share: let the parameters of the copy use the memory of the original's, for a copy that is only looked at or given
            other weights. Without effect where a module changes its parameters by itself, see `writes_parameters`.
    """
    # What deepcopy finds under the id of a tensor it takes as its copy.
    memo: dict[int, Any] = {
        id(x): x.detach().clone() for x in hidden_tensors(model) if x.grad_fn is not None or x.is_inference()
    }
    if share and not writes_parameters(model):
        memo |= {id(p): _alias(p) for p in model.parameters() if type(p) is nn.Parameter}
    with torch.no_grad():  # a scripted module would otherwise be a computed copy, open to no change
        copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _renew_caches(module, memo)
    copied.train()
    copied.train(model.training)
    for module, original in zip(copied.modules(), model.modules(), strict=True):
        if module.training != original.training:
            module.training = original.training
    return copied


def writes_parameters(model: nn.Module) -> bool:
    """Whether a module may change its parameters in place: on a change of mode (adapters that are merged in evaluation
    mode), or in a forward pass (embeddings with a largest norm)."""
    return switches(model) or any(getattr(module, "max_norm", None) is not None for module in model.modules())


def switches(model: nn.Module) -> bool:
    """Whether a module does something of its own in `train` or `eval`."""
    known = (torch.jit.ScriptModule, torch.jit.RecursiveScriptModule)
    return any(
        not isinstance(module, known)
        and (type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval)
        for module in model.modules()
    )


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def _renew_caches(module: nn.Module, memo: dict[int, Any]) -> None:
    """Drop cached properties; give functions under an lru_cache, which deepcopy leaves bound to the original, another."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in list(vars(module).items()):
        if isinstance(getattr(type(module), name, None), functools.cached_property):
            del vars(module)[name]
        elif isinstance(value, functools._lru_cache_wrapper):
            function = copy.deepcopy(value.__wrapped__, memo)
            vars(module)[name] = functools.lru_cache(**value.cache_parameters())(function)
