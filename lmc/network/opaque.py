"""State that can be neither looked into nor put back (iterators, streams, bytes that change): found, and replaced by others on
trial, which shows whether outputs depend on it."""

import array
import io
import queue
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmc.network.places import Address, containers, items_of
from lmc.network.stores import writes_of

# What can be neither looked into nor copied and put back.
_OPAQUE = (Iterator, bytearray, array.array, memoryview, io.IOBase, queue.SimpleQueue)


def opaque(module: nn.Module) -> dict[Address, str]:
    """The places of what can be neither looked into nor put back, where a forward pass may change it, and of what type it is."""
    may = writes_of(module)
    written = bool(may.items or may.written)
    found: dict[Address, str] = {}
    for address, container in containers(module):
        for key, value in items_of(container):
            for part in value if isinstance(value, tuple) else (value,):
                if _is_opaque(part) and (
                    written or not isinstance(part, bytearray | array.array | memoryview | np.ndarray)
                ):
                    found[*address, key] = type(getattr(part, "__self__", part)).__name__
    return found


def disturb(module: nn.Module, places: Collection[Address]) -> None:
    """Put others, which give other values, in the place of what can be neither looked into nor put back."""
    for address, container in list(containers(module)):
        for key, value in list(items_of(container)):
            if (*address, key) in places:
                container[key] = _disturbed(value)  # type: ignore


def _is_opaque(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype == object
    return isinstance(getattr(value, "__self__", value) if callable(value) else value, _OPAQUE)


def _disturbed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_disturbed, value))
    if not _is_opaque(value):
        return value
    if isinstance(value, np.ndarray):
        return np.full_like(value, object())
    if callable(value):
        return getattr(_disturbed(value.__self__), value.__name__)
    if isinstance(value, Iterator):
        return _Disturbed(value)
    if isinstance(value, bytearray | array.array | memoryview):
        flipped = bytearray(255 - byte for byte in bytes(value))
        if isinstance(value, array.array):
            return array.array(value.typecode, bytes(flipped))
        return memoryview(flipped).cast(value.format) if isinstance(value, memoryview) else flipped  # type: ignore
    return object()


class _Disturbed(Iterator[Any]):
    """Gives numbers that are larger by one than those of another iterator."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __next__(self) -> Any:
        return _more(next(self.inner))

    def send(self, value: Any) -> Any:
        return _more(self.inner.send(value))


def _more(value: Any) -> Any:
    numbers = (Tensor, int, float, complex, np.ndarray, np.number)
    return pytree.tree_map_only(numbers, lambda x: ~x if getattr(x, "dtype", None) == torch.bool else x + 1, value)
