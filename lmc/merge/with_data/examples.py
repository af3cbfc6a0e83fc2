"""Examples for methods that look at data: with targets or without, all of them or a few."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import DataError, InputError
from lmc.network.batches import TaskData, as_splits, take, tensors


def splits(data: Any) -> bool:
    """Whether data are a mapping of splits, `{"train": ..., "test": ...}`."""
    return isinstance(data, Mapping) and {"train", "test"} <= data.keys() and not isinstance(data["train"], Tensor)


def chosen(data: Any) -> Any:
    """The one set of examples in `data`: `.validation` of a data set that has it, else `.train`, never `.test`."""
    if isinstance(data, TaskData):
        return data.task.on(chosen(data.data))
    if splits(data):
        data = SimpleNamespace(**data)
    for name in ("validation", "train"):
        if hasattr(data, name) and not isinstance(data, nn.Module):
            return getattr(data, name)
    return data


def batches(data: Any, what: str, *, limit: int | None, size: int) -> Iterator[tuple[Any, Tensor | None]]:
    """Batches `(inputs, targets or None)` of at most `size` examples.

    Args:
        data: `(inputs, targets)`, an iterable of such batches, a data set (see `chosen`), or inputs alone: a tensor or
            a mapping of tensors.
        what: how messages call the data.
        limit: use this many examples, spread evenly over data given whole, the first ones of an iterable.
    """
    data = chosen(data)
    if isinstance(data, (Tensor, Mapping)):
        leaves = tensors(data)
        if not leaves or any(leaf.ndim == 0 or len(leaf) != len(leaves[0]) or len(leaf) == 0 for leaf in leaves):
            raise DataError(f"{what}: inputs must be non-empty tensors with the examples along axis 0")
        whole: list[tuple[Any, Tensor | None]] = [(data, None)]
    else:
        whole = list(as_splits(data)[0].batches)
    if len(whole) == 1 and limit is not None and limit < (count := len(tensors(whole[0][0])[0])):
        spread = torch.linspace(0, count - 1, limit).round().long()
        inputs, targets = whole[0]
        whole = [(take(inputs, spread), None if targets is None else targets[spread])]
    left = limit
    for inputs, targets in whole:
        count = len(tensors(inputs)[0])
        for start in range(0, count if left is None else min(count, left), size):
            part = slice(start, min(start + size, count if left is None else left))
            yield take(inputs, part), None if targets is None else targets[part]
        left = None if left is None else left - count


def gather(data: Any, what: str) -> tuple[Any, Tensor | None]:
    """All examples of `data` as one `(inputs, targets or None)`."""
    parts = list(batches(data, what, limit=None, size=1 << 40))
    if len(parts) == 1:
        return parts[0]
    columns = [inputs for inputs, _ in parts]
    targets = torch.cat([goal for _, goal in parts if goal is not None])
    if isinstance(columns[0], Tensor):
        return torch.cat(columns), targets
    if isinstance(columns[0], Mapping):
        return {key: torch.cat([column[key] for column in columns]) for key in columns[0]}, targets
    return tuple(torch.cat(column) for column in zip(*columns, strict=True)), targets


def each(data: Any, count: int, what: str) -> list[Any]:
    """`data` as a list with one entry per model."""
    if isinstance(data, (Tensor, Mapping)) or not hasattr(data, "__len__") or len(data) != count:
        raise InputError(f"{what}: expected a list with one data set for each of the {count} models")
    return list(data)
