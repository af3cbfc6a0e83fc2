"""Copies of modules that hold nothing which they can drop by themselves, and what modules do by themselves to their weights."""

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import InputError
from lmc.network.places import containers, hidden_tensors, items_of
from lmc.network.stores import content, is_torch


def fresh_copy(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy, in the modes of the original, whose modules hold nothing that they can drop by themselves.

    Values under `functools.cached_property` and `functools.lru_cache` do not come along, and the copy goes through
    `train(True)` and back, in which modules drop what they derived from their weights for evaluation. Modules that keep
    computed tensors as attributes (weight norm), which torch refuses to copy, are copied as well. What `torch.compile` has
    wrapped runs as it was written: compiling again for each copy takes longer, and hooks would be compiled with it.

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
        copied = _deep_copy(model, memo)
    for module in copied.modules():
        _renew_caches(module, memo)
    _rebind(copied, memo)
    for module in copied.modules():
        if type(module).__name__ == "OptimizedModule":
            inner: Any = module._orig_mod
            module.forward = inner.__call__
    copied.train()
    if not model.training:
        copied.eval()
    for module, original in zip(copied.modules(), model.modules(), strict=True):
        if module.training != original.training:
            module.training = original.training
    return copied


def _deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy; values that cannot be copied, such as locks and open files, are shared."""
    known = dict(memo)
    try:
        return copy.deepcopy(model, memo)
    except TypeError as error:
        kept = [value for _, container in containers(model) for _, value in items_of(container)]
        shared: dict[int, Any] = {}
        for value in reversed(kept):  # a lock before the object that holds it, which is copied around it
            if not (isinstance(value, Tensor | nn.Module) or _copyable(value, known | shared)):
                shared[id(value)] = value
        if not shared:
            raise InputError(f"model: {type(model).__name__} cannot be copied: {error}") from error
        memo.clear()
        memo.update(known | shared)
        return copy.deepcopy(model, memo)


def _copyable(value: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # noqa: BLE001 (objects raise what they like)
        return False
    return True


def _rebind(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Have the functions that a copy keeps in attributes and as hooks, which deepcopy shares, close over the copies of what
    they close over: of modules and tensors."""
    own = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    places: list[Any] = [hooks for m in own for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    places += [vars(module) for module in own if is_torch(module)]
    places += [container for _, container in containers(model) if isinstance(container, dict | list)]
    for place in places:
        for key, value in list(items_of(place)):
            if isinstance(value, types.FunctionType) and (bound := _rebound(value, memo)) is not None:
                place[key] = bound


def _rebound(function: types.FunctionType, memo: Mapping[int, Any]) -> types.FunctionType | None:
    """A function over copies of what it closes over; None where nothing of that was copied."""
    cells, changed = [], False
    for cell in function.__closure__ or ():
        value = content(cell)
        other = memo.get(id(value)) if isinstance(value, Tensor | nn.Module) else None
        changed |= other is not None
        cells.append(cell if other is None else types.CellType(other))
    if not changed:
        return None
    bound = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    bound.__dict__.update(vars(function))
    return bound


def writes_parameters(model: nn.Module) -> bool:
    """Whether a module may change its parameters in place: on a change of mode (adapters that are merged in evaluation
    mode), or in a forward pass."""
    return switches(model) or renormalises(model)


def renormalises(model: nn.Module) -> bool:
    """Whether a module shortens its parameters in a forward pass (embeddings with a largest norm)."""
    return any(getattr(module, "max_norm", None) is not None for module in model.modules())


def switches(model: nn.Module) -> bool:
    """Whether a module does something of its own in `train` or `eval`."""
    known = (torch.jit.ScriptModule, torch.jit.RecursiveScriptModule)
    return any(
        not isinstance(module, known)
        and (type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval)
        for module in model.modules()
    )


def loads_by_itself(model: nn.Module) -> bool:
    """Whether a module does something of its own when a state dict is loaded, such as deriving values from it."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module).load_state_dict is not nn.Module.load_state_dict
        or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        for module in model.modules()
        if not (isinstance(module, torch.jit.ScriptModule) or is_torch(module))
    )


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    # With a count of changes of its own, which modules may compare with the one that they saw last: another, then.
    alias = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    if not parameter.is_inference() and parameter._version == 0:
        torch.autograd.graph.increment_version(alias)
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
