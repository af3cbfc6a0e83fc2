"""The places in which a module keeps values beside its state dict: attributes, of its own and of its objects, buffers that are
not saved, dicts and lists, closures; each with an address."""

import functools
import types
from collections import UserDict, UserList, deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmc.network.stores import LIBRARIES, content, is_torch, writes_of

# (name of the module, attribute or "_buffers", keys further inside) of a dict or list that holds values.
Address: TypeAlias = tuple[Any, ...]
Container: TypeAlias = dict[Any, Any] | list[Any] | deque[Any] | set[Any]

EVERY_MODULE = frozenset(vars(nn.Module()))
NO_OBJECTS = (
    nn.Module,
    type,
    torch.device,
    torch.dtype,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
)
PART = "part of"  # a tuple, a partial function or a method, where nothing can be put in the place of anything


class Slots(dict[str, Any]):
    """The attributes of an object that has slots instead of a `__dict__`, as one."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner

    def __iter__(self) -> Iterator[str]:
        return (name for name in slots_of(self.owner) if hasattr(self.owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.owner, name)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def clear(self) -> None:
        for name in list(self):
            del self[name]

    def update(self, items: Any) -> None:  # type: ignore[override]
        for name, value in items.items():
            self[name] = value


def slots_of(value: Any) -> list[str]:
    """The slots of an object of the caller's own."""
    if isinstance(value, NO_OBJECTS) or not is_own(value):
        return []
    found = [(part, part.__dict__.get("__slots__", ())) for part in type(value).__mro__]
    each = [(part, name) for part, names in found for name in ([names] if isinstance(names, str) else names)]
    hidden = [f"_{part.__name__.lstrip('_')}{n}" if n[:2] == "__" != n[-2:] else n for part, n in each]
    return [name for name in hidden if name not in ("__dict__", "__weakref__")]


def is_own(value: Any) -> bool:
    """Whether an object is of a class of the caller's, or wraps a dict or list."""
    return type(value).__module__.split(".")[0] not in LIBRARIES or isinstance(value, UserDict | UserList)


def containers(model: nn.Module, also_torch: bool = False) -> Iterator[tuple[Address, Container]]:
    """Every dict, list, deque and set in which modules keep values of their own, with where it is. Torch's own modules keep
    none, unless functions of others may set some on them."""
    seen: dict[int, Any] = {}
    also_torch = also_torch or bool(writes_of(model))
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or (is_torch(module) and not also_torch):
            continue
        yield (name, "_buffers"), module._buffers
        yield from _inside((name,), vars(module), seen)


def _inside(address: Address, container: Container, seen: dict[int, Any]) -> Iterator[tuple[Address, Container]]:
    if id(container) in seen:
        return
    seen[id(container)] = container  # kept, so that nothing else gets its identity
    yield address, container
    for key, value in list(items_of(container)):
        if len(address) > 1 or key not in EVERY_MODULE:
            yield from _within((*address, key), value, seen)


def _within(address: Address, value: Any, seen: dict[int, Any]) -> Iterator[tuple[Address, Container]]:
    """The containers that a value is or has, however nested."""
    if isinstance(value, dict | list | deque | set):
        yield from _inside(address, value, seen)
    if isinstance(value, tuple | functools.partial | types.MethodType):
        for k, part in enumerate(_parts(value)):
            yield from _within((*address, PART, k), part, seen)
    elif isinstance(value, Tensor):
        if vars(value):
            yield from _inside((*address, "__dict__"), vars(value), seen)
    elif not isinstance(value, NO_OBJECTS) and is_own(value):
        if hasattr(value, "__dict__"):
            yield from _inside((*address, "__dict__"), vars(value), seen)
        if slots_of(value) and ~id(value) not in seen:
            seen[~id(value)] = value
            yield from _inside((*address, "__dict__"), Slots(value), seen)


def _parts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        return value
    return (value.__self__,) if isinstance(value, types.MethodType) else (value.args, value.keywords, value.func)


def items_of(container: Container) -> Iterable[tuple[Any, Any]]:
    """Keys or positions, and values; those of a set have none, and only the set as a whole has a place."""
    if isinstance(container, set):
        return ()
    return container.items() if isinstance(container, dict) else enumerate(container)


def is_namespace(address: Address) -> bool:
    """Whether a container holds the attributes of a module or of another object, or the buffers of a module."""
    return len(address) == 1 or address[-1] == "__dict__" or address[1:] == ("_buffers",)


def name_of(address: Address) -> Any:
    """The name of the attribute, of a module or of the innermost object, that holds a dict or list."""
    return address[max([k for k, part in enumerate(address[:-1]) if part == "__dict__"], default=0) + 1]


def is_single(value: Any) -> bool:
    """Whether there is one value, with nothing inside that could be emptied alone."""
    several = isinstance(value, (dict, list, deque, set, tuple, Tensor, functools.partial, *NO_OBJECTS))
    return value is not None and not (several or (is_own(value) and (hasattr(value, "__dict__") or slots_of(value))))


def in_state(module: nn.Module) -> set[int]:
    """The identities of the parameters of a module and of the tensors of its state dict."""
    return {id(x) for x in module.parameters()} | {id(x) for x in module.state_dict(keep_vars=True).values()}


def hidden_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module keeps beside its parameters and the buffers of its state dict."""
    state = in_state(module)
    for _, container in containers(module, also_torch=True):
        for _, value in items_of(container):
            yield from (x for x in tensors_of(value) if id(x) not in state)


def kept_tensors(module: nn.Module) -> list[Tensor]:
    """Tensors of modules that are not torch's own, each once."""
    state = in_state(module)
    found: dict[int, Tensor] = {}
    for _, container in containers(module):
        for _, value in items_of(container):
            found |= {id(x): x for x in tensors_of(value) if id(x) not in state}
    return list(found.values())


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that a value is or, as a tuple, has; those inside dicts and lists are found there. Arrays count as well, and
    what functions close over, and those of modules that are no children of one."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, types.FunctionType | functools.partial):
        return [x for held in _closed_over(value) if not isinstance(held, types.FunctionType) for x in tensors_of(held)]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return [_of_array(value)]
    return [x for leaf in pytree.tree_leaves(value) for x in tensors_of(leaf)] if isinstance(value, tuple) else []


def _closed_over(function: Any) -> list[Any]:
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *_closed_over(function.func)]
    return [content(cell) for cell in getattr(function, "__closure__", None) or ()]


def _of_array(array: np.ndarray) -> Tensor:
    """A tensor in the memory of an array; a copy where torch has no such tensor (read-only, reversed, of other bytes)."""
    try:
        if array.flags.writeable:
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        pass
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))


def numbers(value: Any) -> list[Any]:
    """The floating-point tensors and numbers in a value, however nested."""
    leaves = pytree.tree_leaves(value)
    return [
        x
        for x in leaves
        if isinstance(x, float | complex) or (isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()))
    ]
